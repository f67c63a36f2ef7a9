"""Indexed WebDatasets as sources: shuffled once for all, with everything that an index describes carried over."""

import io
import json
import tarfile
from collections import Counter
from pathlib import Path
from shutil import copytree
from typing import Any

import pytest

from data.accounting import Accounting
from data.building.build import build_shards, merge_parts
from data.classes.class_lists import ClassList
from data.classes.class_mixing import class_mixing, dataset_labels
from data.dataset import open_dataset
from data.errors import DataError
from data.index import LabelFormat, ShardIndex, read_index
from data.indexing.index_shards import index_shards
from data.indexing.inference import GivenFields
from data.order import SampleOrder
from data.remote.storage import Storage
from data.sample_reader import SampleReader
from tests.servers.s3 import S3Server
from tests.support.third_party import picture


def samples(folder: Path) -> Counter[tuple[str, bytes, tuple[int, ...]]]:
    """Key without the number of its repetition, image and labels of every sample."""
    dataset = open_dataset(str(folder), Storage())
    reader = SampleReader(dataset, None)
    read = [
        reader.read(shard, number)
        for shard, count in enumerate(dataset.shard_samples.tolist())
        for number in range(count)
    ]
    return Counter((sample.key.partition("~")[0], sample.image, sample.labels) for sample in read)


def test_a_sorted_dataset_is_shuffled_with_the_same_samples_and_classes(sorted_shards: Path, tmp_path: Path) -> None:
    report = build_shards(sorted_shards, tmp_path / "out", samples_per_shard=30)
    index = report.indexes[tmp_path / "out"]
    assert index.classes == read_index(sorted_shards).classes
    assert samples(tmp_path / "out") == samples(sorted_shards)
    assert (report.accounting.found, report.accounting.taken) == (248, {"images": 240, "shards": 8})
    assert not report.left_out
    assert any("what else samples have is not: id in .json" in remark.text for remark in report.accounting.remarks)
    mixing = {}
    for folder in (sorted_shards, tmp_path / "out"):
        dataset = open_dataset(str(folder), Storage())
        labels = dataset_labels(dataset)
        assert labels is not None
        order = SampleOrder(dataset.shard_samples, seed=0, batch=24, lanes=1, window=30)
        mixing[folder] = class_mixing(labels, order, 24).batch.share
    assert mixing[sorted_shards] < 0.3
    assert mixing[tmp_path / "out"] > 0.9


def test_an_index_elsewhere_parts_and_the_location_of_the_file_give_the_same_shards(
    sorted_shards: Path, tmp_path: Path
) -> None:
    names = read_index(sorted_shards).classes
    given = GivenFields(label_key="label")
    index_shards([str(sorted_shards)], given=given, classes=ClassList("", names), output=str(tmp_path / "index"))
    for number in (1, 2):
        build_shards(tmp_path / "index" / "index.json", tmp_path / "parts", part=(number, 2), memory=2**16)
    (index,) = merge_parts(tmp_path / "parts").indexes.values()
    assert index.digest == build_shards(sorted_shards, tmp_path / "whole").indexes[tmp_path / "whole"].digest


def test_a_remote_dataset_gives_the_same_shards(sorted_shards: Path, tmp_path: Path, s3: S3Server) -> None:
    url = s3.put(sorted_shards, tmp_path.name)
    remote = build_shards(f"{url}/index.json", tmp_path / "remote").indexes[tmp_path / "remote"]
    assert remote.digest == build_shards(sorted_shards, tmp_path / "local").indexes[tmp_path / "local"].digest


def write(folder: Path, members: list[tuple[str, bytes]]) -> None:
    folder.mkdir()
    with tarfile.open(folder / "a.tar", "w") as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))


def test_several_labels_and_classes_of_equal_names_stay_what_they_are(pictures: Path, tmp_path: Path) -> None:
    images = [path.read_bytes() for path in sorted(pictures.rglob("*.jpg"))[:6]]
    labels = [[0, 2], [1], [2], [0, 1, 2], [3], [1]]
    write(
        tmp_path / "in",
        [m for n in range(6) for m in ((f"a/{n}.jpg", images[n]), (f"a/{n}.json", json.dumps(labels[n]).encode()))],
    )
    index_shards([str(tmp_path / "in")], classes=ClassList("", ("crane", "dog", "crane 2", "cat", "unused")))
    index = read_index(tmp_path / "in")
    ShardIndex(index.folder, ("crane", "dog", "crane", "cat", "unused"), index.image_fields, index.label, index.shards,
               index.labels_per_sample, index.labels_sha256).write()  # fmt: skip
    built = build_shards(tmp_path / "in", tmp_path / "out").indexes[tmp_path / "out"]
    assert built.classes == ("crane", "dog", "crane", "cat", "unused")
    assert samples(tmp_path / "out") == Counter((f"a/{n}", images[n], tuple(labels[n])) for n in range(6))
    (tmp_path / "names.txt").write_text("dog\ncat\nunused\ncrane\n")
    renamed = build_shards(tmp_path / "in", tmp_path / "renamed", classes=tmp_path / "names.txt")
    assert renamed.indexes[tmp_path / "renamed"].classes == ("dog", "cat", "unused", "crane")
    translation = {0: 3, 1: 0, 2: 3, 3: 1}
    expected = [tuple(sorted({translation[label] for label in row})) for row in labels]
    assert samples(tmp_path / "renamed") == Counter((f"a/{n}", images[n], expected[n]) for n in range(6))


