"""Windows of JPEGs with restart markers: the pixels of the whole picture, from the intervals that cover them alone."""

import re
from typing import Any

import numpy as np
import pytest
import simplejpeg
from hypothesis import given, settings
from hypothesis import strategies as st

from data.images.decode import DecodeError, decode, decode_window
from data.images.region_frame import region_frame
from data.images.restart_intervals import cut_out
from data.images.turbojpeg import TurboJpeg
from tests.data.images.test_jpeg_region import saved
from tests.data.images.windows import KINDS, Counting, check_agreement, check_every_span, chosen, picture
from tests.support.libturbojpeg import libturbojpeg

MARKER = re.compile(rb"\xff[\xd0-\xd7]")


def restarted(encoded: bytes, interval: int) -> bytes:
    """The JPEG with a marker after every `interval` MCUs."""
    recoded = TurboJpeg(libturbojpeg()).recoded(encoded, interval)
    assert recoded is not None
    return recoded


def divisors(encoded: bytes) -> list[int]:
    """The intervals of which a row of MCUs has a whole number."""
    frame = region_frame(encoded)
    assert frame is not None
    return [number for number in range(1, frame.grid[1] + 1) if frame.grid[1] % number == 0]


@pytest.mark.parametrize("kind", KINDS)
def test_every_span_of_rows_and_of_columns_has_the_pixels_of_the_whole(kind: str, regions: Counting) -> None:
    height, width = {"411": (19, 188), "422": (37, 83), "420": (37, 83)}.get(kind, (37, 41))
    plain = simplejpeg.encode_jpeg(picture(height, width), colorsubsampling=kind)
    assert len(divisors(plain)) == 4 or kind in ("444", "440", "gray")
    for interval in divisors(plain):
        encoded = restarted(plain, interval)
        assert np.array_equal(decode(encoded), decode(plain))
        check_every_span(encoded, regions)
    assert regions.windows > 800
    assert regions.wholes == 0


@settings(max_examples=300, deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    size=st.tuples(st.integers(1, 90), st.integers(1, 140)),
    corners=st.tuples(*[st.floats(0, 1)] * 4),
    choice=st.integers(0, 99),
    quality=st.integers(1, 100),
)
def test_windows_of_pictures_of_any_size_have_the_pixels_of_the_whole(
    kind: str, size: tuple[int, int], corners: tuple[float, float, float, float], choice: int, quality: int
) -> None:
    plain = simplejpeg.encode_jpeg(picture(*size), quality, colorsubsampling=kind)
    intervals = divisors(plain)
    encoded = restarted(plain, intervals[choice % len(intervals)])
    window = tuple(
        slice(start, start + 1 + int(share * (length - 1 - start)))
        for start, share, length in (
            (int(at * (length - 1)), share, length) for at, share, length in zip(corners[::2], corners[1::2], size, strict=True)
        )
    )  # fmt: skip
    assert len(window) == 2
    for decoder in (Counting(None), Counting(TurboJpeg(libturbojpeg()))):
        assert np.array_equal(decode_window(encoded, chosen(window), decoder), decode(plain)[window])
        assert decoder.windows == 1


def test_the_last_columns_of_chrominance_are_interpolated_as_in_the_whole(regions: Counting) -> None:
    """libjpeg repeats chrominance that is at most two pixels wide, as that of the last MCU by itself would be."""
    for width in range(97, 113):
        encoded = restarted(simplejpeg.encode_jpeg(picture(20, width), colorsubsampling="420"), 1)
        window = (slice(0, 20), slice(width - 1, width))
        assert np.array_equal(decode_window(encoded, chosen(window), regions), decode(encoded)[window])


@pytest.mark.parametrize(("option", "number"), [("restart_marker_blocks", 2), ("restart_marker_rows", 1)])
def test_markers_of_another_encoder_serve_as_well(option: str, number: int, regions: Counting) -> None:
    options: dict[str, Any] = {option: number}
    encoded = saved(**options)
    window = (slice(33, 60), slice(40, 62))
    assert np.array_equal(decode_window(encoded, chosen(window), regions), decode(encoded)[window])
    assert regions.windows == 1


