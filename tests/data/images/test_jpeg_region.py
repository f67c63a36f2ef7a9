"""Windows of JPEGs: the pixels of the whole picture to the bit, by libturbojpeg and by simplejpeg; damage above is found."""

import io
from typing import Any

import numpy as np
import pytest
import simplejpeg
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from data.errors import DataError
from data.images import jpeg_region
from data.images.decode import MAX_PIXELS, DecodeError, decode, decode_window
from data.images.jpeg import Pixels
from data.images.jpeg_region import RegionDecoder, find_region_decoder
from data.images.region_frame import RegionFrame, region_frame
from data.images.turbojpeg import VARIABLE, TurboJpeg
from tests.data.images.test_jpeg import BY_CJPEG, DAMAGED, FOUR_TO_ONE, HARMLESS, jpeg, padded, sampled
from tests.data.images.windows import KINDS, Counting, check_agreement, check_every_span, chosen, picture
from tests.support.libturbojpeg import libturbojpeg

SCAN, EOI = b"\xff\xda", b"\xff\xd9"


@pytest.mark.parametrize("kind", KINDS)
def test_every_span_of_rows_and_of_columns_has_the_pixels_of_the_whole(kind: str, regions: Counting) -> None:
    height, width = (37, 41) if kind != "411" else (19, 77)
    check_every_span(simplejpeg.encode_jpeg(picture(height, width), colorsubsampling=kind), regions)
    assert regions.windows > 800


# No deadline: how long a machine takes is not what is tested.
@settings(max_examples=300, deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    size=st.tuples(st.integers(1, 90), st.integers(1, 90)),
    corners=st.tuples(*[st.floats(0, 1)] * 4),
    quality=st.integers(1, 100),
    seed=st.integers(0, 99),
)
def test_windows_of_pictures_of_any_size_have_the_pixels_of_the_whole(
    kind: str, size: tuple[int, int], corners: tuple[float, float, float, float], quality: int, seed: int
) -> None:
    encoded = simplejpeg.encode_jpeg(picture(*size, seed), quality, colorsubsampling=kind)
    rows, columns = (
        slice(min(int(a * length), int(b * length), length - 1), max(int(a * length), int(b * length), 1))
        for a, b, length in zip(corners[::2], corners[1::2], size, strict=True)
    )
    rows, columns = (slice(s.start, max(s.stop, s.start + 1)) for s in (rows, columns))
    for regions in (RegionDecoder(), RegionDecoder(TurboJpeg(libturbojpeg()))):
        pixels = decode_window(encoded, chosen((rows, columns)), regions)
        assert np.array_equal(pixels, decode(encoded)[rows, columns])


def saved(mode: str = "RGB", kind: str = "JPEG", **options: Any) -> bytes:
    file = io.BytesIO()
    Image.fromarray(picture(70, 90)).convert(mode).save(file, kind, **options)
    return file.getvalue()


def test_metadata_thumbnails_and_bytes_behind_the_end_do_not_matter(regions: Counting) -> None:
    thumbnail = saved(quality=10)
    encoded = saved(exif=b"Exif\0\0" + thumbnail, comment=b"\xff\xda\xff\xd9") + thumbnail
    window = (slice(3, 30), slice(40, 88))
    assert np.array_equal(decode_window(encoded, chosen(window), regions), decode(encoded)[window])
    assert regions.windows == 1


def by_header(encoded: bytes, offset: int, value: int) -> bytes:
    """With another byte in the frame header."""
    at = encoded.index(b"\xff\xc0") + offset
    return encoded[:at] + bytes((value,)) + encoded[at + 1 :]


WHOLE = {
    "progressive": saved(progressive=True),
    "restart markers across rows": saved(restart_marker_blocks=4),
    "CMYK": saved("CMYK"),
    "4:4:1": sampled(FOUR_TO_ONE, 0x14, 0x11, 0x11),
    "grey of unusual factors": by_header(saved("L"), 11, 0x22),
    **BY_CJPEG,
    "PNG": saved(kind="PNG"),
}


@pytest.mark.parametrize("name", WHOLE)
def test_other_kinds_are_decoded_whole(name: str, regions: Counting) -> None:
    window = (slice(2, 20), slice(5, 22))
    assert np.array_equal(decode_window(WHOLE[name], chosen(window), regions), decode(WHOLE[name])[window])
    assert regions.windows == regions.wholes == 0


@pytest.mark.parametrize("name", HARMLESS)
def test_harmless_oddities_are_harmless_in_windows(name: str, regions: Counting) -> None:
    window = (slice(8, 41), slice(20, 66))
    assert np.array_equal(decode_window(HARMLESS[name], chosen(window), regions), decode(HARMLESS[name])[window])


@pytest.mark.parametrize("name", DAMAGED)
def test_damage_before_the_end_of_the_window_is_damage(name: str, regions: Counting) -> None:
    encoded, reason = DAMAGED[name]
    with pytest.raises(DecodeError, match=f"^damaged: .*{reason}"):
        decode_window(encoded, lambda height, width: (slice(0, height - 20), slice(0, width)), regions)


TALL: bytes = simplejpeg.encode_jpeg(picture(10, 6).repeat(16, 0).repeat(12, 1))
TOP = (slice(5, 40), slice(10, 60))


