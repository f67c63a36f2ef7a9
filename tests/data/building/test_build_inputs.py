"""What people give a build, and what cannot be meant by it."""

import tarfile
from pathlib import Path

import numpy as np
import pytest

from data.building.build import build_shards
from data.building.layouts import open_source
from data.errors import DataError
from data.remote.storage import Storage
from tests.support.third_party import picture, tar_bytes


def write(folder: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def labels_by_key(folder: Path) -> dict[str, int]:
    """Of a dataset of one shard."""
    with tarfile.open(folder / "shard-000000.tar") as archive:
        keys = list(dict.fromkeys(name.rpartition(".")[0] for name in archive.getnames()))
    return dict(zip(keys, np.load(folder / "labels.npy")[:, 0].tolist(), strict=True))


def test_nested_folders_with_images_are_not_called_empty(tmp_path: Path) -> None:
    files = {f"{name}/1.jpg": picture(n) for n, name in enumerate(("a/x", "a/y", "b"))}
    report = build_shards(write(tmp_path / "tree", files), tmp_path / "out", nested=True)
    assert [remark.kind for remark in report.accounting.remarks] == ["nested"]


@pytest.mark.parametrize(
    ("labels", "classes", "expected"),
    [
        (["1.0", "0", "10.0", "2"], ("0", "1", "2", "10"), [1, 0, 3, 2]),
        (["1.0", "1", "0.0", "0"], ("0", "1"), [1, 1, 0, 0]),
        (["1.5", "1.0", "0.0", "0"], ("0", "0.0", "1.0", "1.5"), [3, 2, 1, 0]),
        (["1", "-1", "0", "0"], None, "all labels are numbers but for -1, which may stand for a missing label"),
        (["1", "NaN", "0", "0"], None, "all labels are numbers but for NaN"),
    ],
)
def test_labels_that_are_whole_numbers_are_classes_in_the_order_of_the_numbers(
    labels: list[str], classes: tuple[str, ...] | None, expected: list[int] | str, tmp_path: Path
) -> None:
    write(tmp_path, {f"{n}.png": picture(n, "PNG") for n in range(4)})
    (tmp_path / "list.csv").write_text("".join(f"{n}.png,{label}\n" for n, label in enumerate(labels)))
    if isinstance(expected, str):
        with pytest.raises(DataError, match=expected):
            build_shards(tmp_path / "list.csv", tmp_path / "out")
        return
    (index,) = build_shards(tmp_path / "list.csv", tmp_path / "out").indexes.values()
    assert index.classes == classes
    assert labels_by_key(tmp_path / "out") == {str(n): label for n, label in enumerate(expected)}


def test_classes_that_are_in_the_training_set_alone_are_named(tmp_path: Path) -> None:
    names = ["one/0.jpg", *(f"many/{n}.jpg" for n in range(4))]
    report = build_shards(
        write(tmp_path / "tree", {name: picture(n) for n, name in enumerate(names)}),
        tmp_path / "out",
        validation_fraction=0.25,
    )
    (remark,) = report.accounting.remarks
    assert remark.kind == "classes_without_validation"
    assert remark.text.startswith("1 of 2 classes have no image in the validation set (one)")


@pytest.mark.parametrize(
    ("source", "destination", "classes", "message"),
    [
        (
            "tree",
            "s3://bucket/shards",
            None,
            "shards are built in a local folder, and this is a URL; build them locally",
        ),
        ("tree", "file:///tmp/shards", None, "this is a URL; give its path"),
        ("tree", "tree/shards", None, "is inside of the source .*tree; choose a destination outside"),
        ("tree", "out", "none.txt", "none.txt: no such file or folder; --classes needs a class list"),
        ("utf16.csv", "out", None, "is in UTF-16; save it as UTF-8"),
        ("one.csv", "out", None, "line 1: no label; .* in CSV PATH,LABEL, and is a.jpg;cat"),
    ],
)
def test_what_cannot_be_meant_is_refused_before_images_are_read(
    source: str,
    destination: str,
    classes: str | None,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path, {"tree/a/broken.jpg": b"", "utf16.csv": "a.jpg,cat\n".encode("utf-16"), "one.csv": b"a.jpg;cat\n"})
    with pytest.raises(DataError, match=message):
        build_shards(source, Path(destination), classes=classes)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one.csv", "tree", "utf16.csv"]


@pytest.mark.parametrize("there", [False, True])
def test_a_destination_that_is_a_link_is_written_where_it_points_to(there: bool, tmp_path: Path) -> None:
    write(tmp_path / "tree", {"a/1.jpg": picture(0)})
    if there:
        (tmp_path / "scratch").mkdir()
    (tmp_path / "out").symlink_to("scratch")
    build_shards(tmp_path / "tree", tmp_path / "out")
    assert (tmp_path / "out").is_symlink()
    assert (tmp_path / "scratch" / "index.json").exists()


def test_lines_of_a_list_that_write_a_path_differently_are_the_same_image(tmp_path: Path) -> None:
    write(tmp_path, {"a.jpg": picture(0)})
    (tmp_path / "list.txt").write_text("a.jpg\tcat\n./a.jpg\tdog\n")
    with pytest.raises(DataError, match="a.jpg .another image has the same name"):
        build_shards(tmp_path / "list.txt", tmp_path / "out")


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"PK\x03\x04rest", "a zip"),
        (b"\x28\xb5\x2f\xfdrest", "compressed with zstd"),
        (b"7z\xbc\xafrest", "a 7z"),
        (b"PAR1rest", "a Parquet file"),
    ],
)
def test_archives_that_are_not_read_are_named(content: bytes, what: str, tmp_path: Path) -> None:
    write(tmp_path, {"alone": content, "tree/dog.tar.zst": content, "tree/cat/1.jpg": picture(1)})
    for source in ("alone", "tree"):
        with pytest.raises(DataError, match=f"{what}, which is not read; unpack it and build from the folder"):
            build_shards(tmp_path / source, tmp_path / "out")


