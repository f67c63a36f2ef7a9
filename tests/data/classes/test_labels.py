"""Labels of samples, and maps to other classes."""

from dataclasses import replace
from pathlib import Path
from shutil import copytree

import numpy as np
import pytest

from data.classes.labels import LabelReader, read_label_map
from data.dataset import Dataset, open_dataset
from data.errors import DataError
from data.index import LabelFormat, labels_file, read_index
from data.remote.storage import Storage
from data.sample_reader import SampleReader
from data.shard import Shard

NAMES = ("ant", "bee", "cat")


@pytest.mark.parametrize(
    ("label", "content", "expected"),
    [
        (LabelFormat(), b"2", (2,)),
        (LabelFormat(), b" 1\n", (1,)),
        (LabelFormat("txt", by="name"), b"bee\n", (1,)),
        (LabelFormat("json"), b"2", (2,)),
        (LabelFormat("json"), b"[2, 0, 2]", (0, 2)),
        (LabelFormat("json", "label"), b'{"label": "1", "x": 3}', (1,)),
        (LabelFormat("json", "labels"), b'{"labels": [0, 1]}', (0, 1)),
        (LabelFormat("json", "wnid", "name"), b'{"wnid": "cat"}', (2,)),
        (LabelFormat(), b"\xef\xbb\xbf2\r\n", (2,)),
        (LabelFormat("txt", by="name"), "cat\n".encode("utf-16"), (2,)),
        (LabelFormat("json", "label"), b'\xef\xbb\xbf{"label": 1}', (1,)),
        (LabelFormat(), b"2.0", (2,)),
        (LabelFormat(), b"01", (1,)),
        (LabelFormat("json", "label"), b'{"label": 2.0}', (2,)),
        (LabelFormat("json", "label"), b'{"label": " 2 "}', (2,)),
        (LabelFormat("json", "a.b"), b'{"a": {"b": 2}}', (2,)),
        (LabelFormat("json", "a.b"), b'{"a.b": 1, "a": {"b": 2}}', (1,)),
        (LabelFormat("json", lists="multi-hot"), b"[0, 1, 1]", (1, 2)),
        (LabelFormat("json", lists="multi-hot"), b"[false, true, 0.0]", (1,)),
        (LabelFormat(lists="multi-hot"), b"0 0 1", (2,)),
        (LabelFormat(lists="classes"), b"2, 0", (0, 2)),
        (LabelFormat(lists="classes"), b"[2, 0]", (0, 2)),
        (LabelFormat("txt", by="name", lists="classes"), b"cat, ant", (0, 2)),
        (LabelFormat(first=1), b"3", (2,)),
        (LabelFormat(), b"2\0", (2,)),
        (LabelFormat("json", "label"), b'{"label": 1, "x": 1, "x": 2}', (1,)),
        (LabelFormat("json", ignored=("-1", "9")), b"[-1, 1, 9]", (1,)),
    ],
)
def test_labels_are_read_in_the_format_of_the_index(
    label: LabelFormat, content: bytes, expected: tuple[int, ...]
) -> None:
    assert LabelReader(label, NAMES)(content) == expected


