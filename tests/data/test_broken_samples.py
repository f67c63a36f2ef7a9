"""Every kind of unusable sample is skipped, named, and replaced by another of its shard; nothing else changes."""

import io
import itertools
import tarfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from data.dataset import Dataset
from data.errors import DataError
from data.images.augment import EvaluationTransform, TrainTransform
from data.index import LabelFormat, ShardEntry, ShardIndex
from data.order import SampleOrder
from data.stream import MicroBatch, RankShare, evaluation_stream, training_stream

PER_SHARD = 8
Members = list[tuple[str, bytes]]


def write_shards(
    pictures: Path, folder: Path, spoil: Callable[[Members], Members] = lambda members: members
) -> Dataset:
    """Three shards of eight images; `spoil` changes the members of the second."""
    folder.mkdir()
    encoded = [path.read_bytes() for path in sorted(pictures.rglob("*.jpg"))[::2][: 3 * PER_SHARD]]
    entries = []
    for shard in range(3):
        members = []
        for number in range(shard * PER_SHARD, (shard + 1) * PER_SHARD):
            members += [(f"key{number}.jpg", encoded[number]), (f"key{number}.cls", str(number % 3).encode())]
        path = folder / f"s-{shard}.tar"
        with tarfile.open(path, "w") as archive:
            for name, content in spoil(members) if shard == 1 else members:
                info = tarfile.TarInfo(name)
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
        entries.append(ShardEntry(path.name, PER_SHARD, path.stat().st_size, "0" * 64))
    return Dataset(ShardIndex(str(folder), ("a", "b", "c"), ("jpg",), LabelFormat(), tuple(entries)))


def one_epoch(dataset: Dataset, workers: int = 2) -> list[MicroBatch]:
    order = SampleOrder(dataset.shard_samples, seed=0, batch=6, lanes=2, window=100)
    stream = training_stream(
        dataset, order, TrainTransform(16, crop="whole", flip=False), RankShare(0, 1, 3), first_step=0,
        workers=workers,
    )  # fmt: skip
    return list(itertools.islice(stream, 8))


def changed(name: str, change: Callable[[bytes], bytes]) -> Callable[[Members], Members]:
    return lambda members: [(n, change(content) if n == name else content) for n, content in members]


def renamed(name: str, new: str) -> Callable[[Members], Members]:
    return lambda members: [(new if n == name else n, content) for n, content in members]


def without(name: str) -> Callable[[Members], Members]:
    return lambda members: [(n, content) for n, content in members if n != name]


def of_size(side: int) -> Callable[[bytes], bytes]:
    """The JPEG with another height and width in its frame header."""

    def change(jpeg: bytes) -> bytes:
        frame = jpeg.index(b"\xff\xc0")
        return jpeg[: frame + 5] + 2 * side.to_bytes(2, "big") + jpeg[frame + 9 :]

    return change


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        pytest.param(changed("key11.jpg", lambda jpeg: jpeg[:400]), "", id="broken JPEG"),
        pytest.param(changed("key11.jpg", lambda jpeg: b""), "empty file", id="zero-byte file"),
        pytest.param(changed("key11.jpg", lambda jpeg: b"a text"), "neither JPEG, PNG nor WebP", id="text under the name of an image"),
        pytest.param(changed("key11.jpg", of_size(30_000)), "30,000 x 30,000 pixels", id="a 30,000-pixel bomb"),
        pytest.param(renamed("key11.jpg", "key11.tiff"), "it has no image", id="wrong extension"),
        pytest.param(without("key11.cls"), "it has no label", id="missing label"),
        pytest.param(changed("key11.cls", lambda label: b"3"), "the label 3 is not one of 3 classes", id="label out of range"),
        pytest.param(changed("key11.cls", lambda label: b"cat"), "the label 'cat' is not a number", id="label that is no number"),
        pytest.param(lambda members: [("key9" + n[5:] if n.startswith("key11") else n, c) for n, c in members], "its key is repeated in the shard", id="duplicated key"),
    ],
)  # fmt: skip
def test_an_unusable_sample_is_replaced_and_named(
    spoil: Callable[[Members], Members], reason: str, pictures: Path, tmp_path: Path
) -> None:
    whole, spoiled = write_shards(pictures, tmp_path / "whole"), write_shards(pictures, tmp_path / "spoiled", spoil)
    before, after = one_epoch(whole), one_epoch(spoiled)
    (skipped,) = [sample for batch in after for sample in batch.skipped]
    assert (skipped.shard, reason in skipped.reason) == ("s-1.tar", True), skipped
    assert skipped.key in ("key11", "key9")

    pictures_before, pictures_after = (np.concatenate([b.images for b in batches]) for batches in (before, after))
    different = [n for n in range(24) if not np.array_equal(pictures_before[n], pictures_after[n])]
    labels = np.concatenate([batch.labels for batch in after])
    assert len(different) == 1
    # Its place is taken by another one of the shard, with that one's label.
    same = [n for n in range(24) if np.array_equal(pictures_after[n], pictures_after[different[0]])]
    assert len(same) == 2
    assert labels[same[0]] == labels[same[1]]
    origins = [origin for batch in after for origin in batch.origins]
    assert {(origins[n].shard, origins[n].key) for n in same} == {("s-1.tar", origins[same[0]].key)}
    assert np.array_equal(pictures_after, np.concatenate([b.images for b in one_epoch(spoiled, workers=1)]))

    evaluated = evaluation_stream(spoiled, EvaluationTransform(16), RankShare(0, 1, 5), workers=1)
    weights, named = zip(*[(batch.weights.sum(), batch.skipped) for batch in evaluated], strict=True)
    assert sum(weights) == 23
    assert [sample.key for batch in named for sample in batch] == [skipped.key]


