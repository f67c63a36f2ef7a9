"""Shards are downloaded equal to the byte in as few requests as possible, which continue where they were interrupted."""

import hashlib
import tracemalloc
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import fsspec
import numpy as np
import pytest
import s3fs

from data.dataset import Dataset
from data.errors import StorageDown, StorageRefused
from data.index import LabelFormat, ShardEntry, ShardIndex
from data.remote import byte_stream as streams
from data.remote.byte_stream import BUFFER, ObjectReplaced, ObjectVersion, byte_stream
from data.remote.cache import Cache, CachedShards, RequestedShard
from data.remote.deadlines import completed, transfer_seconds
from data.remote.downloader import Downloader, _Download
from data.remote.shard_download import download, shard_requests
from data.remote.storage import PIECE, Storage
from tests.servers.fault_proxy import Fault, FaultProxy
from tests.servers.s3 import S3Server
from tests.servers.web import WebServer
from tests.support.downloading import downloading

pytestmark = pytest.mark.slow

OBJECT = "test/downloads/shard.tar"
MIB = 2**20
CONTENT = np.random.default_rng(0).bytes(7 * MIB + 12_345)


@pytest.fixture(scope="module")
def writer(s3_server: S3Server) -> s3fs.S3FileSystem:
    """Writes objects without passing through the proxy."""
    return s3_server.files()


@pytest.fixture(scope="module")
def running_proxy(s3_server: S3Server) -> Iterator[FaultProxy]:
    with FaultProxy(s3_server.port) as proxy:
        yield proxy


@pytest.fixture
def proxy(s3: S3Server, running_proxy: FaultProxy) -> FaultProxy:
    for seen in (running_proxy.faults, running_proxy.requests, running_proxy.fields):
        seen.clear()
    return running_proxy


@pytest.fixture
def shard(writer: s3fs.S3FileSystem, proxy: FaultProxy) -> RequestedShard:
    writer.pipe_file(OBJECT, CONTENT)
    return requested(f"s3://{OBJECT}", CONTENT, proxy)


def requested(location: str, content: bytes, proxy: FaultProxy | None = None) -> RequestedShard:
    storage = Storage(endpoint=proxy.url if proxy else None, give_up_after=30, greatest_delay=0.03, read_timeout=20)
    return RequestedShard(location, len(content), hashlib.sha256(content).hexdigest(), storage, urgent=True)


def ranges(proxy: FaultProxy) -> list[tuple[int, int]]:
    """First and last byte of each request, which all are GETs of a range."""
    assert {method for method, _ in proxy.requests} <= {"GET"}
    found = (fields["range"].removeprefix("bytes=").split("-") for fields in proxy.fields)
    return [(int(first), int(last)) for first, last in found]


def in_ranges_of(size: int, monkeypatch: pytest.MonkeyPatch, connections: int = 4) -> None:
    monkeypatch.setattr("data.remote.shard_download.RANGE", size)
    monkeypatch.setattr("data.remote.shard_download._CONNECTIONS", connections)


def test_a_shard_takes_one_request_and_no_question(proxy: FaultProxy, shard: RequestedShard, tmp_path: Path) -> None:
    assert download(shard, tmp_path / "part")
    assert (tmp_path / "part").read_bytes() == CONTENT
    assert ranges(proxy) == [(0, len(CONTENT) - 1)]


