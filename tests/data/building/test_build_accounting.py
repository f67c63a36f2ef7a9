"""Every entry of a source is taken or left out with a reason, and a tree gives the same dataset in every form."""

import gzip
import json
import os
import tarfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from data.building.build import build_shards, merge_parts
from data.errors import DataError
from data.files.json_records import to_json
from tests.support.trees import FORMS, ODD, PLAIN, built, class_tar, digest, left_out, picture, write


@pytest.mark.parametrize("form", FORMS)
def test_odd_entries_are_taken_or_left_out_with_a_reason_in_every_form(form: str, tmp_path: Path) -> None:
    folder = write(tmp_path / "tree", PLAIN | ODD)
    report = built(FORMS[form](folder, tmp_path / "x.tar"), tmp_path / "out")
    assert next(iter(report.indexes.values())).classes == ("cat", "dog")
    assert report.accounting.taken["images"] == 7
    assert report.accounting.taken["images that were compressed with gzip, unpacked"] == 2
    assert left_out(report) == {
        "a hidden file": 1,
        "in a hidden folder": 3,
        "not an image (.db)": 1,
        "not an image (.txt)": 1,
        "not an image by its first bytes": 2,
        "an image beside the class folders": 1,
    }
    assert report.accounting.found == 18 + (2 if form == "tar of tars" else 0)
    again = built(folder, tmp_path / "again")
    assert digest(report) == digest(again)


@pytest.mark.parametrize("form", FORMS)
def test_links_are_the_images_they_point_to_in_every_form(form: str, tmp_path: Path) -> None:
    folder = write(tmp_path / "tree", PLAIN)
    os.link(folder / "cat/a.jpg", folder / "cat/hard.jpg")
    (folder / "cat/soft.jpg").symlink_to("b.jpg")
    (folder / "cat/chain.jpg").symlink_to("soft.jpg")
    (folder / "cat/again").symlink_to("../cat")
    (folder / "cat/lost.txt").symlink_to("nowhere")
    (folder / "cat/lost.jpg").symlink_to("nowhere.jpg")
    (folder / "cat/circle.jpg").symlink_to("circle.jpg")
    source = FORMS[form](folder, tmp_path / "x.tar")
    with pytest.raises(DataError, match=r"cat/lost\.jpg \(a link to a missing file\)"):
        build_shards(source, tmp_path / "out")
    report = built(source, tmp_path / "out", skip_broken=True)
    assert report.images == 6
    lost = 1 if form == "tar of tars" else 0  # in a class tar, ../cat is outside
    assert left_out(report) == {"a link to a missing file": 2 + lost, "not an image (.txt)": 1} | (
        {} if lost else {"a link to a folder above it": 1}
    )
    assert digest(report) == digest(built(folder, tmp_path / "again", skip_broken=True))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"dog/puppies/1.jpg": picture(20)}, r"images in dog and in its subfolder dog/puppies; .* use --nested; .*"),
        ({"train/cat/1.jpg": picture(20)}, "class folder cat is both in the top folder and in train"),
    ],
)
def test_images_at_several_depths_are_refused(form: str, files: dict[str, bytes], message: str, tmp_path: Path) -> None:
    source = FORMS[form](write(tmp_path / "tree", PLAIN | files), tmp_path / "x.tar")
    expected = "has images in its folder" if form == "tar of tars" else message
    if form == "tar.gz":
        expected = "there are images in|class folder cat is both in"
    with pytest.raises(DataError, match=expected):
        build_shards(source, tmp_path / "out")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("options", "images", "reasons"),
    [
        ({"nested": True}, 5, {}),
        ({"leave_out": ["puppies"]}, 3, {"--leave-out puppies": 2}),
        ({"leave_out": ["dog/pup*"]}, 3, {"--leave-out dog/pup*": 2}),
    ],
)
def test_options_decide_what_subfolders_are(
    form: str, options: dict[str, Any], images: int, reasons: dict[str, int], tmp_path: Path
) -> None:
    folder = write(tmp_path / "tree", PLAIN | {f"dog/puppies/{n}.jpg": picture(n) for n in (20, 21)})
    report = built(FORMS[form](folder, tmp_path / "x.tar"), tmp_path / "out", **options)
    assert (report.images, left_out(report)) == (images, reasons)
    assert digest(report) == digest(built(folder, tmp_path / "again", **options))


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (
            {"train/cat/1.jpg": b"", "val/cat/2.jpg": b""},
            "class folder cat is both in train and in val; select one of them by giving .*/tree/val as the source",
        ),
        (
            {"train/cat/1.jpg": b"", "val/dog/2.jpg": b""},
            "images in train/cat and in val/dog, and class folders must lie",
        ),
        ({"train/1.jpg": b"", "val/2.jpg": b""}, "train and val look like different datasets and not like classes"),
        ({"train/1.jpg": b"", "val/2.jpg": b"", "car/3.jpg": b""}, "train and val look like different datasets"),
        (
            {"train_images/1.jpg": b"", "Unlabeled/2.jpg": b""},
            "Unlabeled and train_images look like different datasets",
        ),
        (
            {"images/1.jpg": b"", "masks/1.png": b""},
            "images and masks look like different datasets and not like classes",
        ),
        (
            {"train/1.jpg": b"", "train.csv": b"id,label"},
            "are in train, which .* select the folder by giving .*/tree/train",
        ),
        (
            {"a/1.pcx": b"", "b/n.txt": b""},
            r"folder a has no image \(1 left out: not an image by .*; 1 left out: .*txt",
        ),
        ({"x-train-0000.tar": b"", "x-val-0000.tar": b""}, "tars x-train-0000.tar and x-val-0000.tar look like parts"),
        ({"cat/1.jpg": b"", "cat.tar": b""}, r"class cat is there twice, as cat\.tar and a folder; .*--leave-out"),
        ({"a/cat.tar": b"", "b/cat.tar": b""}, "class folder cat is both in a and in b; select one of them"),
        ({"1.jpg": b"", "2.jpg": b""}, "no class folders in it, only images; provide their labels with --labels FILE"),
    ],
)
def test_several_datasets_in_one_place_are_refused(files: dict[str, bytes], message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=message):
        build_shards(write(tmp_path / "tree", files), tmp_path / "out")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            class_tar(("1.jpg", picture(1)), ("1.cls", b"3")),
            "looks like a shard of a WebDataset .* coatnet shards index",
        ),
        (class_tar(("1.json", b"{}"), ("1.jpg", picture(1))), "looks like a shard of a WebDataset"),
        (class_tar(("n01.tar", b"")), "x-000.tar contains tars .n01.tar. .*give it as the source"),
        (class_tar(("cat/1.jpg", picture(1)), ("dog/1.jpg", picture(1))), "has images in its folder cat"),
    ],
)
def test_tars_that_are_not_those_of_a_class_are_refused(content: bytes, message: str, tmp_path: Path) -> None:
    write(tmp_path / "tree", {"x-000.tar": content, "x-001.tar": content})
    with pytest.raises(DataError, match=message):
        build_shards(tmp_path / "tree", tmp_path / "out")


