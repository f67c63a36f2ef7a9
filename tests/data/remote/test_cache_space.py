"""The cache on a disk that is smaller than its cap: real file systems, mounted for the tests, and a real web server."""

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from data.dataset import Dataset
from data.errors import DataError, StorageDown
from data.files.file_lock import locked, try_lock
from data.index import LabelFormat, ShardEntry, ShardIndex
from data.remote.cache import Cache, CachedShards, DownloadFailure
from data.remote.downloader import Downloader, _kept
from data.remote.held_shards import HeldShards
from data.remote.storage import Storage
from data.sample_reader import SampleReader
from tests.servers.web import WebServer
from tests.support.disk import small_file_system
from tests.support.downloading import CAP, downloading, stored, until

SHARDS, BYTES = 8, 200_000


@pytest.fixture
def remote(tmp_path: Path) -> Iterator[tuple[WebServer, Dataset]]:
    """Eight files of 200 kB on a web server, and their index. The cache does not look into them."""
    folder = tmp_path / "www"
    folder.mkdir()
    entries = []
    for number in range(SHARDS):
        content = np.random.default_rng(number).bytes(BYTES)
        (folder / f"{number}.tar").write_bytes(content)
        entries.append(ShardEntry(f"{number}.tar", 10, BYTES, hashlib.sha256(content).hexdigest()))
    with WebServer(folder) as web:
        index = ShardIndex(web.url, ("a",), ("jpg",), LabelFormat(), tuple(entries))
        yield web, Dataset(index, Storage(give_up_after=0.2, greatest_delay=0.02))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system with room for five of the shards."""
    with small_file_system(tmp_path / "disk", "1100k") as folder:
        yield folder


@pytest.fixture(autouse=True)
def no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Readers start no downloader of their own: the tests have one in this process."""
    monkeypatch.setattr(CachedShards, "_ensure_downloader", lambda self: None)


def test_shards_are_evicted_before_the_disk_is_full(remote: tuple[WebServer, Dataset], small_disk: Path) -> None:
    web, dataset = remote
    with downloading(small_disk) as cache:
        reader = CachedShards(cache, dataset)
        for number in range(SHARDS):
            reader.request([number], [])
            assert reader.path(number).stat().st_size == BYTES
        assert 1 < len(stored(cache, dataset)) < SHARDS
        assert not list((small_disk / "failed").iterdir())
        assert len(web.requests) == SHARDS
        reader.close()