def test_a_large_shard_takes_one_request_for_each_range(
    proxy: FaultProxy, shard: RequestedShard, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_ranges_of(MIB, monkeypatch)
    assert download(shard, tmp_path / "part")
    assert (tmp_path / "part").read_bytes() == CONTENT
    expected = [(start, min(start + MIB, len(CONTENT)) - 1) for start in range(0, len(CONTENT), MIB)]
    assert sorted(ranges(proxy)) == expected
    assert len(expected) == shard_requests(len(CONTENT)) == 8


def test_a_shard_of_two_ranges_is_not_worth_several_connections(monkeypatch: pytest.MonkeyPatch) -> None:
    in_ranges_of(MIB, monkeypatch)
    assert [shard_requests(size) for size in (0, 1, 2 * MIB, 2 * MIB + 1, 3 * MIB + 1)] == [1, 1, 1, 3, 4]


def test_an_empty_shard_takes_no_request(proxy: FaultProxy, shard: RequestedShard, tmp_path: Path) -> None:
    assert download(replace(shard, bytes=0, sha256=hashlib.sha256().hexdigest()), tmp_path / "part")
    assert (tmp_path / "part").read_bytes() == b""
    assert proxy.requests == []


@pytest.mark.parametrize("size", [64 * MIB, 3 * MIB], ids=["whole", "ranges"])
def test_an_interrupted_request_continues_where_it_was(
    size: int, proxy: FaultProxy, shard: RequestedShard, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_ranges_of(size, monkeypatch, connections=1)
    received = 2_800_000
    proxy.faults = [Fault("truncate", times=1, after=received)]
    assert download(shard, tmp_path / "part")
    assert (tmp_path / "part").read_bytes() == CONTENT
    first, second, *_ = ranges(proxy)
    assert first[0] == 0
    assert BUFFER <= second[0] <= received
    assert second[1] == first[1]
    assert "if-match" not in proxy.fields[0]
    assert all("if-match" in fields for fields in proxy.fields[1:])


@pytest.mark.parametrize("ranges_known", [True, False])
def test_an_interrupted_request_to_a_web_server_continues_where_it_was(ranges_known: bool, tmp_path: Path) -> None:
    """Without ranges, the server begins anew and what is known already is skipped."""
    (tmp_path / "shard.tar").write_bytes(CONTENT)
    with WebServer(tmp_path, ranges=ranges_known) as web, FaultProxy(int(web.url.rpartition(":")[2])) as proxy:
        proxy.faults = [Fault("truncate", times=1, after=2_800_000)]
        assert download(requested(f"{proxy.url}/shard.tar", CONTENT), tmp_path / "part")
        (first, second) = ranges(proxy)
    assert (tmp_path / "part").read_bytes() == CONTENT
    assert first == (0, len(CONTENT) - 1)
    assert BUFFER <= second[0] <= 2_800_000


@pytest.mark.parametrize(
    "fault",
    [
        Fault("status", times=5), Fault("reset", share=0.3, times=5, after=300_000),
        Fault("status", share=0.5, times=4, status=500, code="InternalError"),
    ],
    ids=["a burst of 503", "reset in the middle", "every second fails"],
)  # fmt: skip
def test_a_range_that_fails_is_requested_again_by_itself(
    fault: Fault, proxy: FaultProxy, shard: RequestedShard, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_ranges_of(MIB, monkeypatch)
    proxy.faults = [fault]
    assert download(shard, tmp_path / "part")
    assert (tmp_path / "part").read_bytes() == CONTENT
    assert fault.fired == fault.times or fault.share == 0.3
    assert len(proxy.requests) == 8 + fault.fired


def test_a_flipped_bit_in_a_range_is_found(
    proxy: FaultProxy, shard: RequestedShard, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_ranges_of(MIB, monkeypatch)
    proxy.faults = [Fault("flip", times=1, after=1000)]
    assert not download(shard, tmp_path / "part")
    assert download(shard, tmp_path / "part")


def test_a_refused_range_ends_the_download_at_once(
    proxy: FaultProxy, shard: RequestedShard, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_ranges_of(MIB // 16, monkeypatch)
    proxy.faults = [Fault("status", times=1, status=403, code="AccessDenied")]
    with pytest.raises(StorageRefused, match=r"shard\.tar: access refused"):
        download(shard, tmp_path / "part")
    assert len(proxy.requests) < 113  # of which it has as many ranges


def replaced_after_the_first_range(writer: s3fs.S3FileSystem, content: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have `content` put in place of the shard once its first range has been received, once."""
    real, calls = byte_stream, list[int]()

    def stream(location: str, start: int, stop: int, storage: Storage, version: ObjectVersion) -> Iterator[memoryview]:
        yield from real(location, start, stop, storage, version)
        if not calls:
            calls.append(start)
            writer.pipe_file(OBJECT, content)

    monkeypatch.setattr("data.remote.shard_download.byte_stream", stream)


def test_a_shard_that_is_replaced_between_two_ranges_is_noticed(
    writer: s3fs.S3FileSystem, proxy: FaultProxy, shard: RequestedShard, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_ranges_of(MIB, monkeypatch, connections=1)
    replaced_after_the_first_range(writer, CONTENT[::-1], monkeypatch)
    with pytest.raises(ObjectReplaced):
        download(shard, tmp_path / "part")
    assert ranges(proxy) == [(0, MIB - 1), (MIB, 2 * MIB - 1)]


def test_a_shard_that_is_replaced_before_an_interrupted_request_continues_is_noticed(
    writer: s3fs.S3FileSystem, proxy: FaultProxy, shard: RequestedShard
) -> None:
    proxy.faults = [Fault("truncate", times=1, after=2_800_000)]
    views = byte_stream(shard.location, 0, shard.bytes, shard.storage)
    assert next(views) == CONTENT[:BUFFER]
    writer.pipe_file(OBJECT, CONTENT[::-1])
    with pytest.raises(ObjectReplaced):
        next(views)
    assert len(proxy.requests) == 2


def test_a_server_that_ignores_the_condition_is_found_by_the_tag_of_its_answer() -> None:
    version = ObjectVersion()
    assert version.condition() == {}
    version.check('"first"')
    version.check('"first"')
    version.check(None)  # a server without tags
    assert version.condition() == {"IfMatch": '"first"'}
    with pytest.raises(ObjectReplaced):
        version.check('"second"')


def test_a_shard_that_is_put_in_place_while_an_older_one_is_downloaded_is_downloaded_again(
    writer: s3fs.S3FileSystem, proxy: FaultProxy, shard: RequestedShard, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    in_ranges_of(MIB, monkeypatch, connections=1)
    monkeypatch.setattr(CachedShards, "_ensure_downloader", lambda self: None)
    writer.pipe_file(OBJECT, CONTENT[::-1])
    replaced_after_the_first_range(writer, CONTENT, monkeypatch)
    entry = ShardEntry("shard.tar", 10, shard.bytes, shard.sha256)
    index = ShardIndex("s3://test/downloads", ("a",), ("jpg",), LabelFormat(), (entry,))
    with downloading(tmp_path) as cache:
        reader = CachedShards(cache, Dataset(index, shard.storage))
        reader.request([0], [])
        assert reader.path(0).read_bytes() == CONTENT
        reader.close()
    assert "shard.tar: it was replaced meanwhile, attempt 1" in caplog.text
    assert len(proxy.requests) == 2 + 8


def test_an_object_that_is_shorter_than_its_index_says_is_never_taken_for_whole(
    writer: s3fs.S3FileSystem, proxy: FaultProxy
) -> None:
    writer.pipe_file("test/downloads/short.tar", b"x" * 1000)
    storage = Storage(endpoint=proxy.url, give_up_after=0.1, greatest_delay=0.01)
    with pytest.raises(StorageDown, match=r"1,000 of 2,000 bytes received"):
        list(byte_stream("s3://test/downloads/short.tar", 0, 2000, storage))


def test_an_s3_server_that_begins_anew_is_not_taken_for_one_that_continues(
    tmp_path: Path,
) -> None:
    (tmp_path / "bucket").mkdir()
    (tmp_path / "bucket/shard.tar").write_bytes(b"x" * 1000)
    with WebServer(tmp_path, ranges=False) as web:
        storage = Storage(endpoint=web.url, anonymous=True, give_up_after=0.1, greatest_delay=0.01)
        assert b"".join(byte_stream("s3://bucket/shard.tar", 0, 1000, storage)) == b"x" * 1000
        with pytest.raises(StorageDown, match="asked for the bytes from 500, and received the file from its beginning"):
            list(byte_stream("s3://bucket/shard.tar", 500, 1000, storage))


@pytest.mark.parametrize(("size", "most"), [(64 * MIB, 6 * MIB), (4 * MIB, 20 * MIB)], ids=["whole", "ranges"])
def test_memory_is_that_of_the_buffers(
    size: int, most: int, s3: S3Server, writer: s3fs.S3FileSystem, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_ranges_of(size, monkeypatch)
    content = CONTENT[: 4 * MIB] * 10
    writer.pipe_file("test/downloads/large.tar", content)
    shard = requested("s3://test/downloads/large.tar", content)
    assert download(replace(shard, bytes=10), tmp_path / "part") is False  # the client has been made
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        assert download(shard, tmp_path / "part")
        assert tracemalloc.get_traced_memory()[1] - before < most < len(content)
    finally:
        tracemalloc.stop()


def test_the_time_that_a_view_is_used_does_not_count_as_the_servers(
    shard: RequestedShard, monkeypatch: pytest.MonkeyPatch
) -> None:
    allowed, waited = [], []

    def watched(loop, work, seconds):  # type: ignore[no-untyped-def]
        allowed.append(seconds)
        waited.append(completed(loop, work, seconds))
        return waited[-1]

    monkeypatch.setattr(streams, "completed", watched)
    for _ in byte_stream(shard.location, 0, shard.bytes, shard.storage):
        pass
    sizes = [BUFFER, 2 * BUFFER, 3 * BUFFER, len(CONTENT)]
    expected = [transfer_seconds(20, size) - sum(waited[:number]) for number, size in enumerate(sizes)]
    assert allowed == pytest.approx(expected, abs=1e-9)


def test_other_storages_are_read_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    files = fsspec.filesystem("memory", skip_instance_cache=True)
    content = CONTENT * 3
    monkeypatch.setattr("data.remote.storage._filesystem", lambda *arguments: files)
    files.pipe_file(files._strip_protocol("sftp://host/shard.tar"), content)
    found = [bytes(view) for view in byte_stream("sftp://host/shard.tar", 5, len(content), Storage())]
    assert [len(piece) for piece in found] == [PIECE, len(content) - 5 - PIECE]
    assert b"".join(found) == content[5:]


def test_holes_of_ranges_that_have_not_arrived_do_not_count_as_space_on_the_disk(
    shard: RequestedShard, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Cache, "disk_room", lambda self, used: used)
    downloader = Downloader(tmp_path)
    part = tmp_path / "part"
    with open(part, "wb") as file:
        file.seek(100 * MIB)
        file.write(b"x" * MIB)
    downloader._running[shard.sha256] = _Download(shard, part, None)  # type: ignore[arg-type]
    assert MIB <= downloader._disk_room() < 2 * MIB
