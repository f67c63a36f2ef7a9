"""Hashing local shards behind a run."""

import logging
import os
import shutil
import threading
from pathlib import Path

import pytest

from data.dataset import Dataset, open_dataset
from data.errors import DataError, StorageDown
from data.remote.storage import Storage
from data.shard_verification import FileState, LocalShard, ShardVerifier, local_shards, unverified
from tests.support.damage import flip_a_pixel


@pytest.fixture
def dataset(shards: Path, tmp_path: Path) -> Dataset:
    """A copy of the training shards."""
    shutil.copytree(shards / "train", tmp_path / "train")
    return open_dataset(str(tmp_path / "train"), Storage())


def all_shards(dataset: Dataset) -> list[LocalShard]:
    return local_shards(dataset, range(len(dataset.index.shards)))


def verified(shards: list[LocalShard], known: dict[FileState, str]) -> list[str]:
    """The paths of the shards that had to be hashed; what was found is added to `known`."""
    hashed = []

    def record(state: FileState, sha256: str) -> None:
        hashed.append(state.path)
        known[state] = sha256

    verifier = ShardVerifier(unverified(shards, known), record)
    verifier.wait(60)
    assert not verifier.running
    verifier.check()
    return hashed


def test_a_flipped_bit_in_the_pixels_is_found_although_size_and_time_are_the_same(dataset: Dataset) -> None:
    shard = all_shards(dataset)[3]
    flip_a_pixel(Path(shard.path))
    with pytest.raises(DataError, match=rf"{shard.path}: read twice, and its sha256 is .*{shard.sha256[:16]}.*copy"):
        verified(all_shards(dataset), {})


def test_shards_that_have_not_changed_are_not_read_again_and_rewritten_ones_are(dataset: Dataset) -> None:
    shards, known = all_shards(dataset), dict[FileState, str]()
    assert verified(shards, known) == [shard.path for shard in shards]
    assert verified(shards, known) == []
    rewritten = Path(shards[2].path)
    rewritten.write_bytes(rewritten.read_bytes())
    assert verified(shards, known) == [str(rewritten)]
    # Neither the size nor the time of the last modification says that this one was changed.
    flip_a_pixel(Path(shards[1].path))
    with pytest.raises(DataError, match=shards[1].path):
        verified(shards, known)


def test_a_shard_that_was_found_damaged_is_read_first_by_the_next_start(dataset: Dataset) -> None:
    shards, known = all_shards(dataset), dict[FileState, str]()
    flip_a_pixel(Path(shards[-1].path))
    with pytest.raises(DataError):
        verified(shards[-1:], known)
    assert unverified(shards, known) == [shards[-1], *shards[:-1]]


def test_an_error_of_one_reading_is_a_warning(
    dataset: Dataset, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    readings = []
    hashed = ShardVerifier._hash

    def once_wrong(verifier: ShardVerifier, path: str, buffer: memoryview, *, from_disk: bool) -> tuple[FileState, str]:
        readings.append((path, from_disk))
        state, sha256 = hashed(verifier, path, buffer, from_disk=from_disk)
        return state, sha256 if from_disk else "0" * 64

    monkeypatch.setattr(ShardVerifier, "_hash", once_wrong)
    shard = all_shards(dataset)[0]
    known: dict[FileState, str] = {}
    with caplog.at_level(logging.WARNING):
        assert verified([shard], known) == [shard.path]
    assert readings == [(shard.path, False), (shard.path, True)]
    assert list(known.values()) == [shard.sha256]
    assert f"shard {shard.path} was read with the sha256 0000" in caplog.text


def test_the_thread_alone_has_the_lowest_priority(dataset: Dataset) -> None:
    found = []
    verifier = ShardVerifier(
        all_shards(dataset),
        lambda *_: found.append(os.getpriority(os.PRIO_PROCESS, threading.get_native_id())),
    )
    verifier.wait(60)
    assert set(found) == {19}
    assert os.getpriority(os.PRIO_PROCESS, threading.get_native_id()) < 19


def test_closing_ends_the_thread_in_the_middle_of_a_shard(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "endless.tar")
    hashed: list[FileState] = []
    verifier = ShardVerifier([LocalShard(f"{tmp_path}/endless.tar", 10, "0" * 64)], lambda *_: hashed.append(_[0]))
    with open(tmp_path / "endless.tar", "wb", buffering=0) as endless:
        endless.write(b"a piece")
        closing = threading.Thread(target=verifier.close)
        closing.start()
        while closing.is_alive():
            try:
                endless.write(b"more")
            except BrokenPipeError:
                break
        closing.join()
    assert not verifier.running
    assert hashed == []


def test_a_file_system_that_does_not_answer_ends_the_wait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data.shard_verification._PATIENCE", 0.0)
    monkeypatch.setattr("data.shard_verification._CLOSING", 0.0)
    os.mkfifo(tmp_path / "silent.tar")
    verifier = ShardVerifier([LocalShard(f"{tmp_path}/silent.tar", 10, "0" * 64)], lambda *_: None)
    with pytest.raises(StorageDown, match=r"silent\.tar: nothing could be read of it"):
        verifier.wait(0.01)
    verifier.close()
    assert verifier.running
    (tmp_path / "silent.tar").write_bytes(b"a piece")
    verifier.wait(60)


@pytest.mark.parametrize(
    ("spoil", "error", "message"),
    [
        (Path.unlink, DataError, "it has been removed since the run started"),
        (lambda path: (path.unlink(), path.mkdir()), StorageDown, "cannot be read .Is a directory"),
    ],
)
def test_a_shard_that_cannot_be_read_is_named(
    dataset: Dataset, spoil: object, error: type[Exception], message: str
) -> None:
    path = Path(all_shards(dataset)[0].path)
    spoil(path)  # type: ignore[operator]
    with pytest.raises(error, match=f"shard {path}: {message}"):
        verified(all_shards(dataset), {})
