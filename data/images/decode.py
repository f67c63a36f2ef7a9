"""Encoded images to pixels."""

import io
import re
from collections.abc import Callable

import numpy as np
from PIL import Image, UnidentifiedImageError

from data.images.jpeg import Pixels as Pixels
from data.images.jpeg import jpeg_frame, jpeg_pixels
from data.images.jpeg_region import RegionDecoder
from data.images.region_frame import Window, region_frame
from data.images.signatures import compression, image_format
from data.limits import SCANS

# 256 MiB of RGB, the limit from which Pillow warns of decompression bombs; photographs are far smaller.
MAX_PIXELS = 2**28 // 3

_SCAN = re.compile(rb"\xff\xda")  # several times as fast as bytes.count
_CONVERTED = ("BMP", "GIF", "PPM", "TIFF")  # by a build


class DecodeError(ValueError):
    """The bytes are not a complete image, or the image is refused.

    Args:
        what: is wrong with them.
        fix: what makes shards of them that can be decoded; the message has both.
    """

    def __init__(self, what: str, fix: str = "") -> None:
        super().__init__("; ".join(filter(None, (what, fix))))
        self.what = what


def decode(encoded: bytes) -> Pixels:
    """Pixels (H, W, 3) uint8 RGB of a JPEG, PNG or WebP.

    Transparency is dropped, grey is repeated, and of 16 bits the upper eight are kept. The EXIF orientation is ignored,
    as is usual for ImageNet: its labels and published accuracies refer to the pixels as stored. Of animations, the
    first frame is taken.

    Raises:
        DecodeError: empty, truncated, damaged, none of these formats, or more than `MAX_PIXELS` pixels (checked before
            decoding). No other error is raised, whatever the bytes.
    """
    try:
        return _decode(encoded)
    except DecodeError:
        raise
    except UnidentifiedImageError as error:
        raise DecodeError("damaged: its header cannot be read") from error
    except Exception as error:  # decoders raise anything on damaged bytes
        raise DecodeError(f"damaged: {error or type(error).__name__}") from error


def decode_window(encoded: bytes, choose: Callable[[int, int], Window], regions: RegionDecoder | None = None) -> Pixels:
    """Pixels (H, W, 3) uint8 RGB of the window that `choose` takes of a height and a width, as by `decode`.

    With `regions`, JPEGs are not read below the window, and some damage goes unseen: for images known to decode.

    Raises:
        DecodeError: as by `decode`, and nothing else but what `choose` raises.
    """
    frame = region_frame(encoded) if regions else None
    if regions is None or frame is None or not 0 < frame.height * frame.width <= MAX_PIXELS:
        pixels = decode(encoded)
        return pixels[choose(*pixels.shape[:2])]
    window = choose(frame.height, frame.width)
    region = regions(encoded, frame, window)
    return decode(encoded)[window] if region is None else region


def _decode(encoded: bytes) -> Pixels:
    if not encoded:
        raise DecodeError("empty file")
    if encoded[:2] == b"\xff\xd8":
        height, width, components = jpeg_frame(encoded)
        _refuse_bomb(width, height)
        scans = len(_SCAN.findall(encoded))  # which is no part of a scan's data
        if scans > SCANS:
            raise DecodeError(f"{scans:,} scans exceed the limit of {SCANS:,}")
        return jpeg_pixels(encoded, components)
    if encoded[:16] == b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR":
        width, height = int.from_bytes(encoded[16:20]), int.from_bytes(encoded[20:24])
    elif encoded[:4] == b"RIFF" and encoded[8:12] == b"WEBP":
        width, height = _webp_size(encoded)
    else:
        raise DecodeError(*_refused_format(encoded))
    _refuse_bomb(width, height)
    with Image.open(io.BytesIO(encoded), formats=("PNG", "WEBP")) as image:
        if image.mode.startswith("I"):  # 16 bits, which Pillow's conversion would clip
            grey = (np.asarray(image) >> 8).astype(np.uint8)
            return np.repeat(grey[:, :, None], 3, axis=2)
        image.info.pop("transparency", None)  # dropped anyway, and Pillow warns about some kinds
        return np.array(image.convert("RGB"))


def _refused_format(encoded: bytes) -> tuple[str, str]:
    """What the bytes are instead, and what makes an image of them that can be decoded."""
    if compression(encoded) == "gzip":
        return "compressed with gzip, not a JPEG, PNG or WebP", "coatnet shards build unpacks it"
    name = image_format(encoded)
    if name is None:
        return "neither JPEG, PNG nor WebP", ""
    fix = (
        "coatnet shards build --convert makes a JPEG of it"
        if name in _CONVERTED
        else "convert it to JPEG, PNG or WebP and build the shards again"
    )
    return f"{'an' if name.startswith('A') else 'a'} {name}, not a JPEG, PNG or WebP", fix


def _webp_size(encoded: bytes) -> tuple[int, int]:
    """Width and height from the first chunk of the container: Pillow allocates the canvas before it reports them."""
    match encoded[12:16]:
        case b"VP8X":
            return 1 + int.from_bytes(encoded[24:27], "little"), 1 + int.from_bytes(encoded[27:30], "little")
        case b"VP8L":
            bits = int.from_bytes(encoded[21:25], "little")
            return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
        case b"VP8 ":
            width, height = (int.from_bytes(encoded[at : at + 2], "little") & 0x3FFF for at in (26, 28))
            return width, height
    raise DecodeError("damaged: an unknown kind of WebP")


def _refuse_bomb(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise DecodeError(f"{width:,} x {height:,} pixels exceed the limit of {MAX_PIXELS:,}")
