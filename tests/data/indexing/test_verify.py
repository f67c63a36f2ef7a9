"""Comparing shards with their index: each kind of difference is found and named."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from data.accounting import Accounting
from data.errors import DataError
from data.index import labels_file, read_index
from data.indexing.index_shards import index_shards
from data.indexing.scan import ScanOptions
from data.indexing.verify import Difference, verify_shards
from tests.servers.s3 import S3Server
from tests.support.third_party import picture, samples, write_members, write_shards


@pytest.fixture
def indexed(tmp_path: Path) -> Path:
    """Three shards of four samples, and their index."""
    folder = write_shards(tmp_path / "indexed", samples(12, lambda n: {"cls": n % 3}))
    index_shards([str(folder)])
    return folder


def differences(folder: Path | str, *, decode_images: bool = False) -> list[Difference]:
    return list(verify_shards(read_index(folder), decode_images=decode_images))


@pytest.mark.parametrize("decode_images", [False, True])
def test_unchanged_shards_have_no_difference(indexed: Path, decode_images: bool) -> None:
    assert differences(indexed, decode_images=decode_images) == []


def flipped(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


@pytest.mark.parametrize(
    ("spoil", "what"),
    [
        (lambda data: flipped(data, data.index(b"\xff\xd8") + 30), ["has the sha256"]),
        (
            lambda data: flipped(data, 10),
            ["has the sha256", "is damaged: no tar header at byte 0", "has 0 samples, 4 in"],
        ),
        (lambda data: data[:-1], ["has 20,479 bytes, 20,480 in the index"]),
        (lambda data: data[:6000], ["has 6,000 bytes", "has no end mark", "has 3 samples, 4 in"]),
    ],
)
def test_changed_bytes_are_found(indexed: Path, spoil: Callable[[bytes], bytes], what: list[str]) -> None:
    shard = indexed / "in-0001.tar"
    shard.write_bytes(spoil(shard.read_bytes()))
    found = differences(indexed)
    assert {difference.shard for difference in found} == {"in-0001.tar"}
    assert len(found) == len(what)
    assert all(difference.what.startswith(start) for difference, start in zip(found, what, strict=True))


def test_a_missing_shard_is_named_and_the_others_are_read(indexed: Path) -> None:
    (indexed / "in-0000.tar").unlink()
    shard = indexed / "in-0002.tar"
    shard.write_bytes(flipped(shard.read_bytes(), 700))
    found = differences(indexed)
    assert [(d.shard, d.what.split(" ")[0]) for d in found] == [("in-0000.tar", "is"), ("in-0002.tar", "has")]


def test_a_changed_label_is_named_by_its_key(indexed: Path) -> None:
    index = read_index(indexed)
    labels = np.arange(12, dtype=np.int32)[:, None] % 3
    labels[5] = 0
    content, sha256 = labels_file(labels)
    (indexed / "labels.npy").write_bytes(content)
    replace(index, labels_sha256=sha256).write()
    assert differences(indexed) == [Difference("in-0001.tar", "picture_0005", "has the label 2, 0 in labels.npy")]


def test_a_label_changed_in_a_shard_is_named_by_its_key(indexed: Path) -> None:
    content = [
        (f"{s['__key__']}.{e}", s["jpg"] if e == "jpg" else b"0")
        for s in samples(4, lambda n: {})
        for e in ("jpg", "cls")
    ]
    write_members(indexed / "in-0000.tar", content)
    assert [(d.key, d.what) for d in differences(indexed) if d.key] == [
        (f"picture_000{n}", f"has the label 0, {n} in labels.npy") for n in (1, 2)
    ]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda path: path.unlink(), "labels.npy is missing"),
        (lambda path: path.write_bytes(b"x"), "labels.npy: does not match the index"),
    ],
)
def test_differences_in_labels_npy_are_reported(indexed: Path, spoil: Callable[[Path], object], message: str) -> None:
    spoil(indexed / "labels.npy")
    (found,) = differences(indexed)
    assert message in found.what


def test_decoding_names_every_unusable_sample(tmp_path: Path) -> None:
    write_members(
        tmp_path / "0.tar",
        [("a.jpg", picture(0)), ("a.cls", b"0"), ("b.jpg", picture(1)[:-60]), ("b.cls", b"1"), ("c.cls", b"1")],
    )
    index_shards([str(tmp_path)])
    assert differences(tmp_path) == []
    found = differences(tmp_path, decode_images=True)
    assert [(d.key, d.what[:32]) for d in found] == [("b", "has an image that does not decod"), ("c", "has no image")]


def test_shards_on_s3_are_verified_like_local_ones(indexed: Path, s3: S3Server) -> None:
    url = s3.put(indexed, "verified")
    assert differences(url, decode_images=True) == []
    data = (indexed / "in-0002.tar").read_bytes()
    s3.files().pipe_file("test/verified/in-0002.tar", flipped(data, data.index(b"\xff\xd8") + 30))
    s3.files().rm_file("test/verified/in-0001.tar")
    assert [(d.shard, d.what[:14]) for d in differences(url)] == [
        ("in-0001.tar", "is missing"), ("in-0002.tar", "has the sha256"),
    ]  # fmt: skip


def test_tars_that_are_not_in_the_index_are_remarked_on(indexed: Path) -> None:
    (indexed / "new.tar").write_bytes((indexed / "in-0000.tar").read_bytes())
    members = Accounting("members")
    assert list(verify_shards(read_index(indexed / "index.json"), members=members)) == []
    texts = [remark.text for remark in members.remarks if remark.kind == "not_indexed"]
    assert texts == [
        "1 tars beside the shards are not in the index (new.tar); if they belong to the dataset, index it again"
    ]


def test_without_any_shard_nothing_is_said_of_their_names(indexed: Path) -> None:
    for path in indexed.glob("*.tar"):
        path.unlink()
    members = Accounting("members")
    assert len(list(verify_shards(read_index(indexed), members=members))) == 3
    assert "different_names" not in {remark.kind for remark in members.remarks}


def test_moved_shards_are_refused_with_the_way_to_index_them_again(indexed: Path, tmp_path: Path) -> None:
    index_shards([str(indexed)], output=str(tmp_path / "elsewhere"))
    indexed.rename(tmp_path / "moved")
    with pytest.raises(DataError, match=r"no such folder; .*move them back.*shards index FOLDER --output .*elsewhere"):
        differences(tmp_path / "elsewhere")


def test_progress_counts_every_existing_byte(indexed: Path) -> None:
    (indexed / "in-0001.tar").unlink()
    totals: list[int] = []
    read: list[int] = []
    list(verify_shards(read_index(indexed), scanning=ScanOptions(begin=totals.append, progress=read.append)))
    assert totals == [sum(read)] == [2 * 20480]
