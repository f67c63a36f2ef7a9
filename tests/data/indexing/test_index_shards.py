"""Indexing existing WebDatasets: what is indexed, what is inferred, and which problems are reported."""

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data.classes.class_lists import ClassList
from data.dataset import open_dataset
from data.errors import DataError, StorageRefused
from data.images.decode import decode
from data.index import LabelFormat, read_index, read_labels
from data.indexing.index_shards import IndexingReport, index_shards
from data.indexing.inference import GivenFields
from data.indexing.scan import Problem, ScanOptions
from data.remote.cache import Cache
from data.remote.storage import Storage
from data.sample_reader import SampleReader
from data.shard import BrokenSample
from tests.servers.fault_proxy import Fault, FaultProxy
from tests.servers.s3 import S3Server
from tests.support.third_party import picture, samples, tar_bytes, write_members, write_shards

NAMES = ("ant", "bee", "cat")
Label = Callable[[int], dict[str, Any]]


def read_back(folder: str, cache: Cache | None = None) -> dict[str, tuple[bytes, tuple[int, ...]]]:
    """Key -> image and labels, as a run reads them."""
    dataset = open_dataset(folder, Storage())
    reader = SampleReader(dataset, cache)
    reader.request(range(len(dataset.shard_samples)))
    found = {}
    for shard, count in enumerate(dataset.shard_samples.tolist()):
        for number in range(count):
            sample = reader.read(shard, number)
            found[sample.key] = (sample.image, sample.labels)
    reader.close()
    return found


@pytest.mark.parametrize(
    ("label", "label_format", "classes"),
    [
        (lambda n: {"cls": n % 3}, LabelFormat("cls"), ("0", "1", "2")),
        (lambda n: {"cls": NAMES[n % 3]}, LabelFormat("cls", None, "name"), NAMES),
        (lambda n: {"txt": f"{NAMES[n % 3]}\n"}, LabelFormat("txt", None, "name"), NAMES),
        (lambda n: {"json": n % 3}, LabelFormat("json"), ("0", "1", "2")),
        (lambda n: {"json": {"width": 5, "label": n % 3}}, LabelFormat("json", "label"), ("0", "1", "2")),
        (lambda n: {"json": {"animal": NAMES[n % 3]}}, LabelFormat("json", "animal", "name"), NAMES),
        (lambda n: {"json": {"w": 1}, "txt": NAMES[n % 3], "cls": n % 3}, LabelFormat("cls"), ("0", "1", "2")),
        (lambda n: {"json": {"w": 1, "h": 2}, "txt": NAMES[n % 3]}, LabelFormat("txt", None, "name"), NAMES),
    ],
)
@pytest.mark.parametrize(("extension", "image_format"), [("jpg", "JPEG"), ("png", "PNG"), ("webp", "WEBP")])
def test_shards_written_by_webdataset_are_indexed_and_read_back(
    tmp_path: Path, label: Label, label_format: LabelFormat, classes: tuple[str, ...], extension: str, image_format: str
) -> None:
    content = samples(10, label, extension, image_format)
    write_shards(tmp_path, content)
    report = index_shards([str(tmp_path / "in-{0000..0002}.tar")])
    index = read_index(tmp_path)
    assert index == report.index
    assert (index.label, index.classes, index.image_fields) == (label_format, classes, (extension,))
    assert [shard.samples for shard in index.shards] == [4, 4, 2]
    assert read_back(str(tmp_path)) == {
        sample["__key__"]: (sample[extension], (number % 3,)) for number, sample in enumerate(content)
    }
    assert read_labels(index, Storage()).tolist() == [[number % 3] for number in range(10)]
    assert report.problems.samples == 0


def test_shards_of_several_folders_are_indexed_below_their_common_one(tmp_path: Path) -> None:
    content = samples(8, lambda n: {"cls": n % 3})
    write_shards(tmp_path / "set/a", content[:4])
    write_shards(tmp_path / "set/b", content[4:])
    index_shards([str(tmp_path / "set/{a,b}/in-0000.tar")])
    assert [shard.name for shard in read_index(tmp_path / "set").shards] == ["a/in-0000.tar", "b/in-0000.tar"]
    assert len(read_back(str(tmp_path / "set"))) == 8


