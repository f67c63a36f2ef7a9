"""Indexing accounts for every member and file, and says what changes the meaning of a dataset."""

import contextlib
import gzip
import json
import re
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.accounting import Accounting
from data.classes.class_lists import ClassList
from data.dataset import open_dataset
from data.errors import DataError
from data.index import LabelFormat, read_index, read_labels
from data.indexing.index_shards import IndexingReport, index_shards
from data.indexing.inference import GivenFields
from data.indexing.scan import Problem
from data.indexing.summary import describe, draw_samples
from data.indexing.verify import verify_shards
from data.remote.storage import Storage
from data.sample_reader import SampleReader
from tests.support.third_party import picture, tar_bytes, write_members

JPEG = picture(0)


def indexed(folder: Path, members: Sequence[tuple[str, bytes]], **options: Any) -> IndexingReport:
    write_members(folder / "a-0.tar", members)
    return index_shards([str(folder)], **options)


def labelled(*labels: Any, extension: str = "cls") -> list[tuple[str, bytes]]:
    """Members of samples with these labels."""
    written = [one if isinstance(one, bytes) else str(one).encode() for one in labels]
    return [member for n, label in enumerate(written) for member in ((f"s{n}.jpg", JPEG), (f"s{n}.{extension}", label))]


def counts(accounting: Accounting) -> dict[str, int]:
    return {reason: entries.count for reason, entries in accounting.left_out.items()}


def remarks(report: IndexingReport) -> dict[str, str]:
    return {remark.kind: remark.text for remark in report.members.remarks}


NAMES = st.sampled_from(["a", "b", "b.1", "c 0.5", "d/a", "._a", "d/.x", "e.f.g"])
EXTENSIONS = st.sampled_from([".jpg", ".cls", ".JPG", ".json", ".png", ".seg.png", ".bmp", "", ".5"])


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(NAMES, EXTENSIONS, st.sampled_from([JPEG, b"1", b"x", b""])), max_size=12), st.booleans())
def test_every_member_of_random_shards_is_taken_or_left_out(members: list[tuple[str, str, bytes]], twice: bool) -> None:
    written = [*labelled(0), *((name + extension, content) for name, extension, content in members)]
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "a-0.tar").write_bytes(tar_bytes(written) * (2 if twice else 1))
        report = index_shards([folder], given=GivenFields(("jpg", "png"), "cls", label_by="number"))
        found = len(written) * (2 if twice else 1)
        assert report.members.found == found
        assert (
            report.members.taken["images"] + report.members.taken["labels"] + sum(counts(report.members).values())
            == found
        )
        again = Accounting("members")
        assert list(verify_shards(report.index, members=again)) == []
        assert (again.found, again.taken) == (report.members.found, report.members.taken)
        assert counts(again) == counts(report.members)
        reader = SampleReader(open_dataset(folder, Storage()), None)
        readable = 0
        for place in range(report.index.samples):
            with contextlib.suppress(ValueError):
                readable += reader.read(0, place).image == JPEG
        assert readable == report.members.taken["images"]


def test_members_that_are_left_out_are_counted_by_reason(tmp_path: Path) -> None:
    report = indexed(
        tmp_path,
        [
            *labelled(0, 1),
            ("photo_0.5.jpg", JPEG), ("photo_0.5.cls", b"1"),
            ("photo_1.5.jpg", JPEG),
            ("s0.json", b"{}"), ("s1.json", b"{}"), ("s1.seg.png", b"x"),
            ("README", b"x"), ("._s0.jpg", b"x"), ("x.123", b"x"),
            ("zipped.jpg", gzip.compress(JPEG, mtime=0)), ("zipped.cls", b"0"),
            ("drawn.jpg", b"GIF89a" + bytes(20)), ("drawn.cls", b"0"),
            ("alone.jpg", JPEG),
        ],
    )  # fmt: skip
    assert report.members.taken == {"images": 3, "labels": 3}
    assert counts(report.members) == {
        "names with further dots that belong to no clear sample": 1,
        "json members, neither images nor labels": 2,
        "seg.png members, neither images nor labels": 1,
        "names without an extension": 1,
        "hidden files": 1,
        "unusual extensions": 1,
        f"of samples with {Problem.IMAGE_GZIP}": 2,
        f"of samples with {Problem.IMAGE_UNKNOWN}": 2,
        f"of samples with {Problem.NO_LABEL}": 1,
    }
    assert report.members.left_out["of samples with no label"].first == ["a-0.tar: alone (image)"]
    assert report.problems.first[Problem.IMAGE_UNKNOWN] == [("a-0.tar", "drawn", "it is GIF")]
    assert json.loads((tmp_path / "report.json").read_text()) == json.loads(json.dumps(report.document()))


