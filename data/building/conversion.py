"""The kind of an encoded image, and its conversion to an upright RGB JPEG, optionally shrunk or recompressed."""

import io
import warnings
import zlib
from dataclasses import dataclass, replace
from enum import IntFlag
from typing import get_args

import numpy as np
import simplejpeg
from PIL import Image, ImageOps

from data.building.jpeg_encoding import QUALITY, SUBSAMPLING, Subsampling
from data.building.restart_markers import with_restart_markers
from data.images.decode import MAX_PIXELS, DecodeError, Pixels, decode
from data.images.jpeg import jpeg_frame
from data.images.signatures import compression, image_format

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
    GIF = 128
    BMP = 256
    TIFF = 512
    GZIPPED = 1024
    PPM = 2048
    MARKED = 4096
    """Given restart markers."""
    UNMARKED = 8192
    """Cannot have restart markers, which all were to have."""


DIFFERENCES = {
    Kind.PNG: "PNG",
    Kind.WEBP: "WebP",
    Kind.GIF: "GIF",
    Kind.BMP: "BMP",
    Kind.TIFF: "TIFF",
    Kind.PPM: "PPM",
    Kind.GREY: "grey",
    Kind.CMYK: "CMYK",
    Kind.EXIF_ROTATED: "EXIF-rotated",
}
"""The kinds that a conversion removes, with their names."""

_REMOVED = Kind(sum(DIFFERENCES))
_CONVERTIBLE = {"GIF": Kind.GIF, "BMP": Kind.BMP, "TIFF": Kind.TIFF, "PPM": Kind.PPM}
UNCONVERTED = {name: f"a {name}, which only --convert takes, as a JPEG" for name in _CONVERTIBLE}
"""Format -> why an image is left out if it is not converted."""
_MOST_UNPACKED = 2**28  # bytes: no image that can be decoded has more


@dataclass(frozen=True, slots=True)
class Conversion:
    """How images are converted. Those that need no change keep their bytes."""

    convert: bool = False
    """Encode other formats as RGB JPEG, of GIFs the first frame, and turn images with an EXIF rotation upright."""
    short_side: int | None = None
    """Shrink to this short side, in pixels, and turn all images with an EXIF rotation upright, small ones too."""
    quality: int = QUALITY
    """Of newly encoded JPEGs."""
    subsampling: Subsampling = SUBSAMPLING
    """Of newly encoded JPEGs."""
    recompress: bool = False
    """Encode also what needs no other change, if that makes it smaller, and turn images with an EXIF rotation
    upright."""
    restart_markers: bool = False
    """Give JPEGs restart markers, without a loss."""

    def __post_init__(self) -> None:
        if self.short_side is not None and self.short_side < 1:
            raise ValueError(f"a short side of {self.short_side} pixels; it must be at least 1")
        if not 1 <= self.quality <= 100:
            raise ValueError(f"quality {self.quality}; it must be from 1 to 100")
        if self.subsampling not in get_args(Subsampling):
            raise ValueError(f"subsampling {self.subsampling!r}; it must be one of {', '.join(get_args(Subsampling))}")

    @property
    def encodes(self) -> bool:
        """Whether there may be images that are encoded again."""
        return self.convert or self.recompress or self.short_side is not None


@dataclass(frozen=True, slots=True)
class CheckedImage:
    """An image that decodes, as it is stored in a shard."""

    encoded: bytes
    extension: str
    kind: Kind


def check_image(encoded: bytes, conversion: Conversion) -> CheckedImage:
    """Decode an image to check that it is complete, and convert it if necessary.

    The same bytes give the same bytes on every machine: Pillow resizes in integers, and libjpeg-turbo's integer cosine
    transforms do not depend on the processor. (Restart markers come with Huffman codes by the machine's libturbojpeg.)

    Raises:
        DecodeError: truncated, damaged or not an image.
        DataError: restart markers are wanted, and there is no libturbojpeg that writes them.
    """
    checked, pixels = _converted(encoded, conversion)
    if not conversion.restart_markers:
        return checked
    marked = with_restart_markers(checked.encoded, decode(checked.encoded) if pixels is None else pixels)
    if marked is None:
        return replace(checked, kind=checked.kind | Kind.UNMARKED)
    return checked if marked == checked.encoded else CheckedImage(marked, "jpg", checked.kind | Kind.MARKED)