def test_an_index_elsewhere_names_the_folder_of_the_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_shards(tmp_path / "shards", samples(4, lambda n: {"cls": n % 3}))
    monkeypatch.chdir(tmp_path)
    index_shards(["shards"], output="indexes/mine")
    monkeypatch.chdir("/")
    assert sorted(path.name for path in (tmp_path / "indexes/mine").iterdir()) == [
        "index.json",
        "labels.npy",
        "report.json",
    ]
    assert sorted(path.name for path in (tmp_path / "shards").iterdir()) == ["in-0000.tar"]
    assert len(read_back(str(tmp_path / "indexes/mine"))) == 4


def test_several_labels_per_sample_are_kept(tmp_path: Path) -> None:
    labels = [["cat", "ant"], ["bee"], ["bee", "cat", "bee"]]
    write_shards(tmp_path, samples(3, lambda n: {"json": {"labels": labels[n]}}))
    index = index_shards([str(tmp_path)]).index
    assert (index.labels_per_sample, index.classes) == (2, NAMES)
    assert read_labels(index, Storage()).tolist() == [[0, 2], [1, -1], [1, 2]]
    assert [found[1] for found in read_back(str(tmp_path)).values()] == [(0, 2), (1,), (1, 2)]


def test_a_class_list_gives_names_and_order(tmp_path: Path) -> None:
    write_shards(tmp_path / "numbers", samples(3, lambda n: {"cls": n}))
    write_shards(tmp_path / "names", samples(3, lambda n: {"cls": NAMES[n]}))
    classes = ClassList("", ("cat", "bee", "ant", "yak"))
    assert index_shards([str(tmp_path / "numbers")], classes=classes).index.classes == ("cat", "bee", "ant", "yak")
    index_shards([str(tmp_path / "names")], classes=classes)
    assert [labels for _, labels in read_back(str(tmp_path / "names")).values()] == [(2,), (1,), (0,)]


def test_a_mask_that_accompanies_the_image_is_ignored(tmp_path: Path) -> None:
    content = [sample | {"png": picture(1, "PNG")} for sample in samples(4, lambda n: {"cls": n % 3})]
    write_shards(tmp_path, content)
    report = index_shards([str(tmp_path)])
    assert report.index.image_fields == ("jpg",)
    assert report.problems.samples == 0
    assert "png members accompany jpg ones and are ignored" in report.inferred


def test_images_with_several_extensions_including_a_given_one_are_indexed(tmp_path: Path) -> None:
    content = [
        {"__key__": "a", "jpg": picture(0), "cls": 0},
        {"__key__": "b", "JPEG": picture(1), "cls": 1},
        {"__key__": "c", "img": picture(2, "PNG"), "cls": 2},
    ]
    write_shards(tmp_path, content)
    report = index_shards([str(tmp_path)], given=GivenFields(image_fields=("jpg", "jpeg", "img")))
    assert report.formats == {("jpg", "JPEG"): 1, ("jpeg", "JPEG"): 1, ("img", "PNG"): 1}
    assert set(read_back(str(tmp_path))) == {"a", "b", "c"}


OTHER_MEMBERS = tar_bytes([("README", b"x"), ("x.md", b"y")])
GOOD = [("good.jpg", picture(0)), ("good.cls", b"0")]