def volume_label() -> bytes:
    label = tarfile.TarInfo("BACKUP")
    label.type = b"V"
    return label.tobuf(tarfile.GNU_FORMAT)


TREE = list(PLAIN.items())
WHOLE = class_tar(*TREE)


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "gzip"])
@pytest.mark.parametrize(
    ("content", "reasons", "remarks"),
    [
        (class_tar(*TREE[:1]) + class_tar(*TREE[1:]), {}, ["several_tars"]),
        (WHOLE.rstrip(b"\0") + bytes(-len(WHOLE.rstrip(b"\0")) % 512), {}, ["no_end_mark"]),
        (volume_label() + WHOLE, {"neither a file nor a folder": 1}, []),
        (WHOLE + bytes(100), {}, []),
    ],
    ids=["two tars", "no end mark", "volume label", "padding"],
)
def test_unusual_tars_are_read_completely(
    packed: bool, content: bytes, reasons: dict[str, int], remarks: list[str], tmp_path: Path
) -> None:
    (tmp_path / "x.tar").write_bytes(gzip.compress(content) if packed else content)
    report = built(tmp_path / "x.tar", tmp_path / "out")
    assert (report.images, left_out(report)) == (3, reasons)
    assert [remark.kind for remark in report.accounting.remarks] == remarks
    assert digest(report) == digest(built(write(tmp_path / "tree", PLAIN), tmp_path / "again"))


def test_two_compressed_tars_behind_one_another_are_both_read(tmp_path: Path) -> None:
    two = gzip.compress(class_tar(*TREE[:1])) + gzip.compress(class_tar(*TREE[1:]))
    (tmp_path / "x.tar.gz").write_bytes(two)
    assert built(tmp_path / "x.tar.gz", tmp_path / "out").images == 3


