"""Quality and subsampling of the JPEGs of a build, and images that are encoded again only to become smaller."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import simplejpeg
from PIL import Image

from data.building.build import build_shards
from data.building.build_record import RECORD_NAME
from data.building.conversion import Conversion, Kind, check_image
from data.building.jpeg_encoding import Subsampling
from data.building.merge import BuildReport
from data.errors import DataError
from data.images.decode import Pixels, decode
from data.shard import Shard

LAYERS = {
    "4:4:4": [(1, 1, 1, 0), (2, 1, 1, 1), (3, 1, 1, 1)],
    "4:2:2": [(1, 2, 1, 0), (2, 1, 1, 1), (3, 1, 1, 1)],
    "4:2:0": [(1, 2, 2, 0), (2, 1, 1, 1), (3, 1, 1, 1)],
}
"""Of each component its number, its sampling factors and its quantization table."""


def photograph(width: int = 60, height: int = 45, seed: int = 0) -> Image.Image:
    """Soft shapes with noise, so that quality and subsampling make a difference."""
    rng = np.random.default_rng(seed)
    shapes = Image.fromarray(rng.integers(0, 256, (5, 5, 3), np.uint8)).resize(
        (width, height), Image.Resampling.BICUBIC
    )
    noise = rng.normal(0, 12, (height, width, 3))
    return Image.fromarray((np.asarray(shapes) + noise).clip(0, 255).astype(np.uint8))


def saved(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def scaled_tables(quality: int) -> dict[int, list[int]]:
    """Annex K's tables at a quality of libjpeg, which scales them; at 50 they are as printed."""
    printed: dict[int, list[int]] = Image.open(io.BytesIO(saved(photograph(), "JPEG", quality=50))).quantization  # type: ignore[attr-defined]
    assert printed[0][:4] == [16, 11, 10, 16]
    percent = 5000 // quality if quality < 50 else 200 - 2 * quality
    return {number: [min(max((step * percent + 50) // 100, 1), 255) for step in t] for number, t in printed.items()}


@pytest.mark.parametrize("subsampling", LAYERS)
@pytest.mark.parametrize("quality", [1, 30, 85, 90, 100])
def test_a_header_has_the_sampling_factors_and_tables_that_were_asked_for(
    quality: int, subsampling: Subsampling
) -> None:
    conversion = Conversion(convert=True, quality=quality, subsampling=subsampling)
    with Image.open(io.BytesIO(check_image(saved(photograph()), conversion).encoded)) as image:
        assert image.layer == LAYERS[subsampling]  # type: ignore[attr-defined]
        assert image.quantization == scaled_tables(quality)  # type: ignore[attr-defined]


def encoded(pixels: Pixels, quality: int, subsampling: str) -> bytes:
    jpeg: bytes = simplejpeg.encode_jpeg(
        np.ascontiguousarray(pixels), quality=quality, colorspace="RGB", colorsubsampling=subsampling, fastdct=False
    )
    return jpeg


@pytest.mark.parametrize("subsampling", LAYERS)
def test_pixels_are_those_that_libjpeg_encodes(subsampling: Subsampling) -> None:
    source = photograph()
    small = source.resize((40, 30), Image.Resampling.LANCZOS)
    for quality in (85, 97):
        checked = check_image(saved(source), Conversion(short_side=30, quality=quality, subsampling=subsampling))
        assert checked.encoded == encoded(np.asarray(small), quality, subsampling.replace(":", ""))
    # From quality 96 on, Pillow's cosine transform is the same.
    by_pillow = saved(small, "JPEG", quality=97, subsampling=subsampling)
    assert np.array_equal(decode(checked.encoded), decode(by_pillow))


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    """Class folders with a large JPEG, a small one, and a PNG, at qualities between 98 and 40."""
    folder = tmp_path / "images" / "one"
    folder.mkdir(parents=True)
    (folder / "large.jpg").write_bytes(saved(photograph(80, 60, 1), "JPEG", quality=98, subsampling="4:4:4"))
    (folder / "small.jpg").write_bytes(saved(photograph(40, 30, 2), "JPEG", quality=98, subsampling="4:4:4"))
    (folder / "poor.jpg").write_bytes(saved(photograph(40, 30, 3), "JPEG", quality=40, subsampling="4:2:0"))
    (folder / "drawing.png").write_bytes(saved(photograph(40, 30, 4)))
    return tmp_path / "images"


def stored(report: BuildReport) -> dict[str, bytes]:
    """The images of a build by key."""
    (index,) = report.indexes.values()
    (entry,) = index.shards
    shard = Shard(Path(index.location(0)), index.image_fields, index.label.field, entry.samples)
    return {shard.key(place): shard.read(place).image for place in range(entry.samples)}


def test_a_build_without_the_options_is_what_it_was(mixed: Path, tmp_path: Path) -> None:
    files = {path.stem: path.read_bytes() for path in mixed.glob("one/*")}
    small = Image.fromarray(decode(files["large"])).resize((53, 40), Image.Resampling.LANCZOS)
    report = build_shards(mixed, tmp_path / "out", convert=True, short_side=40)
    assert {key.rpartition("/")[2]: image for key, image in stored(report).items()} == files | {
        "large": encoded(np.asarray(small), 95, "444"),
        "drawing": encoded(decode(files["drawing"]), 95, "444"),
    }
    assert list(json.loads((tmp_path / "out" / RECORD_NAME).read_text())["options"]) == [
        "seed", "convert", "short_side", "quality", "within", "nested", "leave_out", "samples_per_shard", "shard_bytes",
        "validation_per_class", "validation_fraction", "classes", "skip_broken", "labels",
    ]  # fmt: skip


def test_images_that_need_no_change_are_encoded_again_only_on_request(mixed: Path, tmp_path: Path) -> None:
    files = {path.stem: path.read_bytes() for path in mixed.glob("one/*")}
    options: dict[str, Any] = {"short_side": 40, "quality": 90, "subsampling": "4:2:0"}
    report = build_shards(mixed, tmp_path / "some", **options)
    kept = {key.rpartition("/")[2] for key, image in stored(report).items() if image in files.values()}
    assert (kept, report.encoded_again, report.shrunk) == ({"small", "poor", "drawing"}, 1, 1)

    report = build_shards(mixed, tmp_path / "all", **options, recompress=True)
    images = {key.rpartition("/")[2]: image for key, image in stored(report).items()}
    assert {key for key, image in images.items() if image in files.values()} == {"poor"}  # it would become larger
    assert (report.encoded_again, report.shrunk, report.images) == (3, 1, 4)
    for name in ("small", "drawing"):
        assert images[name] == encoded(decode(files[name]), 90, "420")
        assert len(images[name]) < len(files[name])
    assert json.loads((tmp_path / "all" / "report.json").read_text())["encoded_again"] == 3
    recorded = json.loads((tmp_path / "all" / RECORD_NAME).read_text())["options"]
    assert (recorded["quality"], recorded["subsampling"], recorded["recompress"]) == (90, "4:2:0", True)


def test_a_rotated_image_is_turned_by_recompress_whether_it_becomes_smaller_or_not() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    for quality in (30, 98):
        encoded = saved(photograph(60, 45), "JPEG", quality=quality, exif=exif)
        checked = check_image(encoded, Conversion(recompress=True))
        assert decode(checked.encoded).shape == (60, 45, 3)
        assert checked.kind == Kind.EXIF_ROTATED | Kind.ENCODED_AGAIN


@pytest.mark.parametrize(
    ("options", "remark"),
    [
        (
            {"short_side": 400, "quality": 90, "subsampling": "4:2:0"},
            "no image was encoded again, so that nothing follows from --short-side 400, --quality 90, --subsampling "
            "4:2:0; --recompress encodes images that need no other change",
        ),
        (
            {"recompress": True, "quality": 100},
            "no image was encoded again, so that nothing follows from --recompress, --quality 100",
        ),
        ({"short_side": 40}, None),
        ({}, None),
    ],
)
def test_options_without_effect_are_remarked_on(
    options: dict[str, Any], remark: str | None, mixed: Path, tmp_path: Path
) -> None:
    (mixed / "one" / "drawing.png").unlink()
    report = build_shards(mixed, tmp_path / "out", **options)
    remarks = [found.text for found in report.accounting.remarks if found.kind == "nothing_encoded"]
    assert remarks == ([] if remark is None else [remark])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"quality": 90}, r"^quality 90 and subsampling 4:4:4 are for images that are encoded again, and none is"),
        ({"subsampling": "4:2:0"}, r"^quality 95 and subsampling 4:2:0 are .* set one of these, or leave"),
        ({"convert": True, "subsampling": "4:1:1"}, r"^subsampling '4:1:1'; it must be one of 4:4:4, 4:2:2, 4:2:0$"),
        ({"convert": True, "quality": 101}, r"^quality 101; it must be from 1 to 100$"),
        ({"convert": True, "quality": 0}, r"^quality 0; it must be from 1 to 100$"),
        ({"short_side": 0}, r"^a short side of 0 pixels; it must be at least 1$"),
    ],
)
def test_options_that_cannot_be_are_refused_before_anything_is_read(
    options: dict[str, Any], message: str, mixed: Path, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=message):
        build_shards(mixed, tmp_path / "out", **options)
    assert list(tmp_path.iterdir()) == [mixed]
