"""The window of a JPEG that a crop takes, to the same bits as of the whole picture, without what lies below being read.

Blocks are coded one after another, so that everything above a window must be read, and nothing below. That holds for
one scan with all components and without restart markers, which nearly all photographs have; others are decoded whole.

libturbojpeg 3 computes the pixels of the window alone. Where it is missing, simplejpeg decodes all rows down to the end
of the window, from a header that says that the picture ends there. Both read the same blocks and take every warning
for an error, so that they agree on what is damaged as well: which one is used is no part of a run's identity.

Damage below the window goes unseen, and so do most garbled codes above its end, which only the end of the data would
show. So it is for pictures that were decoded whole before.
"""

import os
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import simplejpeg

from data.errors import DataError
from data.images.jpeg import FRAMES, Pixels, segments
from data.images.turbojpeg import VARIABLE, TurboJpeg, find_turbojpeg

Window = tuple[slice, slice]
"""Rows and columns of an image, with a start and a stop each."""

_EOI = b"\xff\xd9"
_START_OF_SCAN, _RESTART_INTERVAL = 0xDA, 0xDD
_SEQUENTIAL = (0xC0, 0xC1)  # with Huffman codes
_BLOCK = 8  # pixels
# Luminance may have several blocks for each of chrominance: 4:4:4, 4:2:2, 4:4:0, 4:2:0 and 4:1:1; and grey.
_FACTORS = {b"\x11", *(bytes((luma, 0x11, 0x11)) for luma in (0x11, 0x21, 0x12, 0x22, 0x41))}
# What libjpeg says at the end of rows whose header leaves out the rest.
_REST = "extraneous bytes before marker 0xd9"


class RegionFrame(NamedTuple):
    """What the header says of a JPEG of which a region can be decoded."""

    height: int
    width: int
    across: int
    """Blocks of luminance beside one another in an iMCU, the unit of coding."""
    down: int
    """Blocks of luminance above one another in it."""
    height_at: int
    """Where the height is in the file."""


def region_frame(encoded: bytes) -> RegionFrame | None:
    """What the header of a JPEG says; None for other formats and kinds, and where its data does not end with the image.

    So a truncated file is never taken, nor one with a marker among its data. Nothing is raised, whatever the bytes.
    """
    if encoded[:2] != b"\xff\xd8":
        return None
    frame: RegionFrame | None = None
    factors = b""
    for marker, start, stop in segments(encoded, with_data=False):
        if marker == _RESTART_INTERVAL or (marker in FRAMES and marker not in _SEQUENTIAL):
            return None
        if marker in _SEQUENTIAL:
            factors = encoded[start + 11 : stop : 3]
            if (
                encoded[start + 4 : start + 5] != b"\x08"
                or factors not in _FACTORS
                or encoded[start + 9] != len(factors)
            ):
                return None
            height, width = (int.from_bytes(encoded[start + at : start + at + 2]) for at in (5, 7))
            frame = RegionFrame(height, width, factors[0] >> 4, factors[0] & 15, start + 5)
        elif marker == _START_OF_SCAN:
            has_all = encoded[start + 4 : start + 5] == bytes((len(factors),))
            return frame if has_all and _first_marker(encoded, stop) == _EOI else None
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


class RegionDecoder:
    """Decodes windows of JPEGs, with libturbojpeg or without one; threads may share it."""

    def __init__(self, library: TurboJpeg | None = None) -> None:
        self._library = library

    def __str__(self) -> str:
        if self._library is None:
            return "simplejpeg, down to the end of the crop"
        return f"libturbojpeg ({self._library.path}), the crop alone"

    def __call__(self, encoded: bytes, frame: RegionFrame, window: Window) -> Pixels | None:
        """Pixels (H, W, 3) uint8 RGB of the `window`; None if the whole picture is to be decoded, which then decides.

        That is so for every warning about the data down to the end of the window, and with simplejpeg if the window
        ends with the picture.
        """
        rows, columns = window
        stop = _rows_read(frame, rows.stop)
        if self._library is None:
            above = _above(encoded, frame, stop) if stop < frame.height else None
            return None if above is None else above[rows, columns]
        # One more iMCU on each side, since chrominance is interpolated from its neighbours.
        unit = _BLOCK * frame.across
        left = max(0, columns.start // unit * unit - unit)
        right = min(frame.width, columns.stop + unit)
        # At the end of the picture, libjpeg looks at what follows only if all rows are asked for.
        bottom = rows.stop if stop < frame.height else frame.height
        pixels = self._library.region(encoded, left, rows.start, right - left, bottom - rows.start)
        if pixels is None:
            return None
        return pixels[: rows.stop - rows.start, columns.start - left : columns.stop - left]


def find_region_decoder(environment: Mapping[str, str] = os.environ) -> RegionDecoder:
    """With libturbojpeg, if there is one whose pixels are those of simplejpeg.

    Raises:
        DataError: the environment names a libturbojpeg that cannot be used.
    """
    library = find_turbojpeg(environment)
    if library is None or _agrees(library):
        return RegionDecoder(library)
    if environment.get(VARIABLE):
        raise DataError(
            f"{VARIABLE}={library.path}: its pixels differ from those of simplejpeg; name another libturbojpeg.so, or "
            "unset the variable"
        )
    return RegionDecoder()


def _rows_read(frame: RegionFrame, stop: int) -> int:
    """The rows whose blocks libjpeg reads for those up to `stop`."""
    unit = _BLOCK * frame.down
    read = -(-stop // unit) * unit
    if frame.down > 1 and stop > read - frame.down:  # the last ones are interpolated with the chrominance below
        read += unit
    return min(read, frame.height)


def _above(encoded: bytes, frame: RegionFrame, stop: int) -> Pixels | None:
    """The rows up to `stop`, between two iMCUs."""
    at = frame.height_at
    pixels = np.empty((stop, frame.width, 3), np.uint8)
    try:
        simplejpeg.decode_jpeg(encoded[:at] + stop.to_bytes(2) + encoded[at + 2 :], "RGB", buffer=pixels.reshape(-1))
    except ValueError as error:
        # Only the first warning is reported: there is none about the rows.
        return pixels if _REST in str(error) else None
    return pixels


def _agrees(library: TurboJpeg) -> bool:
    """Whether windows of generated pictures of each kind have the same pixels with and without the library."""
    height, width = 83, 117
    picture = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    decoder = RegionDecoder(library)
    windows = [(slice(top, top + 21), slice(left, left + 38)) for top in (0, 31, 62) for left in (0, 43, 79)]
    for sampling in ("444", "422", "440", "420", "411", "gray"):
        encoded = simplejpeg.encode_jpeg(picture, colorsubsampling=sampling)
        whole, frame = simplejpeg.decode_jpeg(encoded, "RGB"), region_frame(encoded)
        assert frame is not None, sampling
        for window in windows:
            pixels = decoder(encoded, frame, window)
            if pixels is None or not np.array_equal(pixels, whole[window]):
                return False
    return True
