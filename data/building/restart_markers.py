"""Restart markers in JPEGs without a loss, so that training decodes nothing but the intervals of a crop."""

import os
from functools import cache

import numpy as np
import simplejpeg

from data.errors import DataError
from data.images.decode import DecodeError, Pixels, decode
from data.images.region_frame import RegionFrame, region_frame
from data.images.turbojpeg import VARIABLE, TurboJpeg, find_turbojpeg

_WANTED, _FEWEST, _MOST = 10, 4, 16
"""Intervals of a row of MCUs: each takes four bytes or so, and fewer fit a crop less closely."""


def restart_interval(mcus: int) -> int:
    """The MCUs of an interval for rows of `mcus`.

    A part of the row that makes about ten intervals, or the whole row if none makes from 4 to 16: a crop consists of
    whole intervals of the same length.
    """
    parts = [mcus // count for count in range(_FEWEST, _MOST + 1) if mcus % count == 0]
    return min(parts, key=lambda part: abs(mcus // part - _WANTED), default=mcus)


def with_restart_markers(encoded: bytes, pixels: Pixels) -> bytes | None:
    """The same image with restart markers: itself if it has suitable ones, otherwise a JPEG with the same `pixels`.

    None for other formats, for kinds of JPEGs whose crops are not decoded alone, such as CMYK, and for those that
    libturbojpeg warns of. Of a progressive JPEG it makes a sequential one.

    Raises:
        DataError: there is no libturbojpeg that writes them.
    """
    library = _library()
    plain = region_frame(encoded)
    if plain is None:
        sequential = library.recoded(encoded, 0)
        plain = region_frame(sequential) if sequential else None
    if plain is None:
        return None
    if _is_divided(plain):
        return encoded
    marked = library.recoded(encoded, restart_interval(plain.grid[1]))
    return marked if marked and _has_pixels(marked, pixels) else None


def require_libturbojpeg() -> None:
    """
    Raises:
        DataError: there is no libturbojpeg that writes restart markers.
    """
    _library()


def _is_divided(frame: RegionFrame) -> bool:
    mcus = frame.grid[1]
    return frame.interval > 0 and mcus // frame.interval >= mcus // restart_interval(mcus)


def _has_pixels(encoded: bytes, pixels: Pixels) -> bool:
    """Whether crops of the JPEG are decoded alone, and it has these pixels (H, W, 3)."""
    frame = region_frame(encoded)
    try:
        return frame is not None and frame.interval > 0 and np.array_equal(decode(encoded), pixels)
    except DecodeError:
        return False


@cache
def _library() -> TurboJpeg:
    library = find_turbojpeg(os.environ)
    found = "which is not installed" if library is None else f"and {library.path} is older"
    if library is None or not _writes_markers(library):
        raise DataError(
            f"restart markers are written by libturbojpeg from version 3.1 on, {found}: pip install pylibjxl, or name "
            f"another libturbojpeg.so in {VARIABLE}"
        )
    return library


def _writes_markers(library: TurboJpeg) -> bool:
    """Version 3.0 ignores the interval."""
    marked = library.recoded(simplejpeg.encode_jpeg(np.zeros((8, 16, 1), np.uint8), colorspace="GRAY"), 1)
    frame = region_frame(marked) if marked else None
    return frame is not None and frame.interval == 1