def test_files_that_are_not_shards_are_counted(tmp_path: Path) -> None:
    for name in ("x.tar.gz", "00000.parquet", "00000_stats.json", ".hidden.tar", "index.json.old"):
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "more").mkdir()
    (tmp_path / "gone.tar").symlink_to("nowhere")
    (tmp_path / "empty.tar").write_bytes(tar_bytes([]))
    report = indexed(tmp_path, labelled(0))
    assert (report.files.found, report.files.taken) == (9, {"shards": 1})
    assert counts(report.files) == {
        "hidden": 1,
        "files that are not tars": 3,
        "tars that the patterns do not match, or links to nothing": 1,
        "compressed tars (decompress them)": 1,
        "folders, which are not searched (a pattern with ** does)": 1,
        "tars without members": 1,
    }


def test_empty_shards_at_the_beginning_are_left_out(tmp_path: Path) -> None:
    for number in range(7):
        (tmp_path / f"0-{number}.tar").write_bytes(tar_bytes([]))
    report = indexed(tmp_path, labelled(0, 1))
    assert [shard.name for shard in report.index.shards] == ["a-0.tar"]
    assert counts(report.files) == {"tars without members": 7}


def test_names_with_dots_only_are_indexed_and_read(tmp_path: Path) -> None:
    members = [m for n in range(80) for m in ((f"p_0.{n}.jpg", JPEG), (f"p_0.{n}.cls", str(n % 3).encode()))]
    assert indexed(tmp_path, members).index.samples == 80
    assert SampleReader(open_dataset(str(tmp_path), Storage()), None).read(0, 7)[::2] == ("p_0.7", (1,))


def test_a_tar_without_end_mark_and_tars_behind_one_another_are_told(tmp_path: Path) -> None:
    whole = tar_bytes(labelled(0, 1)).rstrip(b"\0")
    (tmp_path / "b-1.tar").write_bytes(whole + bytes(-len(whole) % 512))
    (tmp_path / "b-2.tar").write_bytes(tar_bytes(labelled(0)) + tar_bytes([("t.jpg", JPEG), ("t.cls", b"1")]))
    report = indexed(tmp_path, labelled(0))
    assert report.members.found == 10
    assert [remark.text for remark in report.members.remarks if ".tar" in remark.text[:9]] == [
        "b-1.tar has no end mark, but ends behind a whole member",
        "b-2.tar is 2 tars behind one another, which are all read",
    ]


@pytest.mark.parametrize(
    ("labels", "extension", "message"),
    [
        (["[0, 0, 1]", "[1, 0, 0]"], "json", "lists of 3 numbers that are all 0 or 1.*--label-lists multi-hot; .* classes"),
        (["[0.0, 1.0]", "[1.0, 0.0]"], "json", "lists of 2 numbers that are all 0 or 1"),
        (['{"label": [false, true]}'], "json", "lists of 2 numbers that are all 0 or 1"),
        (["0 0 1", "1 0 0"], "cls", "lists of 3 numbers that are all 0 or 1"),
        (["3", "3,17", "[4, 5]"], "cls", "the cls members have several numbers.*--label-lists classes; .*--label-by name"),
        (["3", "cat"], "cls", "1 of the first 2 labels are numbers, such as '3', and others are not, such as 'cat'"),
        (["3.5", "nan"], "cls", "labels such as '3.5' are neither whole numbers nor names"),
        (["true", "false"], "json", "labels such as True are neither whole numbers nor names; store 0 and 1, or names"),
        (['{"a": {"label": 3}}'], "json", "a key in a nested object is --label-key OUTER.INNER"),
        (['{"label": 3, "label": 2}'], "json", "correct them: the key 'label' is there twice"),
        ([b"\x80\x04K\x01.", b"\1\0\0\0"], "cls", "no label in the first cls .*; labels must be text, a number or a name"),
        (["a red car", "a blue car", "a tree"], "txt", "are probably captions: 3 different texts such as 'a blue car' .*"
         "--label-field txt takes these texts as class names"),
        (['{"caption": "a red car"}', '{"caption": "a tree"}'], "json", "captions: 2 .*; --label-key caption takes these"),
        (["1" * 99], "cls", r"a label of 99 digits, 1{20}\.\.\., is no class"),
    ],
)  # fmt: skip
def test_labels_that_may_mean_several_things_are_refused(
    tmp_path: Path, labels: list[str], extension: str, message: str
) -> None:
    with pytest.raises(DataError, match=message):
        indexed(tmp_path, labelled(*labels, extension=extension))
    assert not (tmp_path / "index.json").exists()


