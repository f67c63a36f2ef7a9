"""Layouts of sources, and the mistakes in them that are refused."""

import gzip
import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset
from PIL import Image

from data.building.build import build_shards, merge_parts
from data.errors import DataError
from data.index import LabelFormat, ShardIndex, read_index, read_labels
from data.remote.storage import Storage
from tests.conftest import CLASSES


def built(source: Path | str, destination: Path, **options: Any) -> ShardIndex:
    return build_shards(source, destination, **options).indexes[destination]


def samples(folder: Path) -> dict[str, dict[str, bytes]]:
    """Key -> members, as plain webdataset reads them."""
    dataset = webdataset.WebDataset([str(p) for p in sorted(folder.glob("*.tar"))], shardshuffle=False)
    return {sample["__key__"]: sample for sample in dataset}


def add(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    archive.addfile(member, io.BytesIO(data))


def class_tar(folder: Path) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        for path in sorted(folder.iterdir()):
            add(archive, path.name, path.read_bytes())
    return file.getvalue()


def write_tar_of_tars(pictures: Path, path: Path, mode: str = "w") -> Path:
    with tarfile.open(path, mode) as archive:  # type: ignore[call-overload]
        for name in CLASSES:
            add(archive, f"{name}.tar", class_tar(pictures / name))
    return path


def write_flat_tar(pictures: Path, path: Path, prefix: str = "", mode: str = "w") -> Path:
    with tarfile.open(path, mode) as archive:  # type: ignore[call-overload]
        for picture in sorted(pictures.rglob("*.jpg")):
            add(archive, f"{prefix}{picture.parent.name}/{picture.name}", picture.read_bytes())
    return path


def write_folder_of_tars(pictures: Path, folder: Path) -> Path:
    folder.mkdir()
    for name in CLASSES:
        (folder / f"{name}.tar").write_bytes(class_tar(pictures / name))
    return folder


def write_list(pictures: Path, path: Path, line: str) -> Path:
    files = sorted(pictures.rglob("*.jpg"))
    path.write_text("".join(line.format(p.relative_to(pictures), p.parent.name) + "\n" for p in files))
    return path


@pytest.fixture(scope="module")
def expected(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The digest of shards built from the folder."""
    return built(pictures, tmp_path_factory.mktemp("expected") / "out", samples_per_shard=9).digest


@pytest.mark.parametrize(
    "write",
    [
        lambda pictures, folder: write_tar_of_tars(pictures, folder / "fall11_whole.tar"),
        lambda pictures, folder: write_tar_of_tars(pictures, folder / "winter21_whole.tar.gz", "w:gz"),
        lambda pictures, folder: write_tar_of_tars(pictures, folder / "whole.tar.bz2", "w:bz2"),
        lambda pictures, folder: write_folder_of_tars(pictures, folder / "tars"),
        lambda pictures, folder: write_flat_tar(pictures, folder / "flat.tar", "set/"),
        lambda pictures, folder: write_flat_tar(pictures, folder / "flat.tgz", mode="w:gz"),
        lambda pictures, folder: f"file://{pictures}",
    ],
    ids=["tar of tars", "tar.gz of tars", "tar.bz2 of tars", "folder of tars", "flat tar", "flat tgz", "URL"],
)
def test_every_layout_gives_the_shards_of_the_folder(
    pictures: Path, expected: str, tmp_path: Path, write: Callable[[Path, Path], Path | str]
) -> None:
    source = write(pictures, tmp_path)
    assert built(source, tmp_path / "out", samples_per_shard=9, memory=2**14).digest == expected


def test_a_tar_of_tars_is_read_in_parts_which_merge_to_the_same_shards(
    pictures: Path, expected: str, tmp_path: Path
) -> None:
    source = write_tar_of_tars(pictures, tmp_path / "whole.tar")
    images = []
    for number in (1, 2):
        report = build_shards(source, tmp_path / "out", samples_per_shard=9, memory=2**14, part=(number, 2))
        images.append(report.images)
    assert sorted(images) == [20, 40]
    assert merge_parts(tmp_path / "out").indexes[tmp_path / "out"].digest == expected


def test_a_compressed_tar_is_refused_in_parts(pictures: Path, tmp_path: Path) -> None:
    source = write_tar_of_tars(pictures, tmp_path / "whole.tar.gz", "w:gz")
    with pytest.raises(DataError, match=r"whole\.tar\.gz: can only be read sequentially and not in parts"):
        build_shards(source, tmp_path / "out", part=(1, 2))


@pytest.mark.parametrize(
    ("name", "line"),
    [("list.tsv", "{}\t{}"), ("list.csv", "{},{}"), ("list.txt", "{} {}")],
    ids=["tab", "comma", "space"],
)
def test_a_list_names_images_from_its_own_folder(
    pictures: Path, expected: str, tmp_path: Path, name: str, line: str
) -> None:
    (tmp_path / "pictures").symlink_to(pictures)
    source = write_list(pictures, tmp_path / name, f"pictures/{line}")
    index = built(source, tmp_path / "out")
    assert (index.samples, index.classes) == (60, CLASSES)
    found = samples(tmp_path / "out")
    assert found["pictures_dark/0003"]["jpg"] == (pictures / "dark" / "0003.jpg").read_bytes()
    assert found["pictures_dark/0003"]["cls"] == b"1"


def test_several_labels_are_written_as_lists_for_all_images(pictures: Path, tmp_path: Path) -> None:
    source = tmp_path / "list.tsv"
    source.write_text(
        f"{pictures}/dark/0000.jpg\tnight\n{pictures}/dark/0001.jpg\tstreet\tnight\n{pictures}/dark/0002.jpg\tcar\tnight\tcar\n"
    )
    index = built(source, tmp_path / "out")
    assert index.classes == ("car", "night", "street")
    assert index.label == LabelFormat("json", "labels")
    assert index.labels_per_sample == 2
    found = {key[-4:]: json.loads(sample["json"]) for key, sample in samples(tmp_path / "out").items()}
    assert found == {"0000": {"labels": [1]}, "0001": {"labels": [2, 1]}, "0002": {"labels": [0, 1]}}
    in_order = [found[key[-4:]]["labels"] for key in samples(tmp_path / "out")]
    assert read_labels(index, Storage()).tolist() == [labels + [-1] * (2 - len(labels)) for labels in in_order]


def test_labels_npy_has_the_labels_in_the_order_of_the_shards(shards: Path) -> None:
    for name in ("train", "validation"):
        labels = read_labels(read_index(shards / name), Storage())
        assert labels.dtype == np.int32
        assert labels.tolist() == [[int(sample["cls"])] for sample in samples(shards / name).values()]


def test_classes_that_are_numbers_are_in_their_numerical_order(pictures: Path, tmp_path: Path) -> None:
    files = sorted(pictures.rglob("*.jpg"))
    (tmp_path / "list.csv").write_text("".join(f"{path},{number}\n" for number, path in enumerate(files[:12])))
    assert built(tmp_path / "list.csv", tmp_path / "out").classes == tuple(str(number) for number in range(12))


@pytest.fixture
def flat(pictures: Path, tmp_path: Path) -> Path:
    """A flat folder of 6 images."""
    folder = tmp_path / "flat"
    folder.mkdir()
    for number in range(6):
        picture = pictures / CLASSES[number % 3] / f"{number:04d}.jpg"
        (folder / f"val_{number}.JPEG").write_bytes(picture.read_bytes())
    return folder


LABELS = {
    "by name": "val_2.JPEG dark\nval_0.JPEG bright\nval_1.JPEG\tbright\n\nval_5.JPEG,dark\nval_3.JPEG bright\nval_4.JPEG dark\n",
    "in order": "bright\nbright\ndark\nbright\ndark\ndark\n",
}


@pytest.mark.parametrize("kind", LABELS)
@pytest.mark.parametrize("archive", [None, "w", "w:gz"], ids=["folder", "tar", "tar.gz"])
def test_a_flat_folder_or_tar_takes_its_labels_from_a_file(
    flat: Path, tmp_path: Path, kind: str, archive: str | None
) -> None:
    (tmp_path / "labels.txt").write_text(LABELS[kind])
    source = flat
    if archive:
        source = tmp_path / "val.tar"
        with tarfile.open(source, archive) as tar:  # type: ignore[call-overload]
            for path in sorted(flat.iterdir(), reverse=True):
                add(tar, f"./{path.name}", path.read_bytes())
    if kind == "in order" and archive == "w:gz":
        with pytest.raises(DataError, match="labels without names cannot be used with a compressed tar"):
            built(source, tmp_path / "out", labels=tmp_path / "labels.txt")
        return
    index = built(source, tmp_path / "out", labels=tmp_path / "labels.txt")
    assert index.classes == ("bright", "dark")
    found = {key: (sample["jpg"], sample["cls"]) for key, sample in samples(tmp_path / "out").items()}
    expected = {f"val_{n}": ((flat / f"val_{n}.JPEG").read_bytes(), b"0" if n in (0, 1, 3) else b"1") for n in range(6)}
    assert found == expected


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ("bright\ndark\n", "labels.txt: 2 labels for 6 images; it needs one line per image"),
        ("bright\n" * 7, "labels.txt: 7 labels for 6 images"),
        (LABELS["by name"].replace("val_3", "val_9"), "no label for the image val_3.JPEG"),
        (LABELS["by name"] + "val_9.JPEG dark\n", "1 lines name images that do not exist .first: val_9.JPEG"),
        (LABELS["by name"] + "val_2.JPEG dark\n", "line 8: a second line for the image val_2.JPEG"),
        (LABELS["by name"] + "dark\n", "line 8: lines of NAME LABEL and lines of one word are mixed"),
        ("\n", "labels.txt: no labels in it"),
        (None, "labels.txt: no such file"),
    ],
)
def test_a_label_file_that_does_not_match_is_refused(
    flat: Path, tmp_path: Path, labels: str | None, message: str
) -> None:
    if labels is not None:
        (tmp_path / "labels.txt").write_text(labels)
    with pytest.raises(DataError, match=message):
        built(flat, tmp_path / "out", labels=tmp_path / "labels.txt")
    assert not list(tmp_path.glob("*out*"))


def test_a_validation_set_uses_the_classes_of_the_training_set(
    pictures: Path, flat: Path, shards: Path, tmp_path: Path
) -> None:
    (tmp_path / "labels.txt").write_text("dark\n" * 3 + "striped\n" * 3)
    (tmp_path / "classes.txt").write_text("striped\nunused\ndark\n")
    index = built(flat, tmp_path / "a", labels=tmp_path / "labels.txt", classes=shards / "train")
    assert (index.classes, sorted(read_labels(index, Storage()).ravel().tolist())) == (CLASSES, [1, 1, 1, 2, 2, 2])
    index = built(flat, tmp_path / "b", labels=tmp_path / "labels.txt", classes=tmp_path / "classes.txt")
    assert index.classes == ("striped", "unused", "dark")
    assert sorted(read_labels(index, Storage()).ravel().tolist()) == [0, 0, 0, 2, 2, 2]


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        ("bright\ndark\n", r"striped/00\d\d\.jpg: its label striped is not among the 2 classes of .*classes\.txt"),
        ("bright\ndark\nstriped\ndark\n", "class dark is repeated"),
        ("", "no class in it"),
        ("bright\ndark\n\nstriped\n", "line 3 is empty"),
    ],
)
def test_a_class_list_that_does_not_match_is_refused(
    pictures: Path, tmp_path: Path, classes: str, message: str
) -> None:
    (tmp_path / "classes.txt").write_text(classes)
    with pytest.raises(DataError, match=message):
        built(pictures, tmp_path / "out", classes=tmp_path / "classes.txt")


def test_a_tar_with_two_sets_requires_a_selection(pictures: Path, expected: str, tmp_path: Path) -> None:
    source = tmp_path / "both.tar"
    with tarfile.open(source, "w") as archive:
        for set_name in ("train", "test"):
            for picture in sorted(pictures.rglob("*.jpg")):
                add(archive, f"{set_name}/{picture.parent.name}/{picture.name}", picture.read_bytes())
    with pytest.raises(
        DataError, match="class folder bright is both in train and in test; select one .* --within test"
    ):
        built(source, tmp_path / "out")
    assert built(source, tmp_path / "out", samples_per_shard=9, within="train").digest == expected


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("../../escape/a.jpg", "escape/a"),
        ("/etc/b.jpg", "etc/b"),
        ("x/../../../c.jpg", "__/c"),
        ("d\\..\\e/f.jpg", "d____e/f"),
    ],
)
def test_member_names_of_a_tar_are_never_paths(pictures: Path, tmp_path: Path, name: str, key: str) -> None:
    with tarfile.open(tmp_path / "bad.tar", "w") as archive:
        add(archive, name, (pictures / "dark" / "0000.jpg").read_bytes())
        link = tarfile.TarInfo("link/g.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    (tmp_path / "inside").mkdir()
    built(tmp_path / "bad.tar", tmp_path / "inside" / "out", skip_broken=True)
    assert sorted(samples(tmp_path / "inside" / "out")) == [key]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad.tar", "inside"]


def cut_inner(pictures: Path, path: Path) -> None:
    """The tar of the second class ends in the middle of an image."""
    with tarfile.open(path, "w") as archive:
        for name in CLASSES:
            data = class_tar(pictures / name)
            add(archive, f"{name}.tar", data[: data.index(b"0007.jpg") + 612] if name == "dark" else data)


def cut_outer(pictures: Path, path: Path) -> None:
    """The file ends in the middle of the last class."""
    data = write_tar_of_tars(pictures, path).read_bytes()
    path.write_bytes(data[: len(data) - 22_000])


def flip_inner_header(pictures: Path, path: Path) -> None:
    """A damaged header in the second class; tarfile alone would silently end there."""
    data = bytearray(write_tar_of_tars(pictures, path).read_bytes())
    begin = data.index(b"0007.jpg", data.index(b"dark.tar"))
    data[begin : begin + 20] = b"\xff" * 20
    path.write_bytes(data)


def flip_outer_header(pictures: Path, path: Path) -> None:
    data = bytearray(write_tar_of_tars(pictures, path).read_bytes())
    begin = data.index(b"striped.tar")
    data[begin : begin + 20] = b"\xff" * 20
    path.write_bytes(data)


def cut_compressed(pictures: Path, path: Path) -> None:
    write_tar_of_tars(pictures, path)
    data = gzip.compress(path.read_bytes())
    path.write_bytes(data[: len(data) * 6 // 10])


@pytest.mark.parametrize(
    ("damage", "message", "left"),
    [
        (
            cut_inner,
            r"whole\.tar: dark\.tar \(damaged at or after 0007\.jpg \(unexpected end of data\)\)",
            range(41, 60),
        ),
        (cut_outer, r"whole\.tar: striped\.tar \(damaged at or after \d+\.jpg", range(41, 60)),
        (flip_inner_header, r"whole\.tar: dark\.tar \(damaged at or after 0006\.jpg", [47]),
        (flip_outer_header, r"whole\.tar \(damaged after its member dark\.tar", [40]),
        (cut_compressed, r"whole\.tar: dark\.tar \(damaged at or after \d+\.jpg", range(21, 40)),
    ],
)
def test_a_damaged_tar_is_named_and_its_readable_images_can_be_kept(
    pictures: Path, tmp_path: Path, damage: Callable[[Path, Path], None], message: str, left: range | list[int]
) -> None:
    damage(pictures, tmp_path / "whole.tar")
    with pytest.raises(DataError, match=f"{message}.* Copy the tar again, or keep .* --skip-broken"):
        built(tmp_path / "whole.tar", tmp_path / "out")
    report = build_shards(tmp_path / "whole.tar", tmp_path / "out", skip_broken=True)
    assert report.images in left
    assert any("damaged" in broken.reason for broken in report.left_out)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("missing.jpg\ta\n", r"1 of 1 images cannot be decoded: missing\.jpg \(no such file\)"),
        ("{dark}/0000.jpg\n", "line 1: no label; it should be PATH<TAB>LABEL"),
        ("{dark}/0000.jpg\ta\n{dark}/0000.jpg\tb\n", r"0000\.jpg \(another image has the same name\)"),
        ("pipe:rm -rf\ta\n", "pipe:rm.*no such file"),
        ("\n\n", "no lines in it"),
    ],
)
def test_a_list_with_mistakes_is_refused(pictures: Path, tmp_path: Path, lines: str, message: str) -> None:
    (tmp_path / "list.tsv").write_text(lines.replace("{dark}", str(pictures / "dark")))
    with pytest.raises(DataError, match=message):
        built(tmp_path / "list.tsv", tmp_path / "out")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"validation_fraction": 1.0}, "a validation fraction of 1.0: it must be at least 0 and below 1"),
        ({"validation_fraction": 0.1, "validation_per_class": 1}, "by count and by fraction; give only one of them"),
        ({"validation_fraction": 0.001}, "takes no image of any class"),
        ({"part": (4, 3)}, "part 4/3: parts are numbered from 1"),
        ({"within": "train"}, "--within selects a folder of a tar"),
    ],
)
def test_options_that_make_no_sense_are_refused(
    pictures: Path, tmp_path: Path, options: dict[str, object], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        built(pictures, tmp_path / "out", **options)


def test_a_flat_folder_without_labels_is_refused_with_the_fix(flat: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no class folders in it, only images; provide their labels with --labels FILE"):
        built(flat, tmp_path / "out")


def test_file_names_in_another_encoding_are_accepted(tmp_path: Path) -> None:
    folder = tmp_path / "source" / "class"
    folder.mkdir(parents=True)
    for name in (b"caf\xe9.jpg", b"plain.jpg"):
        file = io.BytesIO()
        Image.new("RGB", (4, 4)).save(file, "JPEG")
        with open(bytes(folder) + b"/" + name, "wb") as picture:
            picture.write(file.getvalue())
    built(tmp_path / "source", tmp_path / "out")
    assert sorted(samples(tmp_path / "out")) == ["class/caf_", "class/plain"]