def test_data_that_is_no_tar_behind_the_end_mark_is_damage(tmp_path: Path) -> None:
    (tmp_path / "x.tar").write_bytes(WHOLE + b"garbage" * 200)
    with pytest.raises(DataError, match="data that is no tar behind its end mark"):
        build_shards(tmp_path / "x.tar", tmp_path / "out")
    report = built(tmp_path / "x.tar", tmp_path / "out", skip_broken=True)
    assert (report.images, left_out(report)) == (3, {"lost in a damaged tar": 1})


def test_sparse_members_are_read_as_they_were(tmp_path: Path) -> None:
    folder = write(tmp_path / "tree", PLAIN)
    with open(folder / "cat/sparse.jpg", "wb") as file:
        content = picture(4)
        file.write(content)
        file.truncate(2**20)  # zeros behind the end of an image are harmless
    status = os.system(f"tar -C {folder} --sparse -cf {tmp_path}/x.tar cat dog")
    assert status == 0
    with tarfile.open(tmp_path / "x.tar") as archive:
        assert archive.getmember("cat/sparse.jpg").issparse()
    assert digest(built(tmp_path / "x.tar", tmp_path / "a")) == digest(built(folder, tmp_path / "b"))


@pytest.mark.parametrize("kind", ["GIF", "BMP", "TIFF", "PPM"])
def test_gif_bmp_tiff_and_ppm_need_a_conversion(kind: str, tmp_path: Path) -> None:
    folder = write(tmp_path / "tree", PLAIN | {f"cat/x.{kind.lower()}": picture(4, kind)})
    with pytest.raises(DataError, match=f"cat/x.{kind.lower()} .a {kind}, which only --convert takes, as a JPEG"):
        build_shards(folder, tmp_path / "out")
    assert left_out(built(folder, tmp_path / "out", skip_broken=True)) == {
        f"a {kind}, which only --convert takes, as a JPEG": 1
    }
    report = built(folder, tmp_path / "converted", convert=True)
    assert (report.images, [(k.kind, k.encoded_again) for k in report.kinds]) == (4, [(kind, 1)])


def test_what_changes_the_meaning_of_a_dataset_is_remarked_once(tmp_path: Path) -> None:
    files = {f"{name}/{n}.jpg": picture(n) for n, name in enumerate(("Cat", "cat", "cat ", "caf\u00e9", "cafe\u0301"))}
    folder = write(tmp_path / "tree", files)
    (folder / "empty").mkdir()
    report = built(folder, tmp_path / "out", leave_out=["*.bmp"])
    remarks = {remark.kind: remark.text for remark in report.accounting.remarks}
    assert remarks["similar_classes"].startswith(
        "2 groups of class names differ only in case, spaces, hyphens, leading zeros or Unicode form and stay different "
        "classes "
        "('Cat' and 'cat' and 'cat '; 'cafe\\u0301' and 'caf\\xe9')"
    )
    assert (
        "1 folders beside the class folders have no image and are not classes (empty)"
        in (remarks["folders_without_images"])
    )
    numbers = write(
        tmp_path / "numbers", {f"{name}/1.jpg": picture(n) for n, name in enumerate(("0", "00", "10", "2"))}
    )
    report = built(numbers, tmp_path / "of numbers")
    assert "'0' and '00'" in report.accounting.remarks[0].text
    assert remarks["unused_patterns"] == "nothing matches --leave-out *.bmp"

    (tmp_path / "list.tsv").write_text("tree/Cat/0.jpg\ta\tb\n\ntree/cat/1.jpg\ta\n")
    report = built(tmp_path / "list.tsv", tmp_path / "several")
    assert report.accounting.found == 2 + left_out(report).get("empty", 0)
    (remark,) = report.accounting.remarks
    assert remark.text.startswith(
        "the dataset is multi-label: 1 of 2 images have several labels (first: tree/Cat/0.jpg: a, b)"
    )


@pytest.mark.parametrize("form", ["folder", "tar", "tar.gz"])
def test_a_label_file_is_for_the_images_of_one_folder_in_every_form(form: str, tmp_path: Path) -> None:
    flat = {"set/a.jpg": picture(1), "set/b": picture(2), "set/c.txt": b"", "set/._a.jpg": b"", "set/more.tar": b""}
    folder = write(tmp_path / "tree", flat)
    (tmp_path / "labels.txt").write_text("a.jpg cat\nb dog\n")
    options: dict[str, Any] = {"labels": tmp_path / "labels.txt"}
    report = built(FORMS[form](folder, tmp_path / "x.tar"), tmp_path / "out", **options)
    assert (report.images, next(iter(report.indexes.values())).classes) == (2, ("cat", "dog"))
    assert left_out(report) == {
        "a hidden file": 1, "not an image (.txt)": 1, "a tar beside images with a label file": 1
    }  # fmt: skip
    assert digest(report) == digest(built(folder, tmp_path / "again", **options))

    write(folder, {"set2/d.jpg": picture(3)})
    with pytest.raises(DataError, match="a label file is for images in one folder, and there are images in"):
        build_shards(FORMS[form](folder, tmp_path / "x.tar"), tmp_path / "several", **options)


