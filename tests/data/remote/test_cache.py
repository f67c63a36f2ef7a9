"""Remote shards through the cache of the node, from a real S3 server behind a proxy that injects faults."""

import itertools
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest

from data.building.build import build_shards
from data.dataset import Dataset, open_dataset
from data.errors import DataError, StorageDown, StorageRefused
from data.images.augment import EvaluationTransform, TrainTransform
from data.index import read_index
from data.order import SampleOrder
from data.remote.cache import Cache, CachedShards
from data.remote.storage import Storage
from data.stream import MicroBatch, RankShare, evaluation_stream, training_stream
from tests.conftest import write_pictures
from tests.servers.fault_proxy import Fault, FaultProxy
from tests.servers.s3 import S3Server

pytestmark = pytest.mark.slow

STEPS = 16


@pytest.fixture(scope="session")
def remote(s3_server: S3Server, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """URL and local folder of 96 images in 12 shards of about 50 KB."""
    folder = tmp_path_factory.mktemp("remote")
    write_pictures(folder / "pictures", per_class=32, size=96)
    build_shards(folder / "pictures", folder / "shards", samples_per_shard=8)
    return s3_server.put(folder / "shards", "cached"), folder / "shards"


@pytest.fixture
def proxy(s3: S3Server) -> Iterator[FaultProxy]:
    with FaultProxy(s3.port) as proxy:
        yield proxy


def impatient(proxy: FaultProxy, give_up_after: float = 60) -> Storage:
    return Storage(endpoint=proxy.url, give_up_after=give_up_after, greatest_delay=0.03, read_timeout=1)


def batches(dataset: Dataset, cache: Cache | None, first_step: int = 0) -> Iterator[MicroBatch]:
    order = SampleOrder(dataset.shard_samples, seed=5, batch=12, lanes=4, window=10)
    return training_stream(
        dataset, order, TrainTransform(16), RankShare(0, 1, 6), first_step=first_step, workers=2,
        cache=cache,
    )  # fmt: skip


def pixels(found: Iterator[MicroBatch], steps: int = STEPS) -> np.ndarray:
    images = np.concatenate([batch.images for batch in itertools.islice(found, 2 * steps)])
    found.close()  # type: ignore[attr-defined]
    return images


def shard_requests(proxy: FaultProxy) -> Counter[str]:
    return Counter(path.rpartition("/")[2] for method, path in proxy.requests if method == "GET" and ".tar" in path)


def test_remote_shards_give_the_samples_of_local_ones_and_are_downloaded_once(
    proxy: FaultProxy, remote: tuple[str, Path], tmp_path: Path
) -> None:
    url, folder = remote
    dataset, cache = open_dataset(url, impatient(proxy)), Cache(tmp_path, 10**9)
    assert np.array_equal(pixels(batches(dataset, cache)), pixels(batches(Dataset(read_index(folder)), None)))
    again = pixels(batches(dataset, cache))
    assert np.array_equal(again, pixels(batches(Dataset(read_index(folder)), None)))
    assert set(shard_requests(proxy).values()) == {1}
    assert {path.stem for path in (tmp_path / "shards").iterdir()} == {s.sha256 for s in dataset.index.shards}


@pytest.mark.parametrize(
    "fault",
    [
        pytest.param(Fault("status", times=12), id="a burst of 503"),
        pytest.param(Fault("status", share=0.1), id="10 % of requests fail"),
        pytest.param(Fault("status", share=0.5, status=500, code="InternalError"), id="50 % of requests fail"),
        pytest.param(Fault("status", share=0.9), id="90 % of requests fail"),
        pytest.param(Fault("status", share=0.5, status=429, code="TooManyRequests"), id="too many requests"),
        pytest.param(Fault("reset", share=0.5), id="reset in the middle"),
        pytest.param(Fault("truncate", share=0.5), id="truncated"),
        pytest.param(Fault("flip", times=3, after=20_000), id="a flipped byte"),
        pytest.param(Fault("stall", times=3), id="stalled"),
        pytest.param(Fault("status", path="index.json", times=4), id="the index fails first"),
    ],
)
def test_training_reads_exactly_the_same_samples_through_a_bad_connection(
    fault: Fault, proxy: FaultProxy, remote: tuple[str, Path], tmp_path: Path
) -> None:
    url, folder = remote
    proxy.faults = [fault]
    found = pixels(batches(open_dataset(url, impatient(proxy)), Cache(tmp_path, 10**9, downloads=12)))
    assert fault.fired > 0
    assert np.array_equal(found, pixels(batches(Dataset(read_index(folder)), None)))


def test_training_survives_a_restart_of_the_server(s3: S3Server, remote: tuple[str, Path], tmp_path: Path) -> None:
    url, folder = remote
    # Room for what a window needs, so that shards are fetched all along.
    dataset = open_dataset(url, Storage(greatest_delay=0.2))
    stream = batches(dataset, Cache(tmp_path, 400_000))
    found = [next(stream).images for _ in range(4)]
    s3.stop()
    s3.start()
    found += [batch.images for batch in itertools.islice(stream, 2 * STEPS - 4)]
    stream.close()  # type: ignore[attr-defined]
    assert np.array_equal(np.concatenate(found), pixels(batches(Dataset(read_index(folder)), None)))


@pytest.mark.parametrize(
    ("key", "secret", "anonymous"),
    [("testkey", "wrong", False), ("unknown", "testsecret", False), (None, None, False), ("testkey", "x", True)],
)
def test_refused_credentials_are_reported_at_once(
    key: str | None, secret: str, anonymous: bool, proxy: FaultProxy, remote: tuple[str, Path],
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
) -> None:  # fmt: skip
    monkeypatch.setenv("HOME", str(tmp_path))  # no credentials file
    for name, value in (("AWS_ACCESS_KEY_ID", key), ("AWS_SECRET_ACCESS_KEY", secret)):
        monkeypatch.setenv(name, value) if value else monkeypatch.delenv(name)
    with pytest.raises(StorageRefused, match=r"cached/index.json: access refused .*127.0.0.1:\d+ with"):
        open_dataset(remote[0], Storage(endpoint=proxy.url, anonymous=anonymous))
    assert len(proxy.requests) <= 2


def test_credentials_may_come_from_a_profile_or_not_be_needed(
    s3: S3Server, remote: tuple[str, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_ENDPOINT_URL"):
        monkeypatch.delenv(name)
    (tmp_path / "credentials").write_text("[reader]\naws_access_key_id = readonly\naws_secret_access_key = readonly\n")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    local = pixels(batches(Dataset(read_index(remote[1])), None))
    by_profile = open_dataset(remote[0], Storage(endpoint=s3.url, profile="reader"))
    assert np.array_equal(pixels(batches(by_profile, Cache(tmp_path / "a", 10**9))), local)

    url = s3.put(remote[1], "cached", bucket="public")
    without = open_dataset(url, Storage(endpoint=s3.url, anonymous=True))
    assert np.array_equal(pixels(batches(without, Cache(tmp_path / "b", 10**9))), local)


def test_credentials_refused_in_the_middle_of_a_run_end_it_at_once(
    proxy: FaultProxy, remote: tuple[str, Path], tmp_path: Path
) -> None:
    dataset = open_dataset(remote[0], impatient(proxy))
    proxy.faults = [Fault("status", status=403, code="AccessDenied")]
    with pytest.raises(DataError, match=r"shard-0000\d\d.tar: access refused \(PermissionError"):
        next(batches(dataset, Cache(tmp_path, 10**9)))
    assert max(shard_requests(proxy).values()) == 1


def test_a_server_that_does_not_come_back_ends_the_run_as_retryable(
    proxy: FaultProxy, remote: tuple[str, Path], tmp_path: Path
) -> None:
    dataset = open_dataset(remote[0], impatient(proxy, give_up_after=1))
    proxy.faults = [Fault("status")]
    with pytest.raises(StorageDown, match=r"no answer in 1 s \(last: .*the server or the network is down"):
        next(batches(dataset, Cache(tmp_path, 10**9)))


def test_a_shard_whose_hash_is_wrong_is_downloaded_twice_and_then_refused(
    proxy: FaultProxy, remote: tuple[str, Path], tmp_path: Path
) -> None:
    dataset = open_dataset(remote[0], impatient(proxy))
    name = dataset.index.shards[3].name
    proxy.faults = [Fault("flip", path=name)]
    with pytest.raises(DataError, match=f"cached/{name}: downloaded twice, and its sha256 is not"):
        pixels(batches(dataset, Cache(tmp_path, 10**9)))
    assert shard_requests(proxy)[name] == 2


def test_the_cache_stays_below_its_cap_and_evicts_only_unrequested_shards(
    proxy: FaultProxy, remote: tuple[str, Path], tmp_path: Path
) -> None:
    url, folder = remote
    dataset = open_dataset(url, impatient(proxy))
    sizes = [shard.bytes for shard in dataset.index.shards]
    order = SampleOrder(dataset.shard_samples, seed=5, batch=12, lanes=1, window=10)
    cap = order.greatest_need(np.array(sizes), ranks=1, ranks_of_node=1, steps=3)
    assert cap < sum(sizes)
    streams = [
        training_stream(data, order, TrainTransform(16), RankShare(0, 1, 6), first_step=0, workers=2, cache=cache)
        for data, cache in ((dataset, Cache(tmp_path, cap)), (Dataset(read_index(folder)), None))
    ]
    greatest = 0
    for remote_batch, local_batch in itertools.islice(zip(*streams, strict=True), 60):
        greatest = max(greatest, Cache(tmp_path, cap).used_bytes())
        assert np.array_equal(remote_batch.images, local_batch.images)
    assert cap / 2 < greatest <= cap
    assert max(shard_requests(proxy).values()) > 1  # evicted and fetched again
    assert [shard.bytes for shard in read_index(folder).shards] == sizes


def test_readers_share_one_downloader_and_each_shard_is_downloaded_once(
    proxy: FaultProxy, remote: tuple[str, Path], tmp_path: Path
) -> None:
    dataset, cache = open_dataset(remote[0], impatient(proxy)), Cache(tmp_path, 10**9)
    readers = [CachedShards(cache, dataset) for _ in range(4)]
    for reader in readers:
        reader.request(range(12), [])
    for reader, number in itertools.product(readers, range(12)):
        assert reader.path(number).stat().st_size == dataset.index.shards[number].bytes
    assert len(downloaders(tmp_path)) == 1
    assert shard_requests(proxy) == {shard.name: 1 for shard in dataset.index.shards}
    for reader in readers:
        reader.close()
    assert downloaders(tmp_path) == []
    assert list((tmp_path / "requests").iterdir()) == []


def test_a_killed_downloader_is_replaced_and_its_partial_files_are_removed(
    proxy: FaultProxy, remote: tuple[str, Path], tmp_path: Path
) -> None:
    url, folder = remote
    dataset, cache = open_dataset(url, impatient(proxy)), Cache(tmp_path, 10**9, downloads=2)
    first, second = CachedShards(cache, dataset), CachedShards(cache, dataset)
    proxy.faults = [Fault("stall")]
    first.request(range(12), [])
    second.request(range(12), [])
    wait_until(lambda: len(list((tmp_path / "shards").glob("*.part"))) == 2)
    (downloader,) = downloaders(tmp_path)
    downloader.send_signal(signal.SIGKILL)
    proxy.faults = []
    # The first reader that waits starts the next one, which begins by removing partial files.
    for number in range(12):
        assert second.path(number).read_bytes() == (folder / dataset.index.shards[number].name).read_bytes()
    assert list((tmp_path / "shards").glob("*.part")) == []
    first.close()
    second.close()


def test_the_downloader_ignores_stop_signals_from_its_start(
    proxy: FaultProxy, remote: tuple[str, Path], tmp_path: Path
) -> None:
    dataset, cache = open_dataset(remote[0], impatient(proxy)), Cache(tmp_path, 10**9)
    reader = CachedShards(cache, dataset)
    held_back = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    starting = threading.Thread(target=reader.request, args=[range(12), []])
    starting.start()
    wait_until(lambda: len(downloaders(tmp_path)) == 1)  # long before it has imported what it needs
    (downloader,) = downloaders(tmp_path)
    for moment in range(2):
        for number in (signal.SIGCONT, signal.SIGTERM, signal.SIGHUP, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
            downloader.send_signal(number)
        starting.join(60)
        assert reader.path(11 * moment).exists()
    assert downloaders(tmp_path) == [downloader]
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == held_back
    status = Path(f"/proc/{downloader.pid}/status").read_text()
    assert "SigBlk:\t0000000000000000" in status
    reader.close()
    assert downloaders(tmp_path) == []


def test_requests_of_a_killed_reader_are_removed(proxy: FaultProxy, remote: tuple[str, Path], tmp_path: Path) -> None:
    dataset, cache = open_dataset(remote[0], impatient(proxy)), Cache(tmp_path, 10**9)
    child = os.fork()
    if child == 0:  # a reader that is killed while it wants something
        reader = CachedShards(cache, dataset)
        reader._ensure_downloader = lambda: None  # type: ignore[method-assign]
        reader.request(range(12), [])
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    assert len(list((tmp_path / "requests").glob("*.json"))) == 1
    reader = CachedShards(cache, dataset)
    reader.request([0], [])
    reader.path(0)
    wait_until(lambda: len(list((tmp_path / "requests").glob("*.json"))) == 1)
    reader.close()
    assert [path.stem for path in (tmp_path / "shards").iterdir()] == [dataset.index.shards[0].sha256]


def test_a_cached_shard_truncated_by_a_crash_is_downloaded_again(
    proxy: FaultProxy, remote: tuple[str, Path], tmp_path: Path
) -> None:
    url, folder = remote
    dataset, cache = open_dataset(url, impatient(proxy)), Cache(tmp_path, 10**9)
    cache.make()
    cache.shard_path(dataset.index.shards[2].sha256).write_bytes(b"half of it")
    assert np.array_equal(pixels(batches(dataset, cache)), pixels(batches(Dataset(read_index(folder)), None)))


def test_a_cached_shard_that_has_changed_since_is_found_at_the_next_start(
    proxy: FaultProxy, remote: tuple[str, Path], tmp_path: Path
) -> None:
    url, folder = remote
    expected = pixels(batches(Dataset(read_index(folder)), None))
    dataset, cache = open_dataset(url, impatient(proxy)), Cache(tmp_path, 10**9)
    assert np.array_equal(pixels(batches(dataset, cache)), expected)
    kept = sorted(path.stat().st_ino for path in (tmp_path / "shards").iterdir())
    changed = cache.shard_path(dataset.index.shards[2].sha256)
    content = bytearray(changed.read_bytes())
    content[len(content) // 2] ^= 1
    changed.write_bytes(content)
    with changed.open("rb"):  # so that its inode is not given to the file that takes its place
        assert np.array_equal(pixels(batches(dataset, cache)), expected)
    again = sorted(path.stat().st_ino for path in (tmp_path / "shards").iterdir())
    assert len(set(kept) & set(again)) == len(kept) - 1  # the others were verified and not downloaded again


def test_evaluation_reads_remote_shards_through_a_small_cache(
    proxy: FaultProxy, remote: tuple[str, Path], tmp_path: Path
) -> None:
    url, folder = remote

    def labels(dataset: Dataset, cache: Cache | None) -> list[np.ndarray]:
        stream = evaluation_stream(dataset, EvaluationTransform(16), RankShare(0, 1, 4), workers=1, cache=cache)
        return [array for batch in stream for array in (batch.labels, batch.images)]

    found = labels(open_dataset(url, impatient(proxy)), Cache(tmp_path, 300_000))
    expected = labels(Dataset(read_index(folder)), None)
    assert all(np.array_equal(a, b) for a, b in zip(found, expected, strict=True))


def downloaders(folder: Path) -> list[psutil.Process]:
    return [
        process
        for process in psutil.process_iter(["cmdline", "status"])
        if process.info["status"] != psutil.STATUS_ZOMBIE
        and (process.info["cmdline"] or [])[-2:] == ["data.remote.downloader", str(folder)]
    ]


def wait_until(condition: Callable[[], bool], seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.02)


def test_a_cache_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(
        DataError, match=r"file/cache: Not a directory; the cache of remote shards needs .*data\.cache\.folder"
    ):
        Cache(tmp_path / "file" / "cache", 10).make()
