"""JPEGs to pixels by libjpeg-turbo, which warns of much that is harmless: only what loses pixels is damage.

| warning of libjpeg | decision |
|---|---|
| unknown JFIF revision number | harmless: nothing in the picture depends on it |
| unknown Adobe colour transform code | harmless: every decoder assumes YCbCr, or YCCK of four components |
| invalid SOS parameters for sequential JPEG | harmless: a sequential JPEG has only one possible set of them |
| bad ICC marker | harmless: colour profiles are not applied |
| extraneous bytes before a marker of the header | harmless: nothing is decoded there |
| extraneous bytes before EOI | padding, unless the data before them ends as only damaged data does |
| extraneous bytes before another marker, found marker instead of RST | damage: the data between two markers is lost |
| premature end of data segment, premature end of file | damage: the rest is grey |
| bad Huffman code, bad arithmetic code | damage: what follows is garbled |
| inconsistent progression sequence | damage: coefficients lack bits, or have them twice |

libjpeg reports only the first warning of a file. So what is harmless is taken out, and the rest is decoded strictly.
"""

import io
import re
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image

Pixels = NDArray[np.uint8]

_SOI, _EOI = b"\xff\xd8", b"\xff\xd9"
_MARKER = re.compile(rb"\xff[^\x00\xff]")
_END_OF_SCAN = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]")
FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
"""Markers of frame headers."""
_PROGRESSIVE = (0xC2, 0xC6, 0xCA, 0xCE)
_PADDING = re.compile(r"(\d+) extraneous bytes before marker 0xd9")
# Bytes that libjpeg holds in its bit buffer at the end of a scan and does not count, twice if they are stuffed.
_UNCOUNTED = 16


class JpegFrame(NamedTuple):
    """What the frame header of a JPEG says."""

    height: int
    width: int
    components: int
    """1 grey, 3 colour, 4 CMYK or YCCK."""


class _Segment(NamedTuple):
    marker: int
    start: int
    stop: int
    """Of a scan, after its data or its header."""


def jpeg_frame(encoded: bytes) -> JpegFrame:
    """Size and components of a JPEG.

    Raises:
        ValueError: its header cannot be read.
    """
    for marker, start, stop in segments(encoded):
        if marker in FRAMES and stop - start > 9:
            height, width = (int.from_bytes(encoded[start + at : start + at + 2]) for at in (5, 7))
            return JpegFrame(height, width, encoded[start + 9])
    raise ValueError("it has no frame header")


def jpeg_pixels(encoded: bytes, components: int) -> Pixels:
    """Pixels (H, W, 3) uint8 RGB of a JPEG with so many components.

    For the rare sampling factors that TurboJPEG does not know, Pillow decodes, which notices only truncation.

    Raises:
        ValueError, OSError: damaged, or of a kind that libjpeg does not decode.
    """
    try:
        return _strictly(encoded, components)
    except ValueError:
        plain = _without_harmless_oddities(encoded, components)
    try:
        return _strictly(plain, components)
    except ValueError as error:
        if "subsampling" in str(error):
            with Image.open(io.BytesIO(plain), formats=("JPEG",)) as image:
                return np.array(image.convert("RGB"))
        padding = _PADDING.search(str(error))
        if padding is None or not _only_padded(plain, int(padding[1]), components):
            raise
    return _strictly(plain, components, strict=False)


def _strictly(encoded: bytes, components: int, strict: bool = True) -> Pixels:
    """Every warning is an error, unless not `strict`."""
    if components != 4:
        pixels: Pixels = simplejpeg.decode_jpeg(encoded, "RGB", strict=strict)
        return pixels
    # Inverted, as Adobe writes them and as Pillow assumes for all.
    ink = 255 - simplejpeg.decode_jpeg(encoded, "CMYK", strict=strict)
    return np.array(Image.fromarray(ink, "CMYK").convert("RGB"))


def segments(encoded: bytes, with_data: bool = True) -> Iterator[_Segment]:
    """The marker segments from SOI to EOI without the bytes between them; scans end with their data or header."""
    at = len(_SOI)
    while found := _MARKER.search(encoded, at):
        marker, start = encoded[found.start() + 1], found.start()
        stop = found.end()
        if marker == _EOI[1]:
            yield _Segment(marker, start, stop)
            return
        if marker != 0x01 and not 0xD0 <= marker <= 0xD8:  # those have no content
            stop += max(2, int.from_bytes(encoded[stop : stop + 2]))
        if marker == 0xDA and with_data:
            end = _END_OF_SCAN.search(encoded, stop)
            stop = end.start() if end else len(encoded)
        yield _Segment(marker, start, min(stop, len(encoded)))
        at = stop


def _without_harmless_oddities(encoded: bytes, components: int) -> bytes:
    """The same image without metadata, bytes between segments, and values in headers that only cause warnings."""
    plain, progressive = bytearray(_SOI), False
    for marker, start, stop in segments(encoded):
        segment = bytearray(encoded[start:stop])
        progressive = progressive or marker in _PROGRESSIVE
        if marker == 0xE0 and segment[4:9] == b"JFIF\0":
            segment[9:11] = b"\x01\x01"
        elif marker == 0xEE and segment[4:9] == b"Adobe" and len(segment) > 15:
            assumed = 2 if components == 4 else 1
            if segment[15] not in (0, assumed):
                segment[15] = assumed
        elif marker == 0xDA and not progressive:
            content = 2 + int.from_bytes(segment[2:4])
            segment[content - 3 : content] = b"\x00\x3f\x00"
        elif 0xE0 <= marker <= 0xEF or marker == 0xFE:
            continue
        plain += segment
    return bytes(plain)


def _only_padded(encoded: bytes, counted: int, components: int) -> bool:
    """Whether the bytes before EOI, of which libjpeg counted so many, are padding behind a complete image.

    In a damaged file they are data that was not reached, because garbled codes consumed the image's blocks too soon.
    The two differ in how the data ends that was decoded: encoders fill its last byte with ones (T.81, F.1.2.3). Damaged
    data ends in that way one time in four. In a progressive JPEG, whose last scan only refines and whose other scans
    show damage, they count as padding.
    """
    end = len(encoded) - len(_EOI)
    last_scan = encoded.rindex(b"\xff\xda")
    first = last_scan + 2 + int.from_bytes(encoded[last_scan + 2 : last_scan + 4])
    pixels = _strictly(encoded, components, strict=False)

    def equal(data: bytes) -> bool:
        try:
            return np.array_equal(_strictly(data + _EOI, components), pixels)
        except ValueError:
            return False

    cuts = range(min(end - first, counted + _UNCOUNTED), counted - 1, -1)
    complete = next((encoded[: end - cut] for cut in cuts if equal(encoded[: end - cut])), None)
    if complete is None:
        return False
    progressive = any(segment.marker in _PROGRESSIVE for segment in segments(encoded))
    if progressive or complete.endswith(b"\xff\x00"):  # a stuffed byte of eight ones
        return True
    before, last = complete[:-1], complete[-1]
    for bit in (1 << number for number in range(7)):
        flipped = last ^ bit
        if not equal(before + (b"\xff\x00" if flipped == 0xFF else bytes([flipped]))):
            return True
        if not last & bit:
            return False
    return True
