"""Encoded images to pixels."""

import io

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

Pixels = NDArray[np.uint8]

# 256 MiB of RGB, the limit from which Pillow warns of decompression bombs; photographs are far smaller.
MAX_PIXELS = 2**28 // 3


class DecodeError(ValueError):
    """The bytes are not a complete image, or the image is refused."""


def decode(encoded: bytes) -> Pixels:
    """Pixels (H, W, 3) uint8 RGB of a JPEG, PNG or WebP.

    Transparency is dropped, grey is repeated, and of 16 bits the upper eight are kept. The EXIF orientation is ignored,
    as is usual for ImageNet: its labels and published accuracies refer to the pixels as stored.

    Raises:
        DecodeError: empty, truncated, damaged, none of these formats, or more than `MAX_PIXELS` pixels (checked before
            decoding). No other error is raised, whatever the bytes.
    """
    if not encoded:
        raise DecodeError("empty file")
    if encoded[:2] == b"\xff\xd8":
        return _decode_jpeg(encoded)
    if encoded[:16] == b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR":
        width, height = int.from_bytes(encoded[16:20]), int.from_bytes(encoded[20:24])
    elif encoded[:4] == b"RIFF" and encoded[8:12] == b"WEBP":
        width, height = _webp_size(encoded)
    else:
        raise DecodeError("neither JPEG, PNG nor WebP")
    _refuse_bomb(width, height)
    try:
        with Image.open(io.BytesIO(encoded), formats=("PNG", "WEBP")) as image:
            if image.mode.startswith("I"):  # 16 bits, which Pillow's conversion would clip
                grey = (np.asarray(image) >> 8).astype(np.uint8)
                return np.repeat(grey[:, :, None], 3, axis=2)
            image.info.pop("transparency", None)  # dropped anyway, and Pillow warns about some kinds
            return np.array(image.convert("RGB"))
    except UnidentifiedImageError as error:
        raise DecodeError("damaged: its header cannot be read") from error
    except Exception as error:  # Pillow's parsers raise anything on damaged bytes
        raise DecodeError(f"damaged: {error}") from error


def _decode_jpeg(encoded: bytes) -> Pixels:
    """By libjpeg-turbo in strict mode: damage is an error instead of a grey area."""
    try:
        height, width, colors, _ = simplejpeg.decode_jpeg_header(encoded)
        _refuse_bomb(width, height)
        if colors not in ("CMYK", "YCCK"):
            pixels: Pixels = simplejpeg.decode_jpeg(encoded, "RGB")
            return pixels
        # Inverted, as Adobe writes them and as Pillow assumes for all.
        ink = 255 - simplejpeg.decode_jpeg(encoded, "CMYK")
        return np.array(Image.fromarray(ink, "CMYK").convert("RGB"))
    except DecodeError:
        raise
    except (ValueError, MemoryError) as error:
        raise DecodeError(f"damaged: {error}") from error


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