@pytest.mark.parametrize(
    ("labels", "extension", "options", "classes", "rows"),
    [
        (["[0,0,1,0]", "[1,1,0,0]"], "json", {"label_lists": "multi-hot"}, "0123", [[2, -1], [0, 1]]),
        (["0 0 1 0", "1 0 0 0"], "cls", {"label_lists": "multi-hot"}, "0123", [[2], [0]]),
        (["[0,0,1]", "[1,0,0]"], "json", {"label_lists": "classes"}, "01", [[0, 1], [0, 1]]),
        (["2", "0,1"], "cls", {"label_lists": "classes"}, "012", [[2, -1], [0, 1]]),
        (["2.0", "0.0", "1.0"], "cls", {}, "012", [[2], [0], [1]]),
        ([b"\xef\xbb\xbf2\r\n", "0", "1\r\n"], "cls", {}, "012", [[2], [0], [1]]),
        (["1", "3", "2"], "cls", {"first_label": 1}, "123", [[0], [2], [1]]),
        (["1", "-1", "0"], "cls", {"ignored_labels": ("-1",)}, "01", [[1], [-1], [0]]),
        (["b", "none", "a"], "txt", {"ignored_labels": ("none",)}, "ab", [[1], [-1], [0]]),
        (["[1, -1]", "[-1]", "[0]"], "json", {"ignored_labels": ("-1",)}, "01", [[1], [-1], [0]]),
        (['{"a": {"b": 1}}', '{"a": {"b": 0}}'], "json", {"label_key": "a.b"}, "01", [[1], [0]]),
        (["cat\nant dog", "cat"], "txt", {"label_lists": "classes"}, ["ant dog", "cat"], [[0, 1], [1, -1]]),
        (["8", "010"], "txt", {"label_by": "name"}, ["010", "8"], [[1], [0]]),
        (["a red car", "a tree"], "cls", {}, ["a red car", "a tree"], [[0], [1]]),
        (["a red car", "a tree"], "txt", {"label_field": "txt"}, ["a red car", "a tree"], [[0], [1]]),
    ],
)
def test_options_decide_what_labels_mean(
    tmp_path: Path, labels: list[Any], extension: str, options: Any, classes: Sequence[str], rows: list[list[int]]
) -> None:
    report = indexed(tmp_path, labelled(*labels, extension=extension), given=GivenFields(**options))
    assert report.index.classes == tuple(classes)
    assert read_index(tmp_path) == report.index
    assert read_labels(report.index, Storage()).tolist() == rows
    assert report.problems.samples == 0
    dataset = open_dataset(str(tmp_path), Storage())
    reader = SampleReader(dataset, None)
    kept = [tuple(n for n in row if n >= 0) for row in rows if max(row) >= 0]
    assert [reader.read(0, number).labels for number in range(dataset.samples)] == kept
    assert report.members.taken["images"] == dataset.samples
    assert list(verify_shards(report.index, decode_images=True)) == []


def test_samples_with_an_ignored_label_are_counted_as_left_out(tmp_path: Path) -> None:
    report = indexed(tmp_path, labelled(0, -1, 1, 65535), given=GivenFields(ignored_labels=("-1", "65535")))
    assert counts(report.members) == {"of samples with a label to be ignored": 4}
    dataset = open_dataset(str(tmp_path), Storage())
    assert (report.index.samples, dataset.samples) == (4, 2)
    facts = describe(dataset, list(draw_samples(dataset, 4, 0)))
    assert (facts["samples"], facts["left_out"], facts["drawn"]["samples"]) == (2, 2, 2)
    assert facts["histogram"] == {"classes": {"0": 1, "1": 1}, "without_label": 0, "problem": None}


def test_the_label_format_of_an_index_has_no_more_than_before_unless_it_is_used(tmp_path: Path) -> None:
    assert LabelFormat().content() == {"field": "cls", "key": None, "by": "number"}
    report = indexed(tmp_path, labelled(0, 1))
    assert json.loads((tmp_path / "index.json").read_text())["fields"]["label"] == LabelFormat().content()
    assert report.index.label.content() == LabelFormat().content()


