"""`coatnet shards build` and `merge` on the command line."""

import json
from pathlib import Path

import pytest
from PIL import Image

from data.index import read_index
from jobs.commands.shards.build import _bytes
from pipeline.errors import ConfigError
from tests.conftest import write_pictures
from tests.support.command import coatnet
from tests.support.libturbojpeg import libturbojpeg


@pytest.mark.slow
def test_images_that_are_not_rgb_jpegs_are_named_and_converted_on_request(tmp_path: Path) -> None:
    source = write_pictures(tmp_path / "source", per_class=3)
    with Image.open(source / "dark" / "0001.jpg") as image:
        image.convert("L").save(source / "dark" / "0001.jpg")
        image.save(source / "dark" / "drawing.JPEG", "PNG")
    done = coatnet("shards", "build", "source", "plain", "--validation-fraction", "0.3", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "1 image is PNG (dark/drawing.JPEG): 1 stored unchanged (--convert converts them)",
        "1 image is grey (dark/0001.jpg): 1 stored unchanged (--convert converts them)",
        "10 files found, all of them taken: 10 images",
        "plain/train: 7 images of 3 classes in 1 shard, 0.0 MB",
        "plain/validation: 3 images of 3 classes in 1 shard, 0.0 MB",
    ]
    assert read_index(tmp_path / "plain" / "train").classes == ("bright", "dark", "striped")

    done = coatnet("shards", "build", "source", "small", "--convert", "--short-side", "16", folder=tmp_path)
    assert done.stdout.splitlines() == [
        "1 image is PNG (dark/drawing.JPEG): 1 converted to upright RGB JPEGs",
        "1 image is grey (dark/0001.jpg): 1 converted to upright RGB JPEGs",
        "10 images shrunk to a short side of 16 pixels",
        "10 of 10 images encoded again, as JPEGs of quality 95 and 4:4:4",
        "10 files found, all of them taken: 10 images",
        "small: 10 images of 3 classes in 1 shard, 0.0 MB",
    ]
    assert read_index(tmp_path / "small").image_fields == ("jpg",)


@pytest.mark.slow
def test_how_many_images_were_encoded_again_is_said(tmp_path: Path) -> None:
    write_pictures(tmp_path / "source", per_class=1)
    Image.new("RGB", (40, 40)).save(tmp_path / "source" / "dark" / "large.jpg")
    options = ["--short-side", "24", "--quality", "60", "--subsampling", "4:2:0"]
    done = coatnet("shards", "build", "source", "some", *options, folder=tmp_path)
    assert done.stdout.splitlines()[:2] == [
        "1 image shrunk to a short side of 24 pixels",
        "1 of 4 images encoded again, as JPEGs of quality 60 and 4:2:0; the others need no change and keep their bytes "
        "(--recompress encodes them as well)",
    ]
    done = coatnet("shards", "build", "source", "all", *options, "--recompress", folder=tmp_path)
    assert "4 of 4 images encoded again, as JPEGs of quality 60 and 4:2:0" in done.stdout.splitlines()
    libturbojpeg()
    done = coatnet("shards", "build", "source", "marked", "--restart-markers", folder=tmp_path)
    assert done.stdout.splitlines()[0] == "4 of 4 images given restart markers, without a loss"
    Image.new("RGB", (40, 40)).save(tmp_path / "source" / "dark" / "drawing.png")
    done = coatnet("shards", "build", "source", "mixed", "--restart-markers", folder=tmp_path)
    assert done.stdout.splitlines()[1] == (
        "4 of 5 images given restart markers, without a loss; 1 cannot have them, being no JPEGs, of a kind whose crops "
        "are not decoded alone, or ones that libturbojpeg warns of (dark/drawing.png)"
    )
    done = coatnet("shards", "build", "marked", "again", "--restart-markers", folder=tmp_path)
    assert done.stdout.splitlines()[0] == "0 of 4 images given restart markers, without a loss; 4 had them already"
    done = coatnet("shards", "build", "some", "none", "--short-side", "24", "--subsampling", "4:2:0", folder=tmp_path)
    assert (
        "no image was encoded again, so that nothing follows from --short-side 24, --subsampling 4:2:0" in done.stdout
    )

    refused = coatnet("shards", "build", "source", "out", "--subsampling", "4:2:0", folder=tmp_path)
    assert (refused.returncode, (tmp_path / "out").exists()) == (78, False)
    assert "quality 95 and subsampling 4:2:0 are for images that are encoded again, and none is" in refused.stderr
    refused = coatnet("shards", "build", "source", "out", "--subsampling", "4:1:1", folder=tmp_path)
    assert refused.returncode != 0
    assert all(f"'{known}'" in refused.stderr for known in ("4:4:4", "4:2:2", "4:2:0"))


@pytest.mark.slow
def test_json_is_the_report_and_nothing_else(tmp_path: Path) -> None:
    source = write_pictures(tmp_path / "source", per_class=2)
    (source / "dark" / "notes.txt").write_text("words")
    done = coatnet("shards", "build", "source", "out", "--json", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert document == json.loads((tmp_path / "out" / "report.json").read_text())
    assert (document["found"], document["taken"]) == (7, {"images": 6})
    assert document["left_out"] == {"not an image (.txt)": {"count": 1, "first": ["dark/notes.txt"]}}
    assert document["datasets"][0]["images"] == 6

    done = coatnet("shards", "build", "source", "again", "--leave-out", "dark", folder=tmp_path)
    assert done.stdout.splitlines() == [
        "7 files found",
        "4 taken: images",
        "3 left out: --leave-out dark (dark/0000.jpg, dark/0001.jpg, dark/notes.txt)",
        "again: 4 images of 2 classes in 1 shard, 0.0 MB",
    ]


@pytest.mark.slow
def test_a_part_prints_the_command_that_merges(tmp_path: Path) -> None:
    write_pictures(tmp_path / "source", per_class=2)
    for number in (1, 2):
        done = coatnet("shards", "build", "source", "out", "--part", f"{number}/2", folder=tmp_path)
        images = 6 if number == 1 else 0  # one batch is all of so few
        assert done.stdout == (
            f"6 files found, all of them taken: {'6 images' if number == 1 else '6 in other parts'}\n"
            f"part {number} of 2: {images} images checked; when all parts are, run: coatnet shards merge out\n"
        )
    done = coatnet("shards", "merge", "out", "--processes", "1", folder=tmp_path)
    assert done.stdout == "6 files found, all of them taken: 6 images\nout: 6 images of 3 classes in 1 shard, 0.0 MB\n"


@pytest.mark.parametrize(
    ("text", "size"), [("400MB", 400 * 10**6), ("1.5 GB", 1_500_000_000), ("2GiB", 2**31), ("64k", 64_000), ("9", 9)]
)
def test_sizes_are_read_as_people_write_them(text: str, size: int) -> None:
    assert _bytes(text) == size


@pytest.mark.parametrize("text", ["", "many", "-4MB", "4 light years", "0", "1.2.3GB"])
def test_malformed_sizes_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"not a size; write it as in 400MB"):
        _bytes(text)
