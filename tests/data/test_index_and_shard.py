"""Reading an index and a shard, and the messages for what is refused."""

import hashlib
import io
import json
import os
import shutil
import tarfile
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data.errors import DataError
from data.files.digest import json_sha256
from data.index import LabelFormat, ShardEntry, ShardIndex, check_shards, read_index, read_labels
from data.remote.storage import Storage
from data.shard import BrokenSample, EncodedSample, Shard, split_key


@pytest.fixture
def copied(shards: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(shards / "train", tmp_path / "train"))


def test_reading_by_place_gives_the_members_of_the_tar(copied: Path) -> None:
    index = read_index(copied)
    for number, entry in enumerate(index.shards):
        with tarfile.open(copied / entry.name) as archive:
            members = {m.name: archive.extractfile(m).read() for m in archive}  # type: ignore[union-attr]
        shard = Shard(Path(index.location(number)), ("jpg",), "cls", entry.samples)
        for place in range(entry.samples):
            sample = shard.read(place)
            assert (sample.image, sample.label) == (members[f"{sample.key}.jpg"], members[f"{sample.key}.cls"])


def _rewrite_index(folder: Path, **changes: object) -> None:
    """Change fields of the index or of its first shard, as somebody would who then computes the digest again."""
    content = json.loads((folder / "index.json").read_text())
    for name, value in changes.items():
        (content["shards"][0] if name in content["shards"][0] else content)[name] = value
    del content["digest"]
    (folder / "index.json").write_text(json.dumps(content | {"digest": json_sha256(content)}))


_CHANGES: list[tuple[dict[str, Any], str]] = [
    ({"sha256": "/home/someone/.bashrc"}, "sha256: must be 64 hexadecimal digits, not '/home/someone"),
    ({"sha256": "A" * 64}, "sha256: must be 64 hexadecimal digits"),
    ({"name": "/etc/passwd"}, "name: '/etc/passwd' is not a path in the folder; do not trust"),
    ({"name": "a/../../b.tar"}, "is not a path in the folder; do not trust"),
    ({"name": ""}, "name: '' is not a path in the folder"),
    ({"samples": 10**9}, "samples: 1,000,000,000 do not fit into"),
    ({"samples": -1}, "samples: must be at least 0, not -1"),
    ({"bytes": -1}, "bytes: must be at least 0, not -1"),
    ({"labels_per_sample": 10**12}, "labels_per_sample: 1,000,000,000,000 of 3 classes"),
    ({"labels_sha256": "x"}, "labels_sha256: must be 64"),
    (
        {"fields": {"image": ["../x"], "label": {"field": "cls", "key": None, "by": "number"}}},
        "'../x' is not",
    ),
    (
        {
            "fields": {"image": ["jpg"], "label": {"field": "txt", "key": None, "by": "name"}},
            "classes": ["a", "a", "b"],
        },
        "classes: a name is repeated, and the labels are names",
    ),
]
"""Changes of an index, and why it is refused."""


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: (folder / "index.json").unlink(), "no index.json there; build shards with"),
        (lambda folder: (folder / "index.json").write_text("{"), "not an index of shards"),
        (
            lambda folder: (folder / "index.json").write_bytes(b""),
            r"index.json: not an index of shards \(it is empty\)",
        ),
        (lambda folder: _cut_index(folder), r"index.json: not an index of shards \(.+\); copy it again, or index"),
        (
            lambda folder: _replace_in_index(folder, '"samples": 7', '"samples": "7"'),
            "samples: must be an integer, not '7'",
        ),
        (lambda folder: _replace_in_index(folder, '"shards"', '"tars"'), "shards is missing"),
        (
            lambda folder: _replace_in_index(folder, '"version": 2', '"version": "2"'),
            "version: must be an integer, not '2'",
        ),
        (lambda folder: _replace_in_index(folder, '"samples": 7', '"samples": 8'), "does not match its own digest"),
        *((partial(_rewrite_index, **changes), message) for changes, message in _CHANGES),
        (lambda folder: (folder / "train-000001.tar").unlink(), "shard train-000001.tar is missing"),
        (lambda folder: (folder / "train-000002.tar").write_bytes(b"x"), "train-000002.tar has 1 bytes and"),
        (lambda folder: _make_a_folder_of(folder / "train-000001.tar"), "shard train-000001.tar is missing"),
        (lambda folder: _make_a_dead_link_of(folder / "train-000001.tar"), "shard train-000001.tar is missing"),
    ],
)
def test_a_damaged_folder_is_refused(copied: Path, spoil: object, message: str) -> None:
    spoil(copied)  # type: ignore[operator]
    with pytest.raises(DataError, match=message):
        check_shards(read_index(copied))