@pytest.mark.parametrize(
    ("members", "problem", "key", "detail"),
    [
        ([("bad.cls", b"0")], Problem.NO_IMAGE, "bad", ""),
        ([("d/bad.jpg", picture(1))], Problem.NO_LABEL, "d/bad", ""),
        ([("bad.jpg", picture(1)), ("bad.cls", b"")], Problem.LABEL_UNREADABLE, "bad", "no label in b''"),
        (
            [("bad.jpg", picture(1)), ("bad.cls", b"x")],
            Problem.LABEL_UNREADABLE,
            "bad",
            "the label 'x' is not a number",
        ),
        ([("bad.jpg", picture(1)), ("bad.cls", b"-1")], Problem.LABEL_UNKNOWN, "bad", "-1"),
        ([("bad.jpg", picture(1)), ("bad.cls", b"3")], Problem.LABEL_UNKNOWN, "bad", "3"),
        ([("bad.jpg", b""), ("bad.cls", b"0")], Problem.IMAGE_EMPTY, "bad", ""),
        ([("bad.jpg", b"<html>"), ("bad.cls", b"0")], Problem.IMAGE_UNKNOWN, "bad", ""),
        ([("x.jpg", picture(1)), ("x.cls", b"0"), *GOOD], Problem.KEY_REPEATED, "good", ""),
    ],
)
def test_a_sample_with_a_problem_is_named_and_refused_by_the_reader(
    tmp_path: Path, members: list[tuple[str, bytes]], problem: Problem, key: str, detail: str
) -> None:
    write_members(tmp_path / "0.tar", GOOD)
    write_members(tmp_path / "1.tar", [("good.jpg", picture(0)), ("good.cls", b"0"), *members])
    report = index_shards([str(tmp_path)], classes=ClassList("", NAMES))
    assert report.problems.first == {problem: [("1.tar", key, detail)]}
    assert (report.problems.samples, report.index.samples) == (1, 3 if len(members) < 4 else 4)
    broken = 0
    reader = SampleReader(open_dataset(str(tmp_path), Storage()), None)
    for shard, entry in enumerate(report.index.shards):
        for number in range(entry.samples):
            try:
                decode(reader.read(shard, number).image)
            except (BrokenSample, ValueError):
                broken += 1
    assert broken == 1


def test_keys_repeated_across_shards_are_counted_but_not_a_problem(tmp_path: Path) -> None:
    write_shards(tmp_path, samples(4, lambda n: {"cls": n % 3}), per_shard=2, name="a")
    write_shards(tmp_path, samples(3, lambda n: {"cls": n % 3}), name="b")
    report = index_shards([str(tmp_path)])
    assert report.repeated_keys == 3
    assert report.repeated_key == ("picture_0000", "a-0000.tar", "b-0000.tar")
    assert report.problems.samples == 0


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda data: b"", "an empty file"),
        (lambda data: b"<html>" * 400, "no tar header at byte 0"),
        (lambda data: b"\x1f\x8b" + data, "compressed with gzip; shards are uncompressed tars"),
        (lambda data: data[:3000], "ends after 3,000 bytes"),
        (lambda data: data[:1024] + b"\xff" * 512 + data[1536:], "no tar header at byte 1,024"),
        (lambda data: OTHER_MEMBERS, "it has no samples with these fields"),
    ],
)
def test_a_broken_shard_is_refused_unless_broken_shards_are_skipped(
    tmp_path: Path, spoil: Callable[[bytes], bytes], message: str
) -> None:
    write_shards(tmp_path, samples(12, lambda n: {"cls": n % 3}))
    shard = tmp_path / "in-0001.tar"
    shard.write_bytes(spoil(shard.read_bytes()))
    with pytest.raises(DataError, match=f"1 of 3 shards are broken: in-0001.tar .{message}.*--skip-broken-shards"):
        index_shards([str(tmp_path)])
    assert not (tmp_path / "index.json").exists()
    report = index_shards([str(tmp_path)], skip_broken_shards=True)
    assert [shard.name for shard in report.index.shards] == ["in-0000.tar", "in-0002.tar"]
    assert list(report.left_out) == ["in-0001.tar"]
    assert len(read_back(str(tmp_path))) == 8


def test_a_broken_first_shard_does_not_prevent_the_inference(tmp_path: Path) -> None:
    write_shards(tmp_path, samples(8, lambda n: {"cls": n % 3}))
    (tmp_path / "in-0000.tar").write_bytes(b"x" * 600)
    assert index_shards([str(tmp_path)], skip_broken_shards=True).index.samples == 4