def test_a_full_disk_evicts_and_the_shard_is_tried_again(
    remote: tuple[WebServer, Dataset], small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with a quota, which the free space does not show."""
    monkeypatch.setattr(Cache, "disk_room", lambda self, used: CAP)
    _, dataset = remote
    with downloading(small_disk) as cache:
        reader = CachedShards(cache, dataset)
        for number in range(SHARDS):
            reader.request([number], [])
            assert reader.path(number).stat().st_size == BYTES
        reader.close()


def test_prefetched_shards_make_room_for_urgent_ones(remote: tuple[WebServer, Dataset], small_disk: Path) -> None:
    _, dataset = remote
    with downloading(small_disk) as cache:
        reader = CachedShards(cache, dataset)
        reader.request([], range(SHARDS))
        until(lambda: len(stored(cache, dataset)) >= 4)
        reader.request([6, 7], range(6))
        assert all(reader.path(number).exists() for number in (6, 7))
        assert 0 in stored(cache, dataset)  # the most urgent of the others
        reader.close()


@pytest.mark.parametrize("visible", [True, False])
def test_what_readers_need_at_once_does_not_fit(
    visible: bool, remote: tuple[WebServer, Dataset], small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not visible:
        monkeypatch.setattr(Cache, "disk_room", lambda self, used: CAP)
    _, dataset = remote
    with downloading(small_disk) as cache:
        reader = CachedShards(cache, dataset)
        reader.request(range(SHARDS), [])
        with pytest.raises(DataError, match=r"tar: no space for its 0.2 MB in .*disk, and running readers need all"):
            [reader.path(number) for number in range(SHARDS)]
        assert len(stored(cache, dataset)) == 5  # those that fit
        reader.close()


def test_shards_that_nobody_requests_make_room_for_other_files_on_the_disk(
    remote: tuple[WebServer, Dataset], small_disk: Path
) -> None:
    """Also for the next request, for which there is no space at first."""
    _, dataset = remote
    with downloading(small_disk) as cache:
        reader = CachedShards(cache, dataset)
        reader.request(range(4), [])
        until(lambda: stored(cache, dataset) == [0, 1, 2, 3])
        with suppress(OSError), open(small_disk / "checkpoint", "wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))
        reader.request([0], [])
        until(lambda: len(stored(cache, dataset)) == 3)
        assert cache.disk_room(0) >= 0
        assert reader.path(0).exists()
        reader.close()


def test_what_living_readers_want_is_not_free_for_another_run(
    remote: tuple[WebServer, Dataset], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Usage(NamedTuple):
        total: int
        used: int
        free: int

    _, dataset = remote
    cache = Cache(tmp_path / "cache", CAP)
    with downloading(cache.folder):
        reader = CachedShards(cache, dataset)
        reader.request([0, 1], [2])
        until(lambda: stored(cache, dataset) == [0, 1, 2])
        monkeypatch.setattr(shutil, "disk_usage", lambda folder: Usage(50 * BYTES, 0, 20 * BYTES))
        held, reserve = 3 * BYTES, BYTES
        assert cache.room_for_another_run() == 20 * BYTES + held - reserve - 3 * BYTES
        (cache.folder / "shards" / f"{dataset.index.shards[0].sha256}.tar").unlink()  # wanted, and to be fetched again
        assert cache.room_for_another_run() <= 20 * BYTES + held - reserve - 3 * BYTES
        reader.close()
        assert cache.room_for_another_run() == 20 * BYTES - reserve + cache.used_bytes()


def test_shards_without_samples_in_the_dataset_are_not_fetched(
    remote: tuple[WebServer, Dataset], tmp_path: Path
) -> None:
    web, whole = remote
    kept = np.zeros(10 * SHARDS, bool)
    kept[35:65] = True  # samples of shards 3 to 6
    dataset = Dataset(whole.index, whole.storage, kept=kept)
    with downloading(tmp_path / "cache") as cache:
        reader = CachedShards(cache, dataset)
        reader.request(range(4), range(4, SHARDS))
        until(lambda: stored(cache, dataset) == [3, 4, 5, 6])
        assert {path for _, path in web.requests} == {f"/{number}.tar" for number in (3, 4, 5, 6)}
        reader.close()


def test_a_failed_prefetch_is_tried_again_when_the_shard_is_needed(
    remote: tuple[WebServer, Dataset], tmp_path: Path
) -> None:
    web, dataset = remote
    web.status = 403
    with downloading(tmp_path / "cache") as cache:
        reader = CachedShards(cache, dataset)
        reader.request([], [0])
        until(cache.failure_path(dataset.index.shards[0].sha256).exists)
        web.status = 200
        assert reader.path(0).stat().st_size == BYTES
        reader.close()


@pytest.mark.parametrize(("age", "urgent", "holds"), [(1, True, True), (61, True, False), (1, False, False)])
def test_a_failure_holds_if_it_is_recent_and_was_not_one_of_a_prefetch(
    age: float, urgent: bool, holds: bool, remote: tuple[WebServer, Dataset], tmp_path: Path
) -> None:
    _, dataset = remote
    with downloading(tmp_path / "cache") as cache:
        reader = CachedShards(cache, dataset)
        record = cache.failure_path(dataset.index.shards[0].sha256)
        reader.request([0], [])
        until(lambda: stored(cache, dataset) == [0])
        cache.shard_path(dataset.index.shards[0].sha256).unlink()
        record.write_text(json.dumps(asdict(DownloadFailure("the reason", True, urgent, time.monotonic() - age))))
        if holds:
            with pytest.raises(StorageDown, match="the reason"):
                reader.path(0)
        else:
            assert reader.path(0).stat().st_size == BYTES
        reader.close()


def test_a_shard_that_was_not_requested_or_only_as_a_prefetch_is_fetched_when_needed(
    remote: tuple[WebServer, Dataset], small_disk: Path
) -> None:
    _, dataset = remote
    with downloading(small_disk) as cache:
        reader = CachedShards(cache, dataset)
        reader.request([0, 1, 2], [3, 4, 5, 6])  # the last ones do not fit as prefetched ones
        assert reader.path(6).stat().st_size == BYTES
        assert reader.path(7).stat().st_size == BYTES
        reader.close()


def remove_lock(reader: CachedShards, cache: Cache) -> None:
    reader._lock_path.unlink()


def remove_request(reader: CachedShards, cache: Cache) -> None:
    reader._request_path.unlink()


def remove_all(reader: CachedShards, cache: Cache) -> None:
    cache.folder.rename(cache.folder.with_name("removed"))  # at once, as the downloader makes the folders again


@pytest.mark.parametrize("clean", [remove_lock, remove_request, remove_all])
def test_a_cleaner_of_temporary_folders_does_not_starve_a_reader(
    clean: Callable[[CachedShards, Cache], None], remote: tuple[WebServer, Dataset], tmp_path: Path
) -> None:
    _, dataset = remote
    with downloading(tmp_path / "cache") as cache:
        reader = CachedShards(cache, dataset)
        reader.request([0], [])
        reader.path(0)
        clean(reader, cache)
        until(lambda: not list((cache.folder / "requests").glob("*.json")))  # the downloader forgets it
        reader._requested = ([0, 1], [])  # as if it had been requested before that
        assert reader.path(1).stat().st_size == BYTES
        assert try_lock(reader._lock_path, create=False) is None
        reader.close()


def test_shards_that_a_cleaner_removes_are_fetched_again(remote: tuple[WebServer, Dataset], tmp_path: Path) -> None:
    _, dataset = remote
    with downloading(tmp_path / "cache") as cache:
        reader = CachedShards(cache, dataset)
        reader.request([0], [])
        reader.path(0).unlink()
        assert reader.path(0).stat().st_size == BYTES
        reader.close()


def test_a_downloader_whose_lock_was_removed_takes_it_again_or_leaves(tmp_path: Path) -> None:
    path = tmp_path / "downloader.lock"
    lock = locked(path)
    assert _kept(lock, path) is lock
    path.unlink()
    again = _kept(lock, path)
    assert again is not None
    assert try_lock(path) is None
    path.unlink()
    other = locked(path)
    assert _kept(again, path) is None
    other.close()


def test_a_shard_that_is_evicted_before_it_is_open_is_fetched_again(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from data.index import read_index

    evicted: list[int] = []
    with WebServer(shards / "train") as web, downloading(tmp_path / "cache") as cache:
        local = read_index(shards / "train")
        index = ShardIndex(web.url, local.classes, local.image_fields, local.label, local.shards)
        reader = SampleReader(Dataset(index, Storage(give_up_after=5)), cache)
        path = CachedShards.path

        def path_and_eviction(self: CachedShards, number: int) -> Path:
            found = path(self, number)
            if not evicted:
                found.unlink()
                evicted.append(number)
            return found

        monkeypatch.setattr(CachedShards, "path", path_and_eviction)
        assert reader.read(2, 0).key == SampleReader(Dataset(local), None).read(2, 0).key
        assert evicted == [2]
        reader.close()


def test_a_reader_closes_the_shards_that_it_no_longer_requests(shards: Path, tmp_path: Path) -> None:
    """An evicted file that is open would go on taking space on the disk, beyond the cap."""
    from data.index import read_index

    with WebServer(shards / "train") as web, downloading(tmp_path / "cache") as cache:
        local = read_index(shards / "train")
        index = ShardIndex(web.url, local.classes, local.image_fields, local.label, local.shards)
        dataset = Dataset(index, Storage(give_up_after=5))
        reader = SampleReader(dataset, Cache(cache.folder, max(shard.bytes for shard in index.shards)))
        for number in range(len(index.shards)):
            reader.request([number])
            reader.read(number, 0)
            until(lambda number=number: stored(cache, dataset) == [number])  # type: ignore[misc]
            assert _open_files(cache.folder / "shards") == [str(cache.shard_path(index.shards[number].sha256))]
        reader.close()


def test_files_that_vanish_while_a_downloader_starts_do_not_stop_it(
    remote: tuple[WebServer, Dataset], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when a reader closes, or takes note of a failure, just then: what is listed is gone a moment later."""
    _, dataset = remote
    cache = Cache(tmp_path, CAP)
    cache.make()
    for name in ("shards/x.part", "shards/y.tar", "failed/x", "requests/a.lock", "requests/b.lock", "requests/b.json"):
        (tmp_path / name).touch()
    listed, iterated = Path.glob, Path.iterdir

    def vanishing(found: Iterator[Path]) -> list[Path]:
        paths = list(found)
        for path in paths:
            path.unlink()
        return paths

    monkeypatch.setattr(Path, "glob", lambda self, pattern: vanishing(listed(self, pattern)))
    monkeypatch.setattr(Path, "iterdir", lambda self: vanishing(iterated(self)))
    downloader = Downloader(tmp_path)
    (tmp_path / "requests/c.lock").touch()
    (tmp_path / "requests/c.json").touch()
    downloader.update()
    monkeypatch.undo()
    assert dataset.index.shards[0].sha256 not in downloader._held


def test_the_shards_held_are_listed_once_and_evicted_in_the_order_of_their_use(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(6):
        (tmp_path / f"{number}.tar").write_bytes(bytes(10 + number))
        os.utime(tmp_path / f"{number}.tar", ns=(0, 1000 * number))
    held = HeldShards(tmp_path)
    monkeypatch.setattr(Path, "glob", None)  # listing again would fail
    assert held.bytes == 75
    for number in range(6):
        assert held.is_earlier(str(number))
        (tmp_path / f"{number}.earlier").rename(tmp_path / f"{number}.tar")  # verified
        held.check(str(number), 10 + number)
        assert str(number) in held
    assert held.bytes == 75
    os.utime(tmp_path / "1.tar")  # used
    (tmp_path / "2.tar").unlink()  # by somebody else
    assert held.evict_least_recent({"0"})  # so that it is 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0.tar", "1.tar", "4.tar", "5.tar"]
    (tmp_path / "6.tar").write_bytes(bytes(16))
    os.utime(tmp_path / "6.tar", ns=(0, 1))
    held.check("6", 16)
    held.check("5", 99)  # another size: it is removed
    held.check("7", 1)
    assert held.bytes == sum(path.stat().st_size for path in tmp_path.iterdir()) == 10 + 11 + 14 + 16
    order = list[set[str]]()
    while held.evict_least_recent(()):
        order.append({"0", "1", "4", "6"} - {path.stem for path in tmp_path.iterdir()} - set().union(*order))
    assert order == [{"0"}, {"6"}, {"4"}, {"1"}]
    assert held.bytes == 0


def test_a_downloader_without_news_does_not_look_at_the_shards_it_holds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Cache(tmp_path, CAP).make()
    for number in range(100):
        (tmp_path / "shards" / f"{number}.tar").touch()
    downloader = Downloader(tmp_path)
    downloader.update()
    downloader._next_check = time.monotonic() + 3600
    looked, stat = list[Path](), Path.stat

    def noted(self: Path, **options: bool) -> os.stat_result:
        looked.append(self)
        return stat(self, **options)

    monkeypatch.setattr(Path, "stat", noted)
    monkeypatch.setattr(Path, "iterdir", None)
    for _ in range(20):
        downloader.update()
    assert [path for path in looked if path.suffix == ".tar"] == []


def _open_files(folder: Path) -> list[str]:
    """What this process has open in `folder`; the names of removed files end with " (deleted)"."""
    found = []
    for descriptor in Path("/proc/self/fd").iterdir():
        with suppress(FileNotFoundError):
            found.append(os.readlink(descriptor))
    return [path for path in found if path.startswith(f"{folder}/")]