@pytest.mark.parametrize(
    ("label", "content", "message"),
    [
        (LabelFormat(), b"", "no label in b''"),
        (LabelFormat(), b"cat", "the label 'cat' is not a number"),
        (LabelFormat(), b"3", "the label 3 is not one of 3 classes"),
        (LabelFormat(), b"-1", "the label -1 is not one of 3 classes"),
        (LabelFormat(), b"\xff", "the label is not text"),
        (LabelFormat("txt", by="name"), b"dog", "the label 'dog' is not in the class list"),
        (LabelFormat("json", "label"), b'{"other": 1}', "the label is not JSON with 'label'"),
        (LabelFormat("json", "label"), b"[1]", "the label is not JSON with 'label'"),
        (LabelFormat("json"), b"[]", "no label in"),
        (LabelFormat("json"), b"true", "the label 'True' is not a number"),
        (LabelFormat("json"), b"1.5", "the label 1.5 is not a whole number"),
        (LabelFormat(), b"3.5", "the label 3.5 is not a whole number"),
        (LabelFormat("json"), b"NaN", "the label nan is not a whole number"),
        (LabelFormat(), b"1e0", "the label '1e0' is not a number"),
        (LabelFormat("json"), b"null", "no label in b'null'"),
        (LabelFormat("json", "a.b"), b'{"a": {"c": 1}}', "the label is not JSON with 'a.b'"),
        (LabelFormat(ignored=("-1",)), b"-1", "the label -1 is ignored"),
        (LabelFormat("json", lists="multi-hot"), b"[0, 1]", "a list of 2 numbers, not one for each of 3 classes"),
        (LabelFormat("json", lists="multi-hot"), b"[0, 2, 0]", r"the label \[0, 2, 0\] has other numbers than 0 and 1"),
        (LabelFormat("json", lists="multi-hot"), b"[0, 0, 0]", "the label has 0 for each of 3 classes"),
        (LabelFormat(first=1), b"0", "the label 0 is not one of 3 classes"),
        (LabelFormat("json"), b"[" * 100_000, "the label is not JSON"),
        (LabelFormat(by="name"), b"\x01\0\0\0", "the label is not text"),
        (LabelFormat("json", "label"), b'{"label": 1, "label": 2}', "the key 'label' is there twice"),
    ],
)
def test_invalid_labels_are_reported(label: LabelFormat, content: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LabelReader(label, NAMES)(content)


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("text", "classes", "targets"),
    [
        ("rename: {cat: pet}", ("ant", "bee", "pet"), [0, 1, 2]),
        ("rename: {cat: 'null', bee: 'drop'}", ("ant", "drop", "null"), [0, 1, 2]),
        ("rename: {ant: insect, bee: insect}", ("cat", "insect"), [1, 1, 0]),
        ("rename: {ant: ant, cat: cat}\nothers: drop", ("ant", "cat"), [0, -1, 1]),
        ("rename: {ant: insect, bee: insect}\nclasses: [insect, cat]", ("insect", "cat"), [0, 0, 1]),
    ],
)
def test_a_label_map_renames_merges_and_drops(
    tmp_path: Path, text: str, classes: tuple[str, ...], targets: list[int]
) -> None:
    found = read_label_map(write(tmp_path / "map.yaml", text), NAMES)
    assert (found.classes, found.targets.tolist()) == (classes, targets)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[", "not YAML"),
        ("drop: [ant]", "may only have the keys rename, others and classes"),
        ("others: forget", "others keep or drop"),
        ("rename:\n  dog: pet", r"map.yaml:2: dog is not a class of the shards \(1 of 1 are not\)$"),
        ("rename:\n  Cat: pet", r"Cat is not a class of the shards \(1 of 1 are not\); did you mean cat\?$"),
        ("classes: [ant, bee]", r"cat is missing under classes \(1 names are\)"),
        ("classes: [ant, bee, cat, cat]", "a name is repeated"),
        (
            "others: keep\nrename:\n  cat: pet\n  cat: lion",
            r"map.yaml:4: rename.cat is given twice \(first at .*map.yaml:3\); remove one",
        ),
        ("rename: {cat: [pet]}", "rename must be a mapping of names"),
        ("others: drop", "no class is kept"),
        ("rename:\n  ant: a\n  cat: null", "map.yaml:3: cat: null is no name; to drop classes use others: drop"),
        ("rename: {cat: }", "cat: nothing is no name"),
        ("rename: {cat: ' '}", "cat: nothing is no name"),
        ("rename: {cat: drop}", "cat: drop is no name"),
        ("rename: {cat: Bee}", "'Bee' and 'bee' differ in case, spaces or Unicode form only"),
        ("rename: {ant: 'pet ', bee: pet}", "'pet' and 'pet ' differ"),
    ],
)
def test_a_label_map_that_does_not_match_is_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_label_map(write(tmp_path / "map.yaml", text), NAMES)


def test_names_in_a_label_map_are_strings_as_they_are_written(tmp_path: Path) -> None:
    classes = ("no", "010", "8", "1e3", "null")
    path = write(tmp_path / "map.yaml", "\ufeffrename: {no: yes, 010: ten, 1e3: on}\nclasses: [yes, ten, 8, on, null]")
    found = read_label_map(path, classes)
    assert (found.classes, found.targets.tolist()) == (("yes", "ten", "8", "on", "null"), [0, 1, 2, 3, 4])


def test_a_label_map_that_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"map\.yaml: no such label map"):
        read_label_map(tmp_path / "map.yaml", NAMES)


@pytest.fixture
def labelled(shards: Path, tmp_path: Path) -> Path:
    """The training shards with `labels.npy`."""

    folder = Path(copytree(shards / "train", tmp_path / "labelled"))
    index = read_index(folder)
    dataset = Dataset(index)

    labels = []
    for number, entry in enumerate(index.shards):
        shard = Shard(Path(index.location(number)), index.image_fields, index.label.field, entry.samples)
        labels += [dataset.labels(shard.read(place).label) for place in range(entry.samples)]
    content, sha256 = labels_file(np.array(labels, np.int32))
    (folder / "labels.npy").write_bytes(content)
    replace(index, labels_sha256=sha256).write()
    return folder


def test_dropped_classes_are_not_part_of_an_epoch(labelled: Path, tmp_path: Path) -> None:
    label_map = write(tmp_path / "map.yaml", "rename: {bright: light, striped: pattern}\nothers: drop")
    dataset = open_dataset(str(labelled), Storage(), label_map)
    whole = open_dataset(str(labelled), Storage())
    assert (dataset.classes, dataset.samples, whole.samples) == (("light", "pattern"), 30, 45)
    assert dataset.digest != whole.digest

    reader = SampleReader(dataset, None)
    found = [reader.read(shard, number) for shard, size in enumerate(dataset.shard_samples) for number in range(size)]
    assert len({sample.key for sample in found}) == 30
    for sample in found:
        assert sample.labels == ({"bright": 0, "striped": 1}[sample.key.split("/")[0]],)


def test_a_label_map_that_drops_classes_needs_labels_npy(labelled: Path, tmp_path: Path) -> None:
    label_map = write(tmp_path / "map.yaml", "rename: {bright: light}\nothers: drop")
    (labelled / "labels.npy").write_bytes(b"other")
    with pytest.raises(DataError, match=r"labels\.npy: does not match the index"):
        open_dataset(str(labelled), Storage(), label_map)
    (labelled / "labels.npy").unlink()
    with pytest.raises(DataError, match=r"labels\.npy is missing; copy it there or run"):
        open_dataset(str(labelled), Storage(), label_map)
