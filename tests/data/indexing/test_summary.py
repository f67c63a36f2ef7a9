"""Summaries and contact sheets."""

import json
from pathlib import Path

import numpy as np
import pytest

from data.classes.class_lists import ClassList
from data.dataset import open_dataset
from data.images.decode import decode
from data.index import read_index
from data.indexing.index_shards import index_shards
from data.indexing.summary import class_counts, describe, draw_samples
from data.remote.storage import Storage
from tests.servers.fault_proxy import FaultProxy
from tests.servers.s3 import S3Server
from tests.support.third_party import picture, samples, write_members, write_shards

NAMES = ("ant", "bee", "cat", "yak")


@pytest.fixture(scope="module")
def indexed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty lossless images of three classes in five shards; a fourth class has none."""
    folder = write_shards(tmp_path_factory.mktemp("indexed"), samples(20, lambda n: {"cls": n % 3}, "png", "PNG"))
    index_shards([str(folder)], classes=ClassList("", NAMES))
    return folder


def test_drawn_samples_are_those_of_the_shards_and_follow_the_seed(indexed: Path) -> None:
    dataset = open_dataset(str(indexed), Storage())
    drawn = list(draw_samples(dataset, 8, seed=1))
    assert len({sample.key for sample in drawn}) == 8
    for sample in drawn:
        number = int(sample.key[-4:])
        assert sample.classes == (NAMES[number % 3],)
        assert sample.shard == f"in-{number // 4:04d}.tar"
        assert np.array_equal(sample.thumbnail, decode(picture(number, "PNG")))  # type: ignore[arg-type]
    keys = [[s.key for s in draw_samples(dataset, 8, seed)] for seed in (1, 2)]
    assert keys[0] == [sample.key for sample in drawn] != keys[1]


def test_all_samples_are_drawn_when_more_are_requested(indexed: Path) -> None:
    drawn = draw_samples(open_dataset(str(indexed), Storage()), 100, seed=0)
    assert [sample.key for sample in drawn] == [f"picture_{number:04d}" for number in range(20)]


def test_the_summary_agrees_with_the_index_and_the_images(indexed: Path) -> None:
    dataset = open_dataset(str(indexed), Storage())
    facts = describe(dataset, list(draw_samples(dataset, 20, seed=0)))
    index = read_index(indexed)
    assert facts["shards"] == {
        "number": 5,
        "samples": {"least": 4, "median": 4, "most": 4},
        "bytes": dict.fromkeys(("least", "median", "most"), index.shards[0].bytes),
    }
    assert facts["drawn"] == {
        "samples": 20,
        "formats": {"PNG RGB": 20},
        "width": dict.fromkeys(("least", "5 %", "median", "95 %", "most"), 20),
        "height": dict.fromkeys(("least", "5 %", "median", "95 %", "most"), 12),
        "unusable": [],
    }
    assert facts["histogram"] == {
        "classes": {"ant": 7, "bee": 7, "cat": 6, "yak": 0}, "without_label": 0, "problem": None,
    }  # fmt: skip
    assert (facts["samples"], facts["classes"], facts["bytes"]) == (20, 4, index.bytes)
    json.dumps(facts)


def test_counts_follow_several_labels_and_a_label_map(tmp_path: Path) -> None:
    labels = [["ant", "bee"], ["bee"], ["cat"], ["cat", "ant"]]
    write_shards(tmp_path, samples(4, lambda n: {"json": {"labels": labels[n]}}))
    index_shards([str(tmp_path)])
    assert class_counts(open_dataset(str(tmp_path), Storage()))[0].tolist() == [2, 2, 2]
    (tmp_path / "map.yaml").write_text("rename: {ant: insect, bee: insect}\nothers: drop\n")
    mapped = open_dataset(str(tmp_path), Storage(), tmp_path / "map.yaml")
    counts, without = class_counts(mapped)
    assert (counts.tolist(), without) == ([3], 0)
    drawn = list(draw_samples(mapped, 9, seed=0))
    assert [(sample.key[-1], sample.classes) for sample in drawn] == [(n, ("insect",)) for n in "013"]


def test_an_unusable_sample_is_drawn_with_its_problem(tmp_path: Path) -> None:
    write_members(tmp_path / "0.tar", [("a.jpg", picture(0)), ("a.cls", b"0"), ("b.jpg", b""), ("b.cls", b"0")])
    index_shards([str(tmp_path)])
    dataset = open_dataset(str(tmp_path), Storage())
    drawn = list(draw_samples(dataset, 2, seed=0))
    assert (drawn[1].thumbnail, drawn[1].problem) == (None, "empty file")
    assert describe(dataset, drawn)["drawn"]["unusable"] == [{"shard": "0.tar", "key": "b", "problem": "empty file"}]


def test_a_jpeg_with_a_header_that_pillow_refuses_is_drawn(tmp_path: Path) -> None:
    jpeg = picture(0)
    write_members(tmp_path / "0.tar", [("a.jpg", jpeg[:2] + b"\1\2" + jpeg[2:]), ("a.cls", b"0")])
    index_shards([str(tmp_path)])
    (drawn,) = draw_samples(open_dataset(str(tmp_path), Storage()), 1, seed=0)
    assert (drawn.format, drawn.problem) == ("JPEG", "")


def test_few_bytes_of_few_remote_shards_are_downloaded(
    s3: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_shards(tmp_path, samples(120, lambda n: {"cls": n % 3}), per_shard=6)
    index_shards([str(tmp_path)])
    url = s3.put(tmp_path, "summary")
    monkeypatch.setattr("data.indexing.summary._HEAD_BYTES", 4 * 2560)
    monkeypatch.setattr("data.indexing.summary._REMOTE_SHARDS", 5)
    with FaultProxy(s3.port) as proxy:
        drawn = list(draw_samples(open_dataset(url, Storage(endpoint=proxy.url)), 10, seed=3))
        fetched = [path for method, path in proxy.requests if method == "GET" and ".tar" in path]
    assert len(fetched) == len(set(fetched)) == len({sample.shard for sample in drawn}) == 5
    assert len({sample.key for sample in drawn}) == 10
    assert not any(sample.problem for sample in drawn)


def test_a_remote_shard_without_a_sample_in_its_head_is_downloaded_completely(
    s3: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_shards(tmp_path, samples(2, lambda n: {"cls": n % 3}))
    index_shards([str(tmp_path)])
    url = s3.put(tmp_path, "whole")
    monkeypatch.setattr("data.indexing.summary._HEAD_BYTES", 600)
    drawn = list(draw_samples(open_dataset(url, Storage()), 2, seed=3))
    assert [sample.problem for sample in drawn] == ["", ""]