def at_share(share: float) -> int:
    """A place in the data of `TALL`."""
    start = TALL.index(SCAN) + 14
    return start + int(share * (len(TALL) - 2 - start))


@pytest.mark.parametrize("share", [0.1, 0.6, 0.99])
def test_a_truncated_file_is_refused_wherever_the_window_is(share: float, regions: Counting) -> None:
    with pytest.raises(DecodeError, match="Premature end of JPEG file"):
        decode_window(TALL[: at_share(share)], chosen(TOP), regions)


def test_a_marker_among_the_data_is_damage_even_below_the_window(regions: Counting) -> None:
    at = at_share(0.8)
    with pytest.raises(DecodeError):
        decode_window(TALL[:at] + b"\xff\xd4" + TALL[at + 2 :], chosen(TOP), regions)
    assert regions.windows == regions.wholes == 0


def test_codes_that_are_garbled_below_the_window_are_not_read(regions: Counting) -> None:
    at = at_share(0.8)
    garbled = TALL[:at] + TALL[at + 30 :]
    with pytest.raises(DecodeError, match="premature end of data"):
        decode(garbled)
    assert np.array_equal(decode_window(garbled, chosen(TOP), regions), decode(TALL)[TOP])
    with pytest.raises(DecodeError, match="premature end of data"):
        decode_window(garbled, chosen(TOP))


@pytest.mark.parametrize("kind", ["444", "420", "gray"])
def test_both_decoders_agree_on_what_is_damaged_and_on_garbled_pixels(kind: str) -> None:
    encoded = simplejpeg.encode_jpeg(picture(4, 3).repeat(16, 0).repeat(15, 1), colorsubsampling=kind)
    check_agreement(encoded, encoded.index(SCAN) + 14, [
        (slice(0, 14), slice(3, 40)), (slice(17, 31), slice(30, 44)), (slice(5, 46), slice(0, 22)), (slice(50, 64), slice(9, 45)),
    ])  # fmt: skip


def test_images_above_the_pixel_limit_are_refused_by_their_header(regions: Counting) -> None:
    at = TALL.index(b"\xff\xc0") + 5
    bomb = TALL[:at] + b"\xff\x00\xff\x00" + TALL[at + 4 :]
    with pytest.raises(DecodeError, match=f"exceed the limit of {MAX_PIXELS:,}"):
        decode_window(bomb, chosen(TOP), regions)


@settings(max_examples=400, deadline=None)
@given(
    kind=st.sampled_from([*KINDS, "padded"]),
    places=st.lists(st.integers(0, 700) | st.integers(0, 10**6), min_size=1, max_size=4),
    values=st.binary(min_size=4, max_size=4),
    cut=st.none() | st.integers(1, 10**6),
)
def test_damaged_bytes_give_the_pixels_of_the_whole_or_a_decode_error(
    kind: str, places: list[int], values: bytes, cut: int | None
) -> None:
    data = bytearray(padded(jpeg(), b"\0" * 9) if kind == "padded" else SMALL[kind])
    for place, value in zip(places, values, strict=False):
        data[place % len(data)] = value
    encoded = bytes(data[:cut])
    try:
        whole = decode(encoded)
    except DecodeError:
        whole = None
    for regions in (RegionDecoder(), RegionDecoder(TurboJpeg(libturbojpeg()))):
        try:
            window = decode_window(encoded, lambda h, w: (slice(0, -(-h // 3)), slice(w // 4, -(-w // 2))), regions)
        except DecodeError:
            assert whole is None
            continue
        if whole is not None:
            height, width = whole.shape[:2]
            assert np.array_equal(window, whole[: -(-height // 3), width // 4 : -(-width // 2)])


SMALL = {kind: simplejpeg.encode_jpeg(picture(40, 52), colorsubsampling=kind) for kind in KINDS}


def test_a_frame_is_read_from_the_header() -> None:
    data_at = SMALL["420"].index(SCAN) + 14
    assert region_frame(SMALL["420"]) == RegionFrame(40, 52, 2, 2, SMALL["420"].index(b"\xff\xc0") + 5, data_at)
    assert region_frame(b"") is region_frame(b"\xff\xd8") is region_frame(SMALL["420"][:-2]) is None


def test_the_environment_names_the_library_that_is_used() -> None:
    path = libturbojpeg()
    assert str(find_region_decoder({VARIABLE: path})) == f"libturbojpeg ({path}), the crop alone"
    assert str(find_region_decoder({VARIABLE: ""})) == "simplejpeg, down to the end of the crop"


class OffByOne(TurboJpeg):
    def region(self, encoded: bytes, left: int, top: int, width: int, height: int) -> Pixels | None:
        pixels = super().region(encoded, left, top, width, height)
        return None if pixels is None else pixels + np.uint8(left > 0)


def test_a_library_with_other_pixels_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    path = libturbojpeg()
    monkeypatch.setattr(jpeg_region, "find_turbojpeg", lambda environment: OffByOne(path))
    assert str(find_region_decoder({})).startswith("simplejpeg")
    with pytest.raises(DataError, match=f"^{VARIABLE}={path}: its pixels differ from those of simplejpeg; "):
        find_region_decoder({VARIABLE: path})
