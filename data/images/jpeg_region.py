"""The window of a JPEG that a crop takes, to the same bits as of the whole picture, without what lies below being read.

Blocks are coded one after another, so that everything above a window must be read, and nothing below. That holds for
one scan with all components, which nearly all photographs have; others are decoded whole. With restart markers, what is
above and beside the window is left out as well, see `restart_intervals.py`.

libturbojpeg 3 computes the pixels of the window alone. Where it is missing, simplejpeg decodes all rows down to the end
of the window, from a header that says that the picture ends there. Both read the same blocks and take every warning
for an error, so that they agree on what is damaged as well: which one is used is no part of a run's identity.

Damage below the window goes unseen, and so do most garbled codes above its end, which only the end of the data would
show. So it is for pictures that were decoded whole before.
"""

import os
from collections.abc import Mapping

import numpy as np
import simplejpeg

from data.errors import DataError
from data.images.jpeg import Pixels
from data.images.region_frame import RegionFrame, Window, region_frame
from data.images.restart_intervals import cut_out
from data.images.turbojpeg import VARIABLE, TurboJpeg, find_turbojpeg

# What libjpeg says at the end of rows whose header leaves out the rest.
_REST = "extraneous bytes before marker 0xd9"


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

        That is so for every warning about the data that is read.
        """
        if frame.interval:
            part = cut_out(encoded, frame, window)
            if part is None:
                return None
            encoded, frame, window = part
        rows, columns = window
        stop = frame.rows_read(rows.stop)
        if self._library is None:
            above = _above(encoded, frame, stop)
            return None if above is None else above[rows, columns]
        # One more MCU on each side, since chrominance is interpolated from its neighbours.
        _, unit = frame.mcu
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


def _above(encoded: bytes, frame: RegionFrame, stop: int) -> Pixels | None:
    """The rows up to `stop`, between two MCUs or the last one."""
    at = frame.height_at
    pixels = np.empty((stop, frame.width, 3), np.uint8)
    try:
        simplejpeg.decode_jpeg(encoded[:at] + stop.to_bytes(2) + encoded[at + 2 :], "RGB", buffer=pixels.reshape(-1))
    except ValueError as error:
        # Only the first warning is reported: there is none about the rows.
        return pixels if stop < frame.height and _REST in str(error) else None
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
