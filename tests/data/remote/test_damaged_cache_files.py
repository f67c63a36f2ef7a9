"""Damaged files of the cache, and a working directory with modules named like ours."""

import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from data.dataset import Dataset
from data.errors import DataError
from data.files.file_lock import locked
from data.index import read_index
from data.remote.cache import Cache, CachedShards, CacheRequest, RequestedShard
from data.remote.downloader import Downloader
from data.remote.storage import Storage
from tests.support.paths import ROOT

DAMAGED: list[bytes] = [b"", b'{"reason": "no sp', b"[]", b'{"reason": 5, "storage_down": false}', b"\xff\xfe"]


@pytest.mark.parametrize("content", DAMAGED)
def test_a_damaged_failure_record_is_named(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes
) -> None:
    dataset, cache = Dataset(replace(read_index(shards / "train"), folder="s3://test")), Cache(tmp_path, 10**9)
    monkeypatch.setattr(CachedShards, "_ensure_downloader", lambda self: None)  # it would remove the record
    reader = CachedShards(cache, dataset)
    cache.failure_path(dataset.index.shards[0].sha256).write_bytes(content)
    message = r"failed/\w+: not the record of a failed download \(.+\); remove it and try again"
    with pytest.raises(DataError, match=message):
        reader.path(0)
    reader.close()


def torn(content: bytes) -> bytes:
    return content[: len(content) // 2]


def empty(content: bytes) -> bytes:
    return b""


def mistyped(content: bytes) -> bytes:
    return content.replace(b'"bytes": 3', b'"bytes": "3"')


def of_another_version(content: bytes) -> bytes:
    return content.replace(b'"version": 2', b'"version": 3')


def without_a_version(content: bytes) -> bytes:
    return content.replace(b'"version": 2, ', b"")


def negative(content: bytes) -> bytes:
    return content.replace(b'"downloads": 4', b'"downloads": -4')


def local(content: bytes) -> bytes:
    """A file that others may not read."""
    return content.replace(b"s3://test/", b"/home/someone/")


def a_path_for_a_hash(content: bytes) -> bytes:
    """The reason of the failure, which a stranger chooses, would be written there."""
    return content.replace(SHA256["damaged"].encode(), b"/home/someone/.bashrc")


SHA256 = {"damaged": "1" * 64, "whole": "2" * 64}


@pytest.mark.parametrize(
    "damage",
    [torn, empty, mistyped, of_another_version, without_a_version, negative, local, a_path_for_a_hash],
)
def test_the_downloader_skips_a_damaged_request_and_serves_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, damage: Callable[[bytes], bytes]
) -> None:
    def download(shard: RequestedShard, part: Path) -> bool:
        part.write_bytes(b"tar")
        return True

    monkeypatch.setattr("data.remote.downloader.download", download)
    Cache(tmp_path, 1).make()
    locks = []
    for name in ("damaged", "whole"):
        request = CacheRequest(2, (RequestedShard(f"s3://test/{name}.tar", 3, SHA256[name], Storage(), True),), 100, 4)
        content = json.dumps(asdict(request)).encode()
        (tmp_path / "requests" / f"{name}.json").write_bytes(damage(content) if name == "damaged" else content)
        locks.append(locked(tmp_path / "requests" / f"{name}.lock"))
    downloader = Downloader(tmp_path)
    with caplog.at_level(logging.WARNING):
        downloader.update()
        downloader.update()
    downloader._executor.shutdown(wait=True)
    assert [path.name for path in (tmp_path / "shards").iterdir()] == [f"{SHA256['whole']}.tar"]
    (record,) = caplog.records
    assert "requests/damaged.json: not a request for shards (" in record.message
    assert [path.name for path in (tmp_path / "requests").glob("*.refused")] == ["damaged.refused"]
    for lock in locks:
        lock.close()


READER = """
import sys
from dataclasses import replace
from pathlib import Path
from data.remote.cache import Cache, CachedShards
from data.dataset import Dataset
from data.index import read_index

index = replace(read_index(sys.argv[1]), folder="s3://test")
reader = CachedShards(Cache(Path(sys.argv[2]), 10**9), Dataset(index))
reader.request([0], [])
assert reader._downloader.own.poll() is None
reader.close()
"""


@pytest.mark.parametrize("options", [["-P", "-c"], ["-P", "-m"]])
def test_the_downloader_does_not_import_modules_of_the_working_directory(
    shards: Path, tmp_path: Path, options: list[str]
) -> None:
    """Once the reader runs by itself, and once as a module of another folder on its import path."""
    (tmp_path / "work" / "data").mkdir(parents=True)
    for name in ("data/__init__.py", "models.py", "json.py"):
        (tmp_path / "work" / name).write_text("raise RuntimeError('imported from the working directory')")
    (tmp_path / "scripts").mkdir()
    (tmp_path / "scripts" / "reader_script.py").write_text(READER)
    started = subprocess.run(
        [
            sys.executable,
            *options,
            READER if "-c" in options else "reader_script",
            shards / "train",
            tmp_path / "cache",
        ],
        cwd=tmp_path / "work",
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(tmp_path / "scripts")])},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert started.returncode == 0, started.stderr + (tmp_path / "cache" / "downloader.log").read_text()
