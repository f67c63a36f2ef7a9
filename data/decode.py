"""Encoded images to pixels."""

import io

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

Pixels = NDArray[np.uint8]


class DecodeError(ValueError):
    """Bytes that are not a whole image."""


def decode(encoded: bytes) -> Pixels:
    """Pixels (H, W, 3) uint8 RGB of a JPEG, PNG or whatever else Pillow reads.

    JPEGs go through libjpeg-turbo in its strict mode: damage is an error and not a grey area. The rest goes through
    Pillow.

    Raises:
        DecodeError: truncated, damaged or not an image.
    """
    if encoded[:2] == b"\xff\xd8":
        try:
            pixels: Pixels = simplejpeg.decode_jpeg(encoded, "RGB", strict=True)
            return pixels
        except ValueError as error:
            raise DecodeError(str(error)) from error
    try:
        with Image.open(io.BytesIO(encoded)) as image:
            return np.asarray(image.convert("RGB"))
    except UnidentifiedImageError:
        raise DecodeError("not an image") from None
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DecodeError(str(error)) from error