@pytest.mark.parametrize(
    ("label", "given", "message"),
    [
        (
            lambda n: {"x": b""},
            GivenFields(),
            "no cls, json, txt members with a label; of 4 samples these have: jpg 4, x 4",
        ),
        (lambda n: {"json": {"w": n, "h": n}}, GivenFields(), "no cls, json, txt members with a label"),
        (
            lambda n: {"json": {"w": n, "h": n}},
            GivenFields(label_field="json"),
            "which key of its json members is the label",
        ),
        (
            lambda n: {"json": {"w": n}},
            GivenFields(label_key="label"),
            "no label in the first json members under the key 'label'",
        ),
        (lambda n: {"cls": n}, GivenFields(label_field="txt"), "no txt members; of 4 samples these have: cls 4, jpg 4"),
        (lambda n: {"cls": n}, GivenFields(image_fields=("tiff",)), "no tiff members"),
        (lambda n: {"cls": 10**7 + n}, GivenFields(), "would make 10,000,004 classes"),
        (
            lambda n: {"cls": "x"},
            GivenFields(label_by="number"),
            "none of 4 samples is usable; the first, picture_0000",
        ),
    ],
)
def test_members_that_cannot_be_interpreted_are_reported(
    tmp_path: Path, label: Label, given: GivenFields, message: str
) -> None:
    write_shards(tmp_path, samples(4, label))
    with pytest.raises(DataError, match=message):
        index_shards([str(tmp_path)], given=given)
    assert not (tmp_path / "index.json").exists()


def test_the_index_does_not_depend_on_the_number_of_threads(tmp_path: Path) -> None:
    write_shards(tmp_path / "shards", samples(40, lambda n: {"txt": f"class {n % 7}"}), per_shard=3)
    written = []
    for threads in (1, 2, 9):
        output = tmp_path / str(threads)
        report = index_shards([str(tmp_path / "shards")], output=str(output), scanning=ScanOptions(threads=threads))
        written.append(
            (report.index.digest, (output / "index.json").read_bytes(), (output / "labels.npy").read_bytes())
        )
    assert written[0] == written[1] == written[2]


def indexed(folder: Path, **options: Any) -> IndexingReport:
    return index_shards([str(folder)], **options)


def test_an_index_is_replaced_on_request_or_if_its_version_is_older(tmp_path: Path) -> None:
    write_shards(tmp_path, samples(4, lambda n: {"cls": n % 3}))
    indexed(tmp_path)
    with pytest.raises(DataError, match="already exists; .*coatnet shards verify, or replace it with --overwrite"):
        indexed(tmp_path)
    indexed(tmp_path, overwrite=True)
    path = tmp_path / "index.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"version": 1}))
    indexed(tmp_path)
    assert read_index(tmp_path).samples == 4
    path.write_text('{"of": "another program"}')
    with pytest.raises(DataError, match="not an index of shards; choose another folder with --output"):
        indexed(tmp_path)


def test_decoding_tells_whether_every_image_decodes(tmp_path: Path) -> None:
    whole = write_shards(tmp_path / "whole", samples(6, lambda n: {"cls": n % 3}))
    plain = index_shards([str(whole)])
    assert not read_index(whole).images_decode
    decoded = index_shards([str(whole)], decode_images=True, overwrite=True)
    assert read_index(whole).images_decode
    assert read_index(whole) == decoded.index == replace(plain.index, images_decode=True)
    assert decoded.index.digest == plain.index.digest  # the same data
    broken = samples(6, lambda n: {"cls": n % 3})
    broken[4]["jpg"] = broken[4]["jpg"][:-30]
    report = index_shards([str(write_shards(tmp_path / "broken", broken))], decode_images=True)
    assert report.problems.counts == {Problem.IMAGE_BROKEN: 1}
    assert not read_index(tmp_path / "broken").images_decode