def test_nothing_but_the_intervals_of_the_window_is_read() -> None:
    encoded = restarted(simplejpeg.encode_jpeg(picture(160, 160), colorsubsampling="444"), 2)
    frame = region_frame(encoded)
    assert frame
    part = cut_out(encoded, frame, (slice(41, 80), slice(33, 47)))
    assert part
    assert (part.frame.height, part.frame.width) == (40, 16)
    assert part.window == (slice(1, 40), slice(1, 15))
    assert len(part.encoded) - frame.data_at == pytest.approx((len(encoded) - frame.data_at) * 5 / 20 / 10, rel=0.1)
    markers = MARKER.findall(part.encoded[frame.data_at :])
    assert [marker[1] - 0xD0 for marker in markers] == [0, 1, 2, 3]


WINDOW = (slice(9, 23), slice(33, 47))


def blocks() -> bytes:
    """4 rows of 6 MCUs in intervals of 2."""
    return restarted(simplejpeg.encode_jpeg(picture(4, 6).repeat(8, 0).repeat(8, 1), colorsubsampling="444"), 2)


def marks(encoded: bytes) -> list[int]:
    return [match.start() for match in MARKER.finditer(encoded)]


def without(encoded: bytes, number: int) -> bytes:
    at = marks(encoded)[number]
    return encoded[:at] + encoded[at + 2 :]


def with_number(encoded: bytes, number: int, value: int) -> bytes:
    at = marks(encoded)[number] + 1
    return encoded[:at] + bytes((value,)) + encoded[at + 1 :]


@pytest.mark.parametrize(
    "damaged",
    [
        pytest.param(lambda encoded: without(encoded, 1), id="a marker is missing"),
        pytest.param(lambda encoded: without(encoded, -1), id="the last marker is missing"),
        pytest.param(lambda encoded: with_number(encoded, 2, 0xD5), id="a marker of another number"),
        pytest.param(lambda encoded: with_number(encoded, 2, 0xD9), id="the end in between"),
        pytest.param(lambda encoded: with_number(encoded, 2, 0xC4), id="another marker in between"),
        pytest.param(lambda encoded: encoded[:-2], id="no end"),
        pytest.param(lambda encoded: encoded[: marks(encoded)[4] + 3], id="cut off"),
    ],
)
def test_markers_that_are_not_those_of_the_header_are_damage(damaged: object, regions: Counting) -> None:
    assert callable(damaged)
    with pytest.raises(DecodeError, match="damaged"):
        decode_window(damaged(blocks()), chosen(WINDOW), regions)
    assert regions.windows == 0
    assert regions.wholes == 1


def test_garbled_codes_beside_the_window_are_not_read(regions: Counting) -> None:
    encoded = blocks()
    at = marks(encoded)[3] + 2  # the second interval of the second row; the window is in the third ones
    garbled = encoded[:at] + encoded[marks(encoded)[4] :]
    with pytest.raises(DecodeError, match="premature end of data"):
        decode(garbled)
    assert np.array_equal(decode_window(garbled, chosen(WINDOW), regions), decode(encoded)[WINDOW])


@pytest.mark.parametrize("kind", ["444", "420", "gray"])
def test_both_decoders_agree_on_what_is_damaged_and_on_garbled_pixels(kind: str) -> None:
    pixels = picture(4, 3).repeat(16, 0).repeat(15, 1)
    encoded = restarted(simplejpeg.encode_jpeg(pixels, colorsubsampling=kind), 1)
    frame = region_frame(encoded)
    assert frame
    check_agreement(encoded, frame.data_at, [
        (slice(0, 14), slice(3, 40)), (slice(17, 31), slice(30, 44)), (slice(50, 64), slice(9, 45)),
    ])  # fmt: skip