@pytest.mark.parametrize(
    ("labels", "extension", "expected"),
    [
        ([0, 1, 2], "cls", {}),
        ([1, 2, 3], "cls", {"labels_from_1": "no sample has the label 0, and all others up to 3 occur; .*--first-label 1"}),
        ([0, 2, 5], "cls", {"unused_classes": r"3 of 6 classes have no samples \(1, 3, 4\)"}),
        (
            [0, 1, 2, 2, 65535],
            "cls",
            {
                "unused_classes": r"65,532 of 65,536 classes have no samples \(3, 4, 5, ...\)",
                "outlier_label": "1 samples have the label 65,535, and no other is above 2; .*--ignore-label 65535",
            },
        ),
        ([0, 1, -1], "cls", {"label_minus_one": "1 samples have the label -1; .*--ignore-label -1"}),
        (["[0, 2]", "[1, 1]"], "json", {
            "repeated_labels": "1 samples have a label more than once",
            "multi_label": "multi-label: 1 of 2 samples have several classes, up to 2; training needs loss.kind: sigmoid",
        }),
        (["cat", "Cat", "cafe\u0301", "caf\u00e9", *["dog"] * 6], "txt", {
            "similar_classes": r"2 groups of class names differ .*\('Cat' and 'cat'; 'cafe\\u0301' and 'caf\\xe9'\).* label map",
        }),
        (["cat", "dog", *["8"] * 4], "txt", {
            "numbers_among_names": r"1 of 3 class names are numbers \(8\); if others are wrong, use --label-by number"
        }),
        (["cat\ndog", "cat", "cat", "cat"], "txt", {
            "lines_in_names": r"1 of 2 class names have several lines \('cat\\ndog'\); .*--label-lists classes"
        }),
        (range(20), "cls", {"captions": "warning: 20 classes among 20 samples; are the cls members labels"}),
        (["red", "blue", "green"], "txt", {"captions": "warning: 3 classes among 3 samples; are the txt"}),
        (["class 2", "class 10"] * 3, "txt", {
            "classes_in_text_order": "the classes are .* class 0 is 'class 10' and comes before 'class 2'; --classes decides"
        }),
        (["cat, dog", "cat", "dog"] * 2, "txt", {
            "lists_in_names": r"1 of 3 class names are lists of others \('cat, dog'\); .*--label-lists classes"
        }),
        (['"cat"', "dog"] * 2, "txt", {"quoted_names": '1 of 2 class names have quotes \\("cat"\\)'}),
    ],
)  # fmt: skip
def test_what_changes_the_meaning_is_said_once_with_its_option(
    tmp_path: Path, labels: list[Any], extension: str, expected: dict[str, str]
) -> None:
    written = [label.encode() if isinstance(label, str) else label for label in labels]
    by_name = GivenFields(label_by="name" if extension == "txt" else None)
    report = indexed(tmp_path, labelled(*written, extension=extension), given=by_name)
    found = remarks(report)
    assert found.keys() == expected.keys()
    for kind, text in expected.items():
        assert re.match(text, found[kind]), found[kind]
    again = Accounting("members")
    list(verify_shards(report.index, members=again))
    assert again.remarks == report.members.remarks


def test_a_class_list_for_labels_from_1_needs_an_option(tmp_path: Path) -> None:
    classes = ClassList("names.txt", ("ant", "bee", "cat"))
    with pytest.raises(DataError, match="the labels are 1 to 3, and --classes has 3 names.*--first-label 1"):
        indexed(tmp_path, labelled(1, 2, 3), classes=classes)
    report = indexed(tmp_path, labelled(1, 2, 3), classes=classes, given=GivenFields(first_label=1))
    assert (report.index.classes, remarks(report)) == (classes.names, {})
    assert read_labels(report.index, Storage()).ravel().tolist() == [0, 1, 2]


def test_equal_class_names_are_made_unique_if_labels_are_numbers(tmp_path: Path) -> None:
    twins = ClassList("names.txt", ("crane", "ant", "crane"))
    report = indexed(tmp_path / "numbers", labelled(0, 1, 2), classes=twins)
    assert report.index.classes == ("crane (0)", "ant", "crane (2)")
    assert "equal_names" in remarks(report)
    with pytest.raises(DataError, match=r"names.txt: class crane is repeated"):
        indexed(tmp_path / "names", labelled("crane", "ant", extension="txt"), classes=twins)
    ids = ClassList("index.json", ("crane", "crane"), ("n01", "n02"))
    assert indexed(tmp_path / "ids", labelled("n02", extension="txt"), classes=ids).index.classes == ("n01", "n02")