def test_an_unwritable_folder_is_reported_before_scanning(tmp_path: Path) -> None:
    write_shards(tmp_path / "shards", samples(4, lambda n: {"cls": n % 3}))
    (tmp_path / "file").write_text("")
    read: list[int] = []
    with pytest.raises(DataError, match=r"the index cannot be written there .*--output"):
        indexed(
            tmp_path / "shards", output=str(tmp_path / "file" / "folder"), scanning=ScanOptions(progress=read.append)
        )
    assert read == []


def test_progress_counts_every_byte_once(tmp_path: Path) -> None:
    write_shards(tmp_path, samples(9, lambda n: {"cls": n % 3}))
    totals: list[int] = []
    read: list[int] = []
    report = indexed(tmp_path, scanning=ScanOptions(begin=totals.append, progress=read.append))
    assert totals == [sum(read)] == [report.index.bytes]


@pytest.fixture
def remote(s3: S3Server, tmp_path: Path, request: pytest.FixtureRequest) -> tuple[str, list[dict[str, Any]]]:
    """URL of three shards on S3, and their samples."""
    content = samples(10, lambda n: {"json": {"label": NAMES[n % 3]}})
    name = hashlib.sha256(request.node.nodeid.encode()).hexdigest()[:12]
    return s3.put(write_shards(tmp_path / "there", content), name), content


def test_remote_shards_are_indexed_in_their_folder_and_read_back(
    remote: tuple[str, list[dict[str, Any]]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, content = remote
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    report = index_shards([f"{url}/in-{{0000..0002}}.tar"])
    local = index_shards([str(tmp_path / "there")])
    assert report.index.digest == local.index.digest
    assert read_index(url) == report.index
    assert read_back(url, Cache(tmp_path / "cache", 10**9)) == {
        sample["__key__"]: (sample["jpg"], (number % 3,)) for number, sample in enumerate(content)
    }
    assert not list(tmp_path.glob("coatnet-shards-*"))


def test_without_write_permission_the_index_is_refused_at_once_or_written_elsewhere(
    remote: tuple[str, list[dict[str, Any]]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, _ = remote
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "readonly")
    storage = Storage(endpoint=os.environ["AWS_ENDPOINT_URL"])  # with a client of its own
    read: list[int] = []
    with pytest.raises(StorageRefused, match=r"access refused .*; or write the index elsewhere with --output"):
        index_shards([url], scanning=ScanOptions(storage, progress=read.append))
    assert read == []
    index_shards([url], scanning=ScanOptions(storage), output=str(tmp_path / "index"))
    assert read_index(tmp_path / "index").folder == url
    assert len(read_back(str(tmp_path / "index"), Cache(tmp_path / "cache", 10**9))) == 10


def test_a_bad_connection_changes_nothing(
    remote: tuple[str, list[dict[str, Any]]], s3: S3Server, tmp_path: Path
) -> None:
    url, _ = remote
    with FaultProxy(s3.port) as proxy:
        proxy.faults = [Fault("truncate", share=0.5), Fault("status", share=0.3)]
        storage = Storage(endpoint=proxy.url, greatest_delay=0.03, read_timeout=1)
        there = index_shards([url], scanning=ScanOptions(storage), output=str(tmp_path / "index"))
    assert sum(fault.fired for fault in proxy.faults) > 0
    assert there.index.digest == index_shards([str(tmp_path / "there")]).index.digest


def test_labels_of_an_indexed_dataset_are_those_of_the_reader(tmp_path: Path) -> None:
    content = samples(30, lambda n: {"json": {"labels": [(n * k) % 7 for k in range(1, 1 + n % 4)] or [0]}})
    write_shards(tmp_path, content, per_shard=7)
    index = index_shards([str(tmp_path)]).index
    rows = read_labels(index, Storage())
    assert [tuple(row[row >= 0].tolist()) for row in rows] == [
        labels for _, labels in read_back(str(tmp_path)).values()
    ]
    assert np.array_equal(np.sort(rows.view(np.uint32), axis=1), rows.view(np.uint32))