def test_samples_with_an_ignored_label_are_left_out_and_keys_beside_the_label_are_named(tmp_path: Path) -> None:
    labels = [json.dumps({"label": n % 3, "lab": 7}).encode() for n in range(6)]
    write(tmp_path / "in", [m for n in range(6) for m in ((f"{n}.jpg", picture(n)), (f"{n}.json", labels[n]))])
    index_shards([str(tmp_path / "in")], given=GivenFields(label_key="label", ignored_labels=("2",)))
    report = build_shards(tmp_path / "in", tmp_path / "out")
    left_out = report.accounting.left_out["a label to be ignored"]
    assert (report.images, left_out.count, left_out.first) == (4, 2, ["a.tar: 2", "a.tar: 5"])
    (text,) = [remark.text for remark in report.accounting.remarks if remark.kind == "other_content"]
    assert text.endswith("what else samples have is not: lab in .json")


def test_unusable_samples_are_refused_or_left_out_counted_and_named(pictures: Path, tmp_path: Path) -> None:
    images = [path.read_bytes() for path in sorted(pictures.rglob("*.jpg"))[:5]]
    members = [(f"{n}.jpg", image) for n, image in enumerate(images)] + [("5.jpg", images[0][:99]), ("6.txt", b"x")]
    labelled = [
        m for n, m in enumerate(members) for m in (m, (f"{n}.cls", b"9" if n == 1 else b"0")) if m[0] != "3.cls"
    ]
    write(tmp_path / "in", labelled)
    index_shards([str(tmp_path / "in")], classes=ClassList("", ("only",)))
    with pytest.raises(DataError, match=r"4 of 7 images cannot be decoded: .*--skip-broken"):
        build_shards(tmp_path / "in", tmp_path / "out")
    report = build_shards(tmp_path / "in", tmp_path / "out", skip_broken=True)
    reasons = {broken.name: broken.reason for broken in report.left_out}
    assert reasons["a.tar: 1"] == "the label 9 is not one of 1 classes"
    assert reasons["a.tar: 3"] == "it has no label"
    assert reasons["a.tar: 6"] == "it has no image"
    assert [name for name in reasons if name.startswith("5.sample 5 of a (shard 0)")]
    counts = {reason: entries.count for reason, entries in report.accounting.left_out.items()}
    assert (report.accounting.found, report.accounting.taken, sum(counts.values())) == (
        8,
        {"images": 3, "shards": 1},
        4,
    )
    assert any(".txt members" in remark.text for remark in report.accounting.remarks)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": "labels.txt"}, "has an index with its labels; leave out --labels"),
        ({"shard": "part-3.tar"}, "shard part-3.tar is missing"),
        ({"index": "changed"}, "the index has changed since its shards were read"),
    ],
)
def test_what_does_not_fit_is_refused(
    sorted_shards: Path, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    copytree(sorted_shards, tmp_path / "in")
    index = ShardIndex(**{**_fields(read_index(tmp_path / "in")), "folder": str(tmp_path / "in"), "home": ""})
    index.write()
    options: dict[str, Any] = {}
    if "labels" in change:
        (tmp_path / "labels.txt").write_text("a b\n")
        options["labels"] = tmp_path / "labels.txt"
    if "shard" in change:
        (tmp_path / "in" / change["shard"]).unlink()

    def build() -> None:
        build_shards(tmp_path / "in", tmp_path / "out", part=(1, 1), **options)
        ShardIndex(**{**_fields(index), "classes": (*index.classes, "another")}).write()
        merge_parts(tmp_path / "out")

    with pytest.raises(DataError, match=message):
        build()


def _fields(index: ShardIndex) -> dict[str, Any]:
    return {name: getattr(index, name) for name in ShardIndex.__slots__}


def test_an_index_of_something_else_is_no_dataset(pictures: Path, tmp_path: Path) -> None:
    copytree(pictures, tmp_path / "in")
    (tmp_path / "in" / "index.json").write_text('{"pages": 3}')
    report = build_shards(tmp_path / "in", tmp_path / "out")
    assert isinstance(report.accounting, Accounting)
    assert report.indexes[tmp_path / "out"].label == LabelFormat()
    assert report.images == 60
