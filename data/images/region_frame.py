"""What the header of a JPEG says of decoding windows of it.

Blocks are coded one after another, in MCUs: those of all components that belong to the same pixels. Chrominance of half
the resolution is interpolated between neighbours, so that the pixels at the edge of an MCU depend on the next one.
"""

from typing import NamedTuple

import numpy as np

from data.images.jpeg import FRAMES, segments

Window = tuple[slice, slice]
"""Rows and columns of an image, with a start and a stop each."""

BLOCK = 8
"""Pixels of a side."""
EOI = b"\xff\xd9"

_START_OF_SCAN, _RESTART_INTERVAL = 0xDA, 0xDD
_SEQUENTIAL = (0xC0, 0xC1)  # with Huffman codes
# Luminance may have several blocks for each of chrominance: 4:4:4, 4:2:2, 4:4:0, 4:2:0 and 4:1:1; and grey.
_FACTORS = {b"\x11", *(bytes((luma, 0x11, 0x11)) for luma in (0x11, 0x21, 0x12, 0x22, 0x41))}


class RegionFrame(NamedTuple):
    """What the header says of a JPEG of which a window can be decoded: one scan with all components."""

    height: int
    width: int
    across: int
    """Blocks of luminance beside one another in an MCU."""
    down: int
    """Blocks of luminance above one another in it."""
    height_at: int
    """Where the height is in the file, with the width behind it."""
    data_at: int
    """Where the data of the scan begins."""
    interval: int = 0
    """MCUs from one restart marker to the next, a part of a row of them; 0 without markers."""

    @property
    def mcu(self) -> tuple[int, int]:
        """Height and width of an MCU in pixels."""
        return BLOCK * self.down, BLOCK * self.across

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of MCUs."""
        height, width = self.mcu
        return -(-self.height // height), -(-self.width // width)

    @property
    def reach(self) -> tuple[int, int]:
        """Pixels below and above, and on either side, that belong to the next chrominance, which is interpolated."""
        return self.down if self.down > 1 else 0, self.across if self.across > 1 else 0

    def rows_read(self, stop: int) -> int:
        """The rows whose blocks libjpeg reads for those up to `stop`."""
        unit, _ = self.mcu
        return min(-(-(stop + self.reach[0]) // unit) * unit, self.height)


def region_frame(encoded: bytes) -> RegionFrame | None:
    """What the header of a JPEG says.

    None for other formats and kinds, for intervals of which a row of MCUs has no whole number, and without such markers
    where the data does not end with the image. So a truncated file is never taken, nor one with a marker among its
    data. Nothing is raised, whatever the bytes.
    """
    if encoded[:2] != b"\xff\xd8":
        return None
    frame: RegionFrame | None = None
    factors, interval = b"", 0
    for marker, start, stop in segments(encoded, with_data=False):
        if marker in FRAMES and marker not in _SEQUENTIAL:
            return None
        if marker == _RESTART_INTERVAL:
            interval = int.from_bytes(encoded[start + 4 : start + 6])
        if marker in _SEQUENTIAL:
            factors = encoded[start + 11 : stop : 3]
            if (
                encoded[start + 4 : start + 5] != b"\x08"
                or factors not in _FACTORS
                or encoded[start + 9] != len(factors)
            ):
                return None
            height, width = (int.from_bytes(encoded[start + at : start + at + 2]) for at in (5, 7))
            frame = RegionFrame(height, width, factors[0] >> 4, factors[0] & 15, start + 5, 0)
        elif marker == _START_OF_SCAN:
            if frame is None or encoded[start + 4 : start + 5] != bytes((len(factors),)):
                return None
            frame = frame._replace(data_at=stop, interval=interval)
            if interval:
                return None if frame.grid[1] % interval else frame
            return frame if _first_marker(encoded, stop) == EOI else None
    return None


def _first_marker(encoded: bytes, start: int) -> bytes:
    """The first marker behind the place `start`; two other bytes, or none, if there is none."""
    data = np.frombuffer(encoded, np.uint8)[start:]
    if len(data) < 2:
        return b""
    # Twice as fast as a regular expression.
    is_marker = data[:-1] == 0xFF
    is_marker &= data[1:] != 0
    at = start + int(is_marker.argmax())
    return encoded[at : at + 2]