def test_extensions_behind_the_first_dot_are_fields_if_they_are_given(tmp_path: Path) -> None:
    members = [member for n in range(3) for member in ((f"s{n}.input.jpg", JPEG), (f"s{n}.target.cls", b"%d" % n))]
    with pytest.raises(DataError, match="--image-field input.jpg --label-field target.cls"):
        indexed(tmp_path, members)
    report = indexed(tmp_path, members, given=GivenFields(("input.jpg",), "target.cls"))
    assert report.members.taken == {"images": 3, "labels": 3}
    assert read_labels(report.index, Storage()).ravel().tolist() == [0, 1, 2]


def test_extensions_that_could_be_given_are_listed(tmp_path: Path) -> None:
    members = [member for n in range(3) for member in ((f"s{n}.left.jpg", JPEG), (f"s{n}.cls", b"%d" % n))]
    with pytest.raises(
        DataError, match="no jpg, .* members; of 3 samples these have: cls 3, left.jpg 3; .*--image-field"
    ):
        indexed(tmp_path, members)
    assert indexed(tmp_path, members, given=GivenFields(("left.jpg",))).members.taken == {"images": 3, "labels": 3}


def test_shards_with_the_same_content_or_without_a_usable_sample_are_named(tmp_path: Path) -> None:
    write_members(tmp_path / "a-1.tar", labelled(0, 1))
    write_members(tmp_path / "a-2.tar", labelled("cat", "dog"))
    found = remarks(indexed(tmp_path, labelled(0, 1)))
    assert "1 shards have the same content as others (a-1.tar as a-0.tar)" in found["identical_shards"]
    assert "no sample of 1 of 3 shards is usable (first: a-2.tar)" in found["shards_without_usable_samples"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"version https://git-lfs.github.com/spec/v1\n", "pointer of Git LFS .*git lfs pull"),
        (b"\n<!DOCTYPE html><html>Log in", "a web page .*download it again"),
        (gzip.compress(b"x", mtime=0), "compressed with gzip; .*decompress it"),
    ],
)
def test_files_that_are_no_tars_are_named(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "a-1.tar").write_bytes(content)
    with pytest.raises(DataError, match=f"none of 1 tars has samples, from a-1.tar on, which is .*{message}"):
        index_shards([str(tmp_path)])
    with pytest.raises(DataError, match=rf"1 of 2 shards are broken: a-1.tar \(.*{message}"):
        indexed(tmp_path, labelled(0))


@pytest.mark.parametrize("labels", [[0, 1, -1], ["a", "b", "-1"]])
def test_a_label_to_be_ignored_that_no_sample_has_is_said(tmp_path: Path, labels: list[Any]) -> None:
    given = GivenFields(label_by="name" if "a" in labels else "number", ignored_labels=("-1", "7"))
    report = indexed(tmp_path, labelled(*labels), given=given)
    assert remarks(report)["ignored_label_unseen"] == "no sample has the label 7 of --ignore-label"


def test_members_of_a_sample_that_do_not_follow_each_other_are_told(tmp_path: Path) -> None:
    scattered = sorted(labelled(0, 1), key=lambda member: member[0][-3:])
    with pytest.raises(DataError, match="none of 4 samples is usable.*has no image; .*made with --sort=name"):
        indexed(tmp_path / "all", scattered)
    report = indexed(tmp_path / "some", [("t.jpg", JPEG), ("t.cls", b"2"), *scattered])
    assert remarks(report)["repeated_keys"].startswith("2 keys come again in their shard: the members of a sample")


def test_other_keys_that_may_be_the_label_are_named(tmp_path: Path) -> None:
    report = indexed(tmp_path, labelled('{"label": 1, "label_12k": -1, "width": 3}', '{"label": 0}', extension="json"))
    assert "under the key 'label' (--label-key, not 'label_12k')" in report.inferred


def test_jpegs_with_rare_extensions_are_images(tmp_path: Path) -> None:
    members = [("a.jfif", JPEG), ("a.cls", b"0"), ("b.jpe", JPEG), ("b.cls", b"1"), ("c.JPG", JPEG), ("c.cls", b"2")]
    report = indexed(tmp_path, members)
    assert report.index.image_fields == ("jpg", "jfif", "jpe")
    assert Counter(report.formats) == {("jfif", "JPEG"): 1, ("jpe", "JPEG"): 1, ("jpg", "JPEG"): 1}
    assert np.array_equal(read_labels(report.index, Storage()), [[0], [1], [2]])
