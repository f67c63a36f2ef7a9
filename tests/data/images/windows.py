"""Windows of JPEGs, compared with the whole picture, and decoded by libturbojpeg and by simplejpeg."""

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from data.images.decode import DecodeError, decode, decode_window
from data.images.jpeg import Pixels
from data.images.jpeg_region import RegionDecoder
from data.images.region_frame import RegionFrame, Window
from data.images.turbojpeg import TurboJpeg
from tests.support.libturbojpeg import libturbojpeg

KINDS = ("444", "422", "440", "420", "411", "gray")


class Counting(RegionDecoder):
    """Counts the windows that it decodes, and those for which the whole picture is needed."""

    def __init__(self, library: TurboJpeg | None) -> None:
        super().__init__(library)
        self.windows = self.wholes = 0

    def __call__(self, encoded: bytes, frame: RegionFrame, window: Window) -> Pixels | None:
        pixels = super().__call__(encoded, frame, window)
        self.windows += pixels is not None
        self.wholes += pixels is None
        return pixels


def picture(height: int, width: int, seed: int = 0) -> Pixels:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def chosen(window: Window) -> Callable[[int, int], Window]:
    return lambda height, width: window


def spans(length: int) -> Iterator[slice]:
    """All of an axis."""
    return (slice(start, stop) for start in range(length) for stop in range(start + 1, length + 1))


def check_every_span(encoded: bytes, regions: RegionDecoder) -> None:
    """Every span of rows, and of columns, has the pixels of the whole."""
    whole = decode(encoded)
    height, width = whole.shape[:2]
    for window in (*((rows, slice(9, 30)) for rows in spans(height)), *((slice(3, 7), c) for c in spans(width))):
        assert np.array_equal(decode_window(encoded, chosen(window), regions), whole[window]), window


def check_agreement(encoded: bytes, start: int, windows: Sequence[Window]) -> None:
    """With one byte of its data, from `start` on, wrong, both decoders see the same pixels or refuse it alike."""
    seen = {True: 0, False: 0}
    for damaged in _flipped(encoded, start):
        for window in windows:
            found = []
            for decoder in (RegionDecoder(TurboJpeg(libturbojpeg())), RegionDecoder()):
                try:
                    found.append(decode_window(damaged, chosen(window), decoder))
                except DecodeError as error:
                    found.append(np.frombuffer(str(error).encode(), np.uint8))
            assert np.array_equal(found[0], found[1])
            seen[found[0].ndim == 3] += 1
    assert min(seen.values()) > 100


def _flipped(encoded: bytes, start: int) -> Iterator[bytes]:
    """With bits of one byte inverted, for each of them."""
    for at in range(start, len(encoded) - 2):
        for bits in (0x10, 0xFF):
            yield encoded[:at] + bytes((encoded[at] ^ bits,)) + encoded[at + 1 :]
