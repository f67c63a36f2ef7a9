"""Building shards: what is written, that others can read it, and what is refused."""

import hashlib
import tarfile
from pathlib import Path

import pytest
import webdataset
from PIL import Image

from data.building.build import build_shards
from data.errors import DataError
from data.index import read_index
from tests.conftest import CLASSES, write_pictures, write_tar_of_tars


def contents(folder: Path) -> dict[str, tuple[bytes, int]]:
    """Key -> image bytes and label, as plain webdataset reads them."""
    dataset = webdataset.WebDataset([str(p) for p in sorted(folder.glob("*.tar"))], shardshuffle=False)
    return {sample["__key__"]: (sample["jpg"], int(sample["cls"])) for sample in dataset}


def test_webdataset_reads_back_every_image_with_its_label(pictures: Path, shards: Path) -> None:
    found = contents(shards / "train") | contents(shards / "validation")
    expected = {
        f"{path.parent.name}/{path.stem}": (path.read_bytes(), CLASSES.index(path.parent.name))
        for path in pictures.rglob("*.jpg")
    }
    assert found == expected


def test_index_has_counts_bytes_and_checksums(shards: Path) -> None:
    index = read_index(shards / "train")
    assert index.classes == CLASSES
    assert index.samples == 45
    assert index.images_decode
    assert [shard.samples for shard in index.shards] == [7] * 6 + [3]
    for shard in index.shards:
        data = (shards / "train" / shard.name).read_bytes()
        assert (len(data), hashlib.sha256(data).hexdigest()) == (shard.bytes, shard.sha256)
    validation = contents(shards / "validation")
    assert sorted(label for _, label in validation.values()) == [0] * 5 + [1] * 5 + [2] * 5


def test_samples_are_shuffled_over_all_shards(shards: Path) -> None:
    first = contents_of_first_shard(shards / "train")
    assert len({key.split("/")[0] for key in first}) > 1


def contents_of_first_shard(folder: Path) -> list[str]:
    with tarfile.open(sorted(folder.glob("*.tar"))[0]) as archive:
        return archive.getnames()


def test_same_source_and_seed_give_the_same_bytes_and_another_seed_does_not(pictures: Path, tmp_path: Path) -> None:
    digests = []
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        report = build_shards(pictures, tmp_path / name, seed=seed, samples_per_shard=25)
        digests.append(report.indexes[tmp_path / name].digest)
    assert digests[0] == digests[1] != digests[2]


def test_a_tar_of_class_tars_gives_the_same_shards_as_the_folder(pictures: Path, tmp_path: Path) -> None:
    write_tar_of_tars(pictures, tmp_path / "whole.tar")
    from_tar = build_shards(tmp_path / "whole.tar", tmp_path / "from_tar")
    from_folder = build_shards(pictures, tmp_path / "from_folder")
    assert from_tar.indexes[tmp_path / "from_tar"].digest == from_folder.indexes[tmp_path / "from_folder"].digest


def test_awkward_names_become_unique_keys(tmp_path: Path) -> None:
    folder = tmp_path / "source" / "a.class"
    folder.mkdir(parents=True)
    for name in ("x.1.jpg", "x_1.jpg", "ünï.png", "w" * 120 + ".jpeg", "w" * 121 + ".JPG"):
        kind = "PNG" if name.endswith("png") else "JPEG"
        Image.new("RGB", (4, 4)).save(folder / name, kind)
    build_shards(tmp_path / "source", tmp_path / "out")
    index = read_index(tmp_path / "out")
    assert index.samples == 5
    assert index.image_fields == ("jpg", "png")
    dataset = webdataset.WebDataset(str(tmp_path / "out" / index.shards[0].name), shardshuffle=False)
    assert len({sample["__key__"] for sample in dataset}) == 5


def test_a_broken_image_is_named_and_nothing_is_published(tmp_path: Path) -> None:
    source = write_pictures(tmp_path / "source", per_class=4)
    broken = source / "dark" / "0001.jpg"
    broken.write_bytes(broken.read_bytes()[:300])
    (source / "dark" / "0002.jpg").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"2 of 12 images cannot be decoded: .*dark/0001\.jpg .*--skip-broken"):
        build_shards(source, tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["source"]

    report = build_shards(source, tmp_path / "out", skip_broken=True)
    assert {b.name for b in report.left_out} == {"dark/0001.jpg", "dark/0002.jpg"}
    assert read_index(tmp_path / "out").samples == 10


@pytest.mark.parametrize(
    ("arrange", "message"),
    [
        (lambda source: None, "no such file or folder"),
        (lambda source: source.mkdir(), "no class folders in it"),
        (lambda source: (source / "empty").mkdir(parents=True), "class folder empty has no image"),
        (lambda source: source.write_bytes(b"not a tar"), "not a folder, not a list and not a readable tar"),
    ],
)
def test_a_source_without_images_is_refused(tmp_path: Path, arrange: object, message: str) -> None:
    arrange(tmp_path / "source")  # type: ignore[operator]
    with pytest.raises(DataError, match=message):
        build_shards(tmp_path / "source", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_existing_destination_is_not_modified(pictures: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("mine")
    with pytest.raises(DataError, match="already exists"):
        build_shards(pictures, tmp_path / "out")
    assert (tmp_path / "out" / "precious").read_text() == "mine"


def test_a_class_too_small_for_the_validation_split_is_named(pictures: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="class bright has only 20 images"):
        build_shards(pictures, tmp_path / "out", validation_per_class=20)
