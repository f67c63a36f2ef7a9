"""Restart markers that a build writes: the same pixels, and crops that are decoded from a part of the data."""

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data.accounting import LeftOut
from data.building import restart_markers
from data.building.build import build_shards
from data.building.build_record import RECORD_NAME
from data.building.conversion import CheckedImage, Conversion, Kind, check_image
from data.building.restart_markers import restart_interval, with_restart_markers
from data.errors import DataError
from data.images.decode import decode
from data.images.region_frame import region_frame
from data.images.turbojpeg import TurboJpeg
from tests.data.building.test_jpeg_encoding import photograph, saved, stored
from tests.support.libturbojpeg import libturbojpeg

MARKED = Conversion(restart_markers=True)


@pytest.fixture(autouse=True)
def library() -> None:
    libturbojpeg()


def test_a_row_has_about_ten_intervals_or_is_one() -> None:
    assert [restart_interval(mcus) for mcus in (1, 3, 4, 12, 20, 32, 47, 63, 100, 10_000)] == [
        1, 3, 1, 1, 2, 4, 47, 7, 10, 1000,
    ]  # fmt: skip
    for mcus in range(1, 300):
        intervals = mcus / restart_interval(mcus)
        assert intervals == 1 or 4 <= intervals <= 16


@pytest.mark.parametrize(
    ("mode", "options"),
    [
        ("RGB", {"subsampling": "4:4:4"}),
        ("RGB", {"subsampling": "4:2:0", "optimize": True}),
        ("RGB", {"subsampling": "4:2:2", "quality": 100}),
        ("L", {}),
        ("RGB", {"progressive": True}),
        ("RGB", {"restart_marker_blocks": 7}),
    ],
    ids=str,
)
def test_a_jpeg_is_given_markers_and_keeps_its_pixels_and_metadata(mode: str, options: dict[str, Any]) -> None:
    exif = Image.Exif()
    exif[0x0110] = "a camera"
    encoded = saved(
        photograph(160, 90).convert(mode), "JPEG", exif=exif, icc_profile=b"a profile", comment=b"words", **options
    )
    checked = check_image(encoded, MARKED)
    assert checked.kind & Kind.MARKED
    frame = region_frame(checked.encoded)
    assert frame
    assert 4 <= frame.grid[1] / frame.interval <= 16
    assert np.array_equal(decode(checked.encoded), decode(encoded))
    with Image.open(io.BytesIO(checked.encoded)) as image:
        assert image.getexif()[0x0110] == "a camera"
        assert (image.info["icc_profile"], image.info["comment"]) == (b"a profile", b"words")
    again = check_image(checked.encoded, MARKED)
    assert again.encoded == checked.encoded
    assert not again.kind & Kind.MARKED


@pytest.mark.parametrize("kind", ["CMYK", "PNG"])
def test_images_whose_crops_are_not_decoded_alone_keep_their_bytes(kind: str) -> None:
    picture = photograph()
    encoded = saved(picture) if kind == "PNG" else saved(picture.convert("CMYK"), "JPEG")
    plain = check_image(encoded, Conversion())
    assert check_image(encoded, MARKED) == replace(plain, kind=plain.kind | Kind.UNMARKED)


def test_a_jpeg_of_which_the_library_makes_other_pixels_keeps_its_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    encoded = saved(photograph(), "JPEG")
    assert with_restart_markers(encoded, decode(encoded))
    assert with_restart_markers(encoded, 255 - decode(encoded)) is None
    monkeypatch.setattr(restart_markers, "_has_pixels", lambda *_: False)
    assert check_image(encoded, MARKED) == CheckedImage(encoded, "jpg", Kind.UNMARKED)


def test_images_that_are_encoded_again_are_marked_as_well() -> None:
    conversion = Conversion(short_side=32, quality=90, subsampling="4:2:0", recompress=True)
    for encoded in (saved(photograph(120, 90)), saved(photograph(120, 90), "JPEG", quality=100)):
        plain = check_image(encoded, conversion)
        marked = check_image(encoded, replace(conversion, restart_markers=True))
        assert marked.kind == plain.kind | Kind.MARKED
        assert np.array_equal(decode(marked.encoded), decode(plain.encoded))


def test_a_build_says_how_many_images_it_has_marked(tmp_path: Path) -> None:
    folder = tmp_path / "images" / "one"
    folder.mkdir(parents=True)
    for number in range(3):
        (folder / f"{number}.jpg").write_bytes(saved(photograph(seed=number), "JPEG"))
    (folder / "drawing.png").write_bytes(saved(photograph()))
    report = build_shards(tmp_path / "images", tmp_path / "out", restart_markers=True)
    frames = {key: region_frame(image) for key, image in stored(report).items()}
    assert sorted(key for key, frame in frames.items() if frame and frame.interval) == ["one/0", "one/1", "one/2"]
    assert (report.marked, report.images, report.encoded_again) == (3, 4, 0)
    assert report.unmarked == LeftOut(1, ["one/drawing.png"])
    written = json.loads((tmp_path / "out" / "report.json").read_text())
    assert (written["marked"], written["unmarked"]) == (3, {"count": 1, "first": ["one/drawing.png"]})
    assert json.loads((tmp_path / "out" / RECORD_NAME).read_text())["options"]["restart_markers"] is True

    again = build_shards(tmp_path / "out", tmp_path / "again", restart_markers=True)
    assert (again.marked, again.unmarked.count) == (0, 1)
    plain = build_shards(tmp_path / "images", tmp_path / "plain")
    assert (plain.marked, plain.unmarked.count) == (0, 0)
    for key, image in stored(plain).items():
        assert np.array_equal(decode(image), decode(stored(report)[key]))


class Version30(TurboJpeg):
    """Ignores the interval, as version 3.0 does, which is not on this machine."""

    def recoded(self, encoded: bytes, interval: int) -> bytes | None:
        return super().recoded(encoded, 0)


@pytest.mark.parametrize("installed", [False, True], ids=["no library", "version 3.0"])
def test_without_a_library_that_writes_markers_a_build_is_refused_before_it_begins(
    installed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "images" / "one").mkdir(parents=True)
    (tmp_path / "images" / "one" / "1.jpg").write_bytes(saved(photograph(), "JPEG"))
    path = libturbojpeg()
    monkeypatch.setattr(restart_markers, "find_turbojpeg", lambda _: Version30(path) if installed else None)
    restart_markers._library.cache_clear()
    found = f"and {path} is older" if installed else "which is not installed"
    with pytest.raises(DataError) as refused:
        build_shards(tmp_path / "images", tmp_path / "out", restart_markers=True)
    assert str(refused.value) == (
        f"restart markers are written by libturbojpeg from version 3.1 on, {found}: pip install pylibjxl, or name "
        "another libturbojpeg.so in COATNET_LIBTURBOJPEG"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["images"]
