"""The kind of an encoded image, and its conversion to an upright RGB JPEG, optionally shrunk."""

import io
from dataclasses import dataclass
from enum import IntFlag

import numpy as np
import simplejpeg
from PIL import Image

from data.decode import Pixels, decode
from data.jpeg import jpeg_frame

_ORIENTATION = 0x0112  # the EXIF tag

# EXIF orientation -> the operation that turns the image upright.
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class Kind(IntFlag):
    """How an image differs from an upright RGB JPEG, and what was done to it."""

    PNG = 1
    WEBP = 2
    GREY = 4
    CMYK = 8
    EXIF_ROTATED = 16
    SHRUNK = 32
    ENCODED_AGAIN = 64


DIFFERENCES = {
    Kind.PNG: "PNG",
    Kind.WEBP: "WebP",
    Kind.GREY: "grey",
    Kind.CMYK: "CMYK",
    Kind.EXIF_ROTATED: "EXIF-rotated",
}
"""The kinds that a conversion removes, with their names."""


@dataclass(frozen=True, slots=True)
class Conversion:
    """How images are converted. Those that need no change keep their bytes."""

    convert: bool = False
    """Encode other formats as RGB JPEG, and turn images with an EXIF rotation upright."""
    short_side: int | None = None
    """Shrink to this short side, in pixels; smaller images stay as they are."""
    quality: int = 95
    """Of newly encoded JPEGs; their colour keeps its full resolution (4:4:4)."""


@dataclass(frozen=True, slots=True)
class CheckedImage:
    """An image that decodes, as it is stored in a shard."""

    encoded: bytes
    extension: str
    kind: Kind


def check_image(encoded: bytes, conversion: Conversion) -> CheckedImage:
    """Decode an image to check that it is complete, and convert it if necessary.

    The same bytes give the same bytes on every machine: Pillow resizes in integers, and libjpeg-turbo's accurate
    cosine transform does not depend on the processor.

    Raises:
        DecodeError: truncated, damaged or not an image.
    """
    pixels = decode(encoded)
    extension, kind, orientation = _inspect(encoded)
    short_side = conversion.short_side
    shrinks = short_side is not None and min(pixels.shape[:2]) > short_side
    if not shrinks and not (conversion.convert and kind):
        return CheckedImage(encoded, extension, kind)
    image = Image.fromarray(pixels)
    if orientation in _UPRIGHT:
        image = image.transpose(_UPRIGHT[orientation])
    if shrinks and short_side is not None:
        kind |= Kind.SHRUNK
        scale = short_side / min(image.size)
        width, height = (max(short_side, round(side * scale)) for side in image.size)
        image = image.resize((width, height), Image.Resampling.LANCZOS)
    return CheckedImage(_encode(np.asarray(image), conversion.quality), "jpg", kind | Kind.ENCODED_AGAIN)


def _encode(pixels: Pixels, quality: int) -> bytes:
    encoded: bytes = simplejpeg.encode_jpeg(
        np.ascontiguousarray(pixels), quality=quality, colorspace="RGB", colorsubsampling="444", fastdct=False
    )
    return encoded


def _inspect(encoded: bytes) -> tuple[str, Kind, int]:
    """Extension, kind and EXIF orientation (1 is upright) of an image that decodes."""
    if encoded[:2] == b"\xff\xd8":
        kind = {1: Kind.GREY, 4: Kind.CMYK}.get(jpeg_frame(encoded).components, Kind(0))
        # Most JPEGs have no EXIF, and Pillow takes 25 times as long as this search.
        orientation = _orientation(encoded) if encoded.find(b"Exif\0\0", 0, 2**16) >= 0 else 1
        extension = "jpg"
    else:
        with Image.open(io.BytesIO(encoded)) as image:
            extension, mode = str(image.format).lower(), image.mode
        kind = Kind.PNG if extension == "png" else Kind.WEBP
        kind |= Kind.GREY if mode[0] in "1LIF" else Kind(0)
        orientation = _orientation(encoded)
    return extension, kind | (Kind.EXIF_ROTATED if orientation in _UPRIGHT else Kind(0)), orientation


def _orientation(encoded: bytes) -> int:
    try:
        with Image.open(io.BytesIO(encoded)) as image:
            return int(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # Pillow raises anything on damaged EXIF, but the image itself is complete
        return 1