@pytest.mark.parametrize("form", ["folder", "tar of tars"])
def test_parts_and_a_resumed_build_give_the_totals_of_one_build(form: str, tmp_path: Path) -> None:
    folder = write(tmp_path / "tree", PLAIN | ODD | {f"dog/{n}.jpg": picture(n) for n in range(30)})
    (folder / "dog/7.jpg").write_bytes(b"no image")
    source = FORMS[form](folder, tmp_path / "x.tar")
    options: dict[str, Any] = {"skip_broken": True, "memory": 2**14}
    whole = built(source, tmp_path / "whole", **options)
    for number in (1, 2, 3):
        part = build_shards(source, tmp_path / "parts", part=(number, 3), **options)
        part.accounting.check()
    parts = merge_parts(tmp_path / "parts")
    assert to_json(parts.accounting) | {"left_out": 0} == to_json(whole.accounting) | {"left_out": 0}
    assert left_out(parts) == left_out(whole)
    assert left_out(whole)["broken"] == 1

    with pytest.raises(DataError, match="dog/7.jpg"):
        build_shards(source, tmp_path / "resumed", memory=2**14)
    assert left_out(built(source, tmp_path / "resumed", **options)) == left_out(whole)


def test_a_source_that_changes_between_its_parts_is_refused(tmp_path: Path) -> None:
    folder = write(tmp_path / "tree", PLAIN)
    build_shards(folder, tmp_path / "out", part=(1, 2))
    write(folder, {"cat/new.jpg": picture(9)})
    build_shards(folder, tmp_path / "out", part=(2, 2))
    with pytest.raises(
        DataError, match="part 2/2 has found 4 files in the source and part 1/2 3.* run all parts again"
    ):
        merge_parts(tmp_path / "out")


def test_a_rotated_image_is_turned_by_short_side_whether_it_shrinks_or_not(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    write(tmp_path / "tree", {"cat/a.jpg": picture(1, exif=exif), "cat/b.jpg": picture(2)})
    (kind,) = built(tmp_path / "tree", tmp_path / "out", short_side=100).kinds
    assert (kind.kind, kind.images, kind.encoded_again) == ("EXIF-rotated", 1, 1)


CONTENTS = {
    "jpg": picture(1),
    "png": picture(2, "PNG"),
    "": picture(3),
    "txt": b"words",
    "bin": b"\0\1",
    "JPEG": picture(4),
}
NAMES = st.builds(
    lambda stem, extension: f"{stem}.{extension}" if extension else stem,
    st.sampled_from(["a", "b", "._a", ".b", "x.y", "Thumbs"]),
    st.sampled_from(sorted(CONTENTS)),
)
FOLDERS = st.sampled_from(["cat", "dog", "Cat", "cat/.hidden", ".git", "__MACOSX/cat", ""])


@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.sets(st.tuples(FOLDERS, NAMES), max_size=12))
def test_random_trees_are_accounted_for_and_agree_in_every_form(
    tmp_path_factory: pytest.TempPathFactory, names: set[tuple[str, str]]
) -> None:
    files = {"cat/one.jpg": picture(0), "dog/one.jpg": picture(1)}
    files |= {
        f"{folder}/{name}".lstrip("/"): CONTENTS[name.rpartition(".")[2]]
        if "." in name[1:] and name.rpartition(".")[2] in CONTENTS
        else CONTENTS[""]
        for folder, name in names
    }
    root = tmp_path_factory.mktemp("random")
    folder = write(root / "tree", files)
    outcomes = set()
    for number, form in enumerate(("folder", "tar", "tar.gz", "tar of tars")):
        report = built(FORMS[form](folder, root / f"{number}.tar"), root / f"out{number}", skip_broken=True)
        tars = report.accounting.taken.get("class tars", 0) + left_out(report).get("a class tar without images", 0)
        assert report.accounting.found - tars == len(files)
        reasons = {reason: count for reason, count in left_out(report).items() if "class tar" not in reason}
        outcomes.add((digest(report), json.dumps(reasons, sort_keys=True)))
    assert len(outcomes) == 1
