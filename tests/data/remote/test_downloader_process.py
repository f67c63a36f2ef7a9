"""Readers whose downloader cannot work end with a reason, instead of waiting and starting it again without end."""

import json
import os
import signal
import threading
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from data.dataset import Dataset
from data.errors import EXIT_TRY_AGAIN, StorageDown
from data.index import read_index
from data.remote.cache import Cache, CachedShards
from data.remote.downloader_process import DownloaderProcess, DownloaderStart, start_record
from tests.support.downloading import downloading, until


@pytest.fixture
def dataset(shards: Path) -> Dataset:
    return Dataset(replace(read_index(shards / "train"), folder="s3://test"))


@pytest.mark.slow
@pytest.mark.parametrize("within", ["failed", "requests"])
def test_readers_end_with_the_last_reason_of_a_downloader_that_dies_at_once(
    dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, within: str
) -> None:
    monkeypatch.setattr("data.remote.cache._CHECK_INTERVAL", 0.01)
    cache = Cache(tmp_path, 10**9)
    readers = [CachedShards(cache, dataset) for _ in range(2)]
    if within == "failed":
        (tmp_path / "failed" / "folder").mkdir()  # which it cannot remove at its start
        reason = r"last: IsADirectoryError: .*failed/folder'"
    else:
        readers[0].request([0], [])  # before the downloader dies for want of its lock
        (tmp_path / "requests" / "x.lock").mkdir()
        (tmp_path / "requests" / "x.json").touch()
        reason = r"last: IsADirectoryError: .*requests/x.lock'"
    ended: list[StorageDown] = []

    def read(reader: CachedShards) -> None:
        with pytest.raises(StorageDown, match=rf"has died 5 times, each soon after its start \({reason}\); see") as it:
            reader.path(0)
        ended.append(it.value)

    threads = [threading.Thread(target=read, args=[reader]) for reader in readers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert [error.exit_code for error in ended] == 2 * [EXIT_TRY_AGAIN]
    for reader in readers:
        reader.close()


def dead(folder: Path, deaths: tuple[float, ...], ago: float = 1.0) -> None:
    start_record(folder).write_text(json.dumps(asdict(DownloaderStart(time.monotonic() - ago, 0, deaths))))


class NotStarted(Exception):
    """In place of starting a downloader."""


@pytest.fixture
def process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> DownloaderProcess:
    def refuse(*arguments: object, **options: object) -> None:
        raise NotStarted

    monkeypatch.setattr("data.remote.downloader_process.subprocess.Popen", refuse)
    return DownloaderProcess(tmp_path)


def recorded(folder: Path) -> int:
    return len(json.loads(start_record(folder).read_text())["deaths"])


def test_early_deaths_in_a_row_are_counted(process: DownloaderProcess, tmp_path: Path) -> None:
    for count in range(5):
        with pytest.raises(NotStarted):
            process.ensure()
        assert recorded(tmp_path) == count
    with pytest.raises(StorageDown, match=r"died 5 times, .* \(last: it has written nothing\)"):
        process.ensure()


def test_a_downloader_that_has_lived_for_long_begins_a_new_row(process: DownloaderProcess, tmp_path: Path) -> None:
    now = time.monotonic()
    dead(tmp_path, (now, now, now, now), ago=100.0)
    with pytest.raises(NotStarted):
        process.ensure()
    assert recorded(tmp_path) == 0


def test_deaths_in_earlier_runs_do_not_end_this_one(process: DownloaderProcess, tmp_path: Path) -> None:
    dead(tmp_path, (1.0, 2.0, 3.0, 4.0, 5.0))
    with pytest.raises(NotStarted):
        process.ensure()
    assert recorded(tmp_path) == 5  # the last one was found by this run


@pytest.mark.parametrize("content", ["", "[]", '{"time": NaN, "log_bytes": 0, "deaths": []}', "{"])
def test_a_damaged_record_of_starts_counts_as_none(process: DownloaderProcess, tmp_path: Path, content: str) -> None:
    start_record(tmp_path).write_text(content)
    with pytest.raises(NotStarted):
        process.ensure()
    assert recorded(tmp_path) == 0


@pytest.mark.slow
def test_a_downloader_that_ends_with_its_reader_has_not_died(dataset: Dataset, tmp_path: Path) -> None:
    for _ in range(2):
        reader = CachedShards(Cache(tmp_path, 10**9), dataset)
        reader.request([0], [])
        assert json.loads(start_record(tmp_path).read_text())["deaths"] == []
        reader.close()
        assert not start_record(tmp_path).exists()


@pytest.mark.slow
def test_a_killed_downloader_is_replaced_and_counted(dataset: Dataset, tmp_path: Path) -> None:
    reader = CachedShards(Cache(tmp_path, 10**9), dataset)
    reader.request([0], [])
    killed = reader._downloader.own
    assert killed is not None
    os.kill(killed.pid, signal.SIGKILL)
    killed.wait()
    reader._ensure_downloader()
    assert recorded(tmp_path) == 1
    reader.close()


def test_a_reader_whose_request_is_of_another_version_is_told_so(
    dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(CachedShards, "_ensure_downloader", lambda self: None)
    monkeypatch.setattr("data.remote.cache._CHECK_INTERVAL", 0.01)
    monkeypatch.setattr("data.remote.cache.REQUEST_VERSION", 3)
    with downloading(tmp_path) as cache:
        reader = CachedShards(cache, dataset)
        message = r"does not understand the request of this one \(version: must be 2, not 3\); they are of different"
        with pytest.raises(StorageDown, match=message):
            reader.path(0)
        monkeypatch.setattr("data.remote.cache.REQUEST_VERSION", 2)
        reader.request([1], [])  # one that it reads
        until(lambda: not list((tmp_path / "requests").glob("*.refused")))
        reader.close()
    assert not list((tmp_path / "requests").iterdir())