def _converted(encoded: bytes, conversion: Conversion) -> tuple[CheckedImage, Pixels | None]:
    """The image as it is stored but for restart markers, and its pixels (H, W, 3) if it was not encoded again."""
    encoded, packed = _unpacked(encoded)
    name = image_format(encoded)
    if name in _CONVERTIBLE:
        if not conversion.convert:
            raise DecodeError(UNCONVERTED[name])
        pixels, kind = _decode_other(encoded, name)
        extension, orientation = "", 1
    else:
        pixels = decode(encoded)
        extension, kind, orientation = _inspect(encoded)
    kind |= packed
    short_side = conversion.short_side
    shrinks = short_side is not None and min(pixels.shape[:2]) > short_side
    turns = (short_side is not None or conversion.recompress) and orientation in _UPRIGHT
    changes = shrinks or turns or bool(conversion.convert and kind & _REMOVED)
    if not changes and not conversion.recompress:
        return CheckedImage(encoded, extension, kind), pixels
    image = Image.fromarray(pixels)
    if orientation in _UPRIGHT:
        image = image.transpose(_UPRIGHT[orientation])
    if shrinks and short_side is not None:
        kind |= Kind.SHRUNK
        scale = short_side / min(image.size)
        width, height = (max(short_side, round(side * scale)) for side in image.size)
        image = image.resize((width, height), Image.Resampling.LANCZOS)
    again = _encode(np.asarray(image), conversion)
    if not changes and len(again) >= len(encoded):
        return CheckedImage(encoded, extension, kind), pixels
    return CheckedImage(again, "jpg", kind | Kind.ENCODED_AGAIN), None


def _unpacked(encoded: bytes) -> tuple[bytes, Kind]:
    """The image in a file that may be compressed with gzip, as some of ImageNet-22K's are."""
    if compression(encoded) != "gzip":
        return encoded, Kind(0)
    unpacking = zlib.decompressobj(wbits=31)
    try:
        content = unpacking.decompress(encoded, _MOST_UNPACKED)
    except zlib.error as error:
        raise DecodeError(f"damaged: {error}") from error
    if not unpacking.eof:
        more = (
            f"unpacks to more than {_MOST_UNPACKED:,} bytes"
            if len(content) == _MOST_UNPACKED
            else "the gzip data ends early"
        )
        raise DecodeError(f"damaged: {more}")
    return content, Kind.GZIPPED


def _decode_other(encoded: bytes, name: str) -> tuple[Pixels, Kind]:
    """The upright pixels (H, W, 3) of the first frame of a GIF, BMP or TIFF."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of unknown tags; the size is checked here
            with Image.open(io.BytesIO(encoded), formats=(name,)) as image:
                width, height = image.size
                if width * height > MAX_PIXELS:
                    raise DecodeError(f"{width:,} x {height:,} pixels exceed the limit of {MAX_PIXELS:,}")
                kind = _CONVERTIBLE[name] | (Kind.GREY if image.mode[0] in "1LI" else Kind(0))
                if image.mode == "F" or image.mode == "I":
                    raise DecodeError(f"a {name} of 32-bit values, whose range is unknown; convert it to 8 or 16 bits")
                if image.mode.startswith("I"):  # 16 bits, of which decode() keeps the upper eight as well
                    grey = (np.asarray(image) >> 8).astype(np.uint8)
                    return np.repeat(grey[:, :, None], 3, axis=2), kind
                image.info.pop("transparency", None)
                return np.array(ImageOps.exif_transpose(image).convert("RGB")), kind
    except DecodeError:
        raise
    except Exception as error:  # Pillow's parsers raise anything on damaged bytes
        raise DecodeError(f"damaged: {error or type(error).__name__}") from error


def _encode(pixels: Pixels, conversion: Conversion) -> bytes:
    encoded: bytes = simplejpeg.encode_jpeg(
        np.ascontiguousarray(pixels),
        quality=conversion.quality,
        colorspace="RGB",
        colorsubsampling=conversion.subsampling.replace(":", ""),
        fastdct=False,  # the accurate cosine transform from quality 96 on; simplejpeg 1.9 takes the fast one below
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