def test_classes_of_which_all_images_are_broken_are_named(tmp_path: Path) -> None:
    tree = write(
        tmp_path / "tree", {"cat/1.jpg": picture(1), "cow/1.jpg": b"", "dog/1.jpg": b"x", "dog/2.jpg": picture(2)}
    )
    report = build_shards(tree, tmp_path / "out", skip_broken=True)
    (remark,) = report.accounting.remarks
    assert remark.text.startswith("1 classes have no image that can be read and are not in the class list (cow)")


@pytest.mark.parametrize("change", ["vanishes", "appears", "is noted"])
def test_a_folder_whose_images_change_while_it_is_read_is_refused(change: str, tmp_path: Path) -> None:
    tree = write(tmp_path / "tree", {"cat/1.jpg": picture(1), "cat/2.jpg": picture(2)})
    source = open_source(str(tree), Storage())
    if change == "vanishes":
        (tree / "cat/2.jpg").unlink()
    else:
        (tree / ("cat/3.jpg" if change == "appears" else "notes.txt")).write_bytes(picture(3))
    if change == "is noted":
        assert len(list(source.items())) == 2
        assert (source.accounting.found, *source.accounting.left_out) == (3, "not an image (.txt)")
        return
    with pytest.raises(DataError, match="has changed while it was read, 2 images and tars .* at first and [13] later"):
        list(source.items())


@pytest.mark.parametrize("form", ["folder", "tar"])
def test_numbered_parts_of_images_with_texts_are_no_classes(form: str, tmp_path: Path) -> None:
    members = [("1.jpg", picture(1)), ("1.txt", b"a caption"), ("2.jpg", picture(2))]
    if form == "tar":
        tree = write(tmp_path / "tree", {"00000.tar": tar_bytes(members)})
    else:
        tree = write(tmp_path / "tree", {f"00000/{name}": content for name, content in members})
    with pytest.raises(DataError, match=r"00000.* \(.*1.txt\).* with --leave-out '\*\.txt'"):
        build_shards(tree, tmp_path / "out")
    assert build_shards(tree, tmp_path / "out", leave_out=["*.txt"]).images == 2