@pytest.mark.parametrize("below", ["", "a/"])
def test_each_shard_is_looked_at_once(below: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shards = [ShardEntry(f"{below}train-{number:06d}.tar", 1, 512, "0" * 64) for number in range(1000)]
    (tmp_path / below).mkdir(exist_ok=True)
    for shard in shards:
        (tmp_path / shard.name).write_bytes(bytes(512))
    looked_at = Counter[str]()

    def counted(real: Callable[..., Any], path: Any, *arguments: Any, **options: Any) -> Any:
        looked_at[str(path)] += 1
        return real(path, *arguments, **options)

    for name in ("stat", "lstat", "scandir", "listdir", "open"):
        monkeypatch.setattr(os, name, partial(counted, getattr(os, name)))
    check_shards(ShardIndex(str(tmp_path), ("one",), ("jpg",), LabelFormat(), tuple(shards)))
    assert looked_at == {str(tmp_path / shard.name): 1 for shard in shards} | {str(tmp_path): looked_at[str(tmp_path)]}
    assert looked_at[str(tmp_path)] <= 1
    (tmp_path / shards[700].name).write_bytes(b"x")
    with pytest.raises(DataError, match=f"shard {shards[700].name} has 1 bytes and 512 in the index"):
        check_shards(ShardIndex(str(tmp_path), ("one",), ("jpg",), LabelFormat(), tuple(shards)))


def _make_a_folder_of(path: Path) -> None:
    path.unlink()
    path.mkdir()


def _make_a_dead_link_of(path: Path) -> None:
    path.unlink()
    path.symlink_to("nowhere")


def _cut_index(folder: Path) -> None:
    content = (folder / "index.json").read_bytes()
    (folder / "index.json").write_bytes(content[: len(content) // 2])


def _replace_in_index(folder: Path, old: str, new: str) -> None:
    path = folder / "index.json"
    path.write_text(path.read_text().replace(old, new, 1))


def test_the_digest_of_a_dataset_is_the_same_in_every_version_of_the_program() -> None:
    entry = ShardEntry("a.tar", 3, 10240, "0" * 64)
    index = ShardIndex("/x", ("ant", "bee"), ("jpg",), LabelFormat("json", "label"), (entry,), 1, "1" * 64)
    assert index.digest == "1f68fe210ffab2e9df0f31310597d451a5c892fcee3339cd3932c64ef989b43b"


def numpy_file(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not a numpy array"),
        (numpy_file(np.zeros((45, 1), np.int32))[:50], "not a numpy array"),
        (numpy_file(np.zeros((45, 1), np.int32))[:-4], r"not a numpy array \(its header promises \(45, 1\)"),
        (
            numpy_file(np.zeros((45, 1), np.int32)).replace(b"(45, 1), }         ", b"(45, 1000000000), }"),
            "not a numpy array",
        ),
        (numpy_file(np.zeros((45, 1), np.float64)), r"float64 \(45, 1\) instead of int32 labels of 45 samples"),
        (numpy_file(np.zeros(45, np.int32)), r"int32 \(45,\) instead of int32 labels of 45 samples"),
        (
            numpy_file(np.full((45, 1), 3, np.int32)),
            r"up to 1 labels of a sample, from 0 to 3, and in the index up to",
        ),
        (
            numpy_file(np.zeros((45, 2), np.int32)),
            r"up to 2 labels of a sample, from 0 to 0, and in the index up to 1",
        ),
        (numpy_file(np.zeros((44, 1), np.int32)), r"int32 \(44, 1\) instead of int32 labels of 45 samples"),
    ],
)
def test_labels_that_are_not_those_of_the_index_are_named(copied: Path, content: bytes, message: str) -> None:
    (copied / "labels.npy").write_bytes(content)
    with pytest.raises(DataError, match=r"labels\.npy: does not match the index"):
        read_labels(read_index(copied), Storage())
    replace(read_index(copied), labels_sha256=hashlib.sha256(content).hexdigest()).write()
    with pytest.raises(DataError, match=rf"labels\.npy: {message}"):
        read_labels(read_index(copied), Storage())


def test_an_index_of_another_format_is_refused(copied: Path) -> None:
    content = json.loads((copied / "index.json").read_text())
    (copied / "index.json").write_text(json.dumps(content | {"version": 99}))
    with pytest.raises(DataError, match="version 99, this program reads"):
        read_index(copied)


@pytest.mark.parametrize(
    "url", ["pipe:cat /etc/passwd", "pipe://x", "simplecache::s3://bucket/x", "reference://x", "hdfs://x/y"]
)
def test_urls_that_run_commands_or_nest_others_are_refused(url: str) -> None:
    with pytest.raises(DataError, match="not a supported location"):
        read_index(url)


def shard_of(path: Path, members: list[tuple[str, bytes]]) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


@pytest.mark.parametrize(("count", "message"), [(1, "2 samples, 1 in the index"), (3, "2 samples, 3 in the index")])
def test_a_shard_with_another_count_than_in_the_index_is_refused(tmp_path: Path, count: int, message: str) -> None:
    path = shard_of(tmp_path / "s.tar", [("a.jpg", b"x"), ("a.cls", b"0"), ("b.jpg", b"x"), ("b.cls", b"1")])
    with pytest.raises(DataError, match=message):
        Shard(path, ("jpg",), "cls", count)


@pytest.mark.parametrize(
    ("members", "broken"),
    [
        ([("a.jpg", b"x"), ("b.jpg", b"x"), ("b.cls", b"0")], {0: "it has no label"}),
        ([("a.cls", b"0"), ("b.jpg", b"x"), ("b.cls", b"0")], {0: "it has no image"}),
        ([("a.tiff", b"x"), ("a.cls", b"0"), ("b.jpg", b"x"), ("b.cls", b"0")], {0: "it has no image"}),
        (
            [("a.jpg", b"x"), ("a.cls", b"0"), ("b.jpg", b"x"), ("b.cls", b"0"), ("a.jpg", b"y"), ("a.cls", b"0")],
            {2: "its key is repeated in the shard"},
        ),
        (
            [("a.jpg", b"x"), ("a.cls", b"0"), ("a.jpg", b"y"), ("a.cls", b"0")],
            {1: "its key is repeated in the shard"},
        ),
    ],
)
def test_an_incomplete_sample_keeps_its_place_and_names_what_is_missing(
    tmp_path: Path, members: list[tuple[str, bytes]], broken: dict[int, str]
) -> None:
    count = len(broken) + 1 if len(members) < 6 else 3
    shard = Shard(shard_of(tmp_path / "s.tar", members), ("jpg",), "cls", count)
    found = {}
    for place in range(count):
        try:
            shard.read(place)
        except BrokenSample as error:
            found[place] = str(error)
    assert found == broken


def test_other_members_of_a_tar_are_ignored(tmp_path: Path) -> None:
    path = shard_of(tmp_path / "s.tar", [("a.json", b"{}"), ("README", b""), ("a.jpg", b"x"), ("a.cls", b"3")])
    assert Shard(path, ("jpg",), "cls", 1).read(0) == EncodedSample("a", b"x", b"3")


def test_only_samples_after_the_end_of_a_truncated_tar_are_broken(tmp_path: Path) -> None:
    path = shard_of(tmp_path / "s.tar", [("a.jpg", b"x"), ("a.cls", b"0"), ("b.jpg", b"x" * 5000), ("b.cls", b"0")])
    path.write_bytes(path.read_bytes()[:4000])
    shard = Shard(path, ("jpg",), "cls", 2)
    assert shard.read(0).key == "a"
    with pytest.raises(BrokenSample, match=r"the shard ends before it \(ends after 4,000 bytes, inside a member"):
        shard.read(1)


def test_a_shard_that_ends_between_two_members_is_truncated(tmp_path: Path) -> None:
    path = shard_of(tmp_path / "s.tar", [("a.jpg", b"x"), ("a.cls", b"0"), ("b.jpg", b"x"), ("b.cls", b"0")])
    path.write_bytes(path.read_bytes()[:2048])
    assert Shard(path, ("jpg",), "cls", 1).read(0).key == "a"
    with pytest.raises(BrokenSample, match=r"ends before it \(ends after 2,048 bytes without an end mark\)"):
        Shard(path, ("jpg",), "cls", 2).read(1)


@pytest.mark.parametrize(
    ("names", "keys"),
    [
        (["p.jpg", "p.cls", "q_0.5.jpg", "q_0.5.cls", "q_0.53.JPG", "q_0.53.cls"], ["p", "q_0.5", "q_0.53"]),
        (["d.e/IMG 12.01.2020.jpg", "d.e/IMG 12.01.2020.cls"], ["d.e/IMG 12.01.2020"]),
        (["p.jpg", "p.cls", "p.seg.jpg"], ["p"]),
        (["p.jpg", "p.cls", "p.seg.jpg", "p.seg.cls"], ["p"]),
        (["p.0.jpg", "p.1.jpg", "p.cls"], ["p"]),
        (["q.0.jpg", "p.jpg", "p.cls"], ["p"]),
    ],
)
def test_names_with_further_dots_are_split_at_the_last_one_if_that_is_clear(
    tmp_path: Path, names: list[str], keys: list[str]
) -> None:
    shard = Shard(shard_of(tmp_path / "s.tar", [(name, b"0") for name in names]), ("jpg",), "cls", len(keys))
    assert [shard.key(place) for place in range(len(keys))] == keys


@pytest.mark.parametrize(
    ("member", "split"),
    [
        ("n01/x_1.JPEG", ("n01/x_1", "jpeg")),
        ("a.b/c.seg.png", ("a.b/c", "seg.png")),
        ("noextension", None),
        ("d/._x.jpg", None),
    ],
)
def test_keys_are_split_as_webdataset_splits_them(member: str, split: tuple[str, str] | None) -> None:
    assert split_key(member) == split