def test_a_tar_truncated_during_the_run_loses_only_the_samples_after_the_cut(pictures: Path, tmp_path: Path) -> None:
    whole, spoiled = write_shards(pictures, tmp_path / "whole"), write_shards(pictures, tmp_path / "spoiled")
    path = tmp_path / "spoiled" / "s-1.tar"
    with tarfile.open(path) as archive:
        cut = archive.getmember("key13.jpg").offset_data + 100
    path.write_bytes(path.read_bytes()[:cut])
    before, after = one_epoch(whole), one_epoch(spoiled)
    skipped = [sample for batch in after for sample in batch.skipped]
    assert sorted(sample.key for sample in skipped) == ["#5", "#6", "#7"]
    assert all("the shard ends before it (ends after" in sample.reason for sample in skipped)
    pictures_before, pictures_after = (np.concatenate([b.images for b in batches]) for batches in (before, after))
    assert sum(not np.array_equal(a, b) for a, b in zip(pictures_before, pictures_after, strict=True)) == 3


def test_a_shard_that_disappears_during_the_run_is_named(pictures: Path, tmp_path: Path) -> None:
    dataset = write_shards(pictures, tmp_path / "shards")
    (tmp_path / "shards" / "s-1.tar").unlink()
    with pytest.raises(DataError, match=r"s-1\.tar: it has been removed since the run started"):
        one_epoch(dataset)


def test_of_a_row_of_broken_samples_each_is_counted_once_and_gets_another_replacement(
    pictures: Path, tmp_path: Path
) -> None:
    """More in a row than are tried in place of one."""
    broken, whole = 250, 750
    encoded = next(pictures.rglob("*.jpg")).read_bytes()
    path = tmp_path / "s.tar"
    with tarfile.open(path, "w") as archive:
        for number in range(broken + whole):
            for name, content in ((f"{number}.jpg", encoded if number >= broken else b""), (f"{number}.cls", b"0")):
                info = tarfile.TarInfo(name)
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
    entry = ShardEntry(path.name, broken + whole, path.stat().st_size, "0" * 64)
    dataset = Dataset(ShardIndex(str(tmp_path), ("a",), ("jpg",), LabelFormat(), (entry,)))
    order = SampleOrder(dataset.shard_samples, seed=0, batch=50, lanes=1, window=50)

    def epochs(number: int, workers: int) -> list[MicroBatch]:
        stream = training_stream(
            dataset, order, TrainTransform(8), RankShare(0, 1, 50), first_step=20 * number, workers=workers
        )
        return list(itertools.islice(stream, 20))

    batches = epochs(0, workers=3)
    skipped = [sample for batch in batches for sample in batch.skipped]
    assert sorted(int(sample.key) for sample in skipped) == list(range(broken))
    used = Counter(origin.key for batch in batches for origin in batch.origins)
    assert all(int(key) >= broken for key in used)
    assert max(used.values()) <= 5  # 250 replacements drawn from 750
    assert [batch.origins for batch in batches] == [batch.origins for batch in epochs(0, workers=1)]
    assert used != Counter(origin.key for batch in epochs(1, workers=1) for origin in batch.origins)
