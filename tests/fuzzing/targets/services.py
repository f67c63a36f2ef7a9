"""What other processes of a node, Slurm's commands and web servers answer."""

import os
import random
import socket
import threading
from dataclasses import asdict
from pathlib import Path

from data.errors import CoatnetError
from data.files.json_records import parse_json
from data.remote.cache import Cache, CacheRequest, DownloadFailure, RequestedShard
from data.remote.downloader import Downloader
from data.remote.storage import Storage, is_remote, list_files, list_folders, read_bytes
from jobs.scheduler.job_log import job_outcome
from jobs.scheduler.slurm import _accounting, _combined, _queue, clock
from tests.fuzzing.campaign import Fuzz, SilentAcceptance, Target
from tests.fuzzing.mutation import damaged_bytes, damaged_json

_LOG = (
    "2026-01-02 03:04:05 job 17: start 1 on n[1-2], 4 nodes\nerror: no such file; give another one\n"
    "2026-01-02 03:04:06 job 17: requeued: stopped by SIGTERM\n2026-01-02 03:04:07 job 17_3: failed: rank 1 failed\n  more\n"
    "2026-01-02 03:04:07 job 17: ended as CANCELLED by 7: scancel\n2026-01-02 03:04:09 job 17: done\n"
)
_ANSWERS = {
    "squeue": "17|RUNNING|2|n[1-2]|2026-01-02T03:04:05|1760000000|None\n18_[0-3]|PENDING|1||N/A|N/A|Resources\n",
    "sacct": "17|COMPLETED|n1|None\n18|CANCELLED by 7|None assigned|None\n",
    "sdiag": "*******\nsdiag output at Fri Jan  2 03:04:05 2026 (1760000000)\nData since\n",
}
_PAGE = '<html><a href="a.tar">a</a> <a href="b/">b</a> <a href="?C=N">n</a> <a href="http://elsewhere/x">x</a></html>'


def _cache_request(folder: Path) -> Fuzz:
    """The request of a reader, as the downloader of the node reads it."""
    shard = RequestedShard("s3://bucket/a.tar", 512, "0" * 64, Storage(), True)
    seed = asdict(CacheRequest(2, (shard,), 10**9, 4))

    def read(content: bytes) -> None:
        for one in parse_json(CacheRequest, content).shards:
            name = Cache(folder, 0).shard_path(one.sha256)
            if not is_remote(one.location) or one.bytes < 0 or name.parent != folder / "shards":
                raise SilentAcceptance("a request for something else than a shard")

    return Fuzz(lambda rng: damaged_json(rng, seed), read, (ValueError,))


def _downloader(folder: Path) -> Fuzz:
    """The same through a downloader without anything to download."""
    seed = asdict(CacheRequest(2, (), 10**9, 4))
    downloader = Downloader(folder)
    path = folder / "requests" / "r.json"

    def read(content: bytes) -> None:
        path.unlink(missing_ok=True)
        path.write_bytes(content)
        downloader._request(path)

    return Fuzz(lambda rng: damaged_json(rng, seed), read)


def _download_failure(folder: Path) -> Fuzz:
    seed = asdict(DownloadFailure("no answer", True, True, 7.5))
    return Fuzz(
        lambda rng: damaged_json(rng, seed), lambda content: parse_json(DownloadFailure, content), (ValueError,)
    )


def _slurm(folder: Path) -> Fuzz:
    """Programs that print what is in a file, in place of Slurm's."""
    for name in _ANSWERS:
        program = folder / name
        program.write_text(f'#!/bin/sh\nexec cat "{folder}/{name}.out"\n')
        program.chmod(0o755)
    os.environ["PATH"] = f"{folder}:{os.environ['PATH']}"

    def mutate(rng: random.Random) -> bytes:
        name = rng.choice(list(_ANSWERS))
        return name.encode() + b"\0" + damaged_bytes(rng, _ANSWERS[name].encode())

    def read(content: bytes) -> None:
        name, _, answer = content.partition(b"\0")
        (folder / f"{name.decode()}.out").write_bytes(answer)
        if name == b"sdiag":
            clock()
        else:
            _combined(["17", "18"], (_queue if name == b"squeue" else _accounting)(["17", "18"]))

    return Fuzz(mutate, read)


def _job_log(folder: Path) -> Fuzz:
    path = folder / "pretrain.log"

    def read(content: bytes) -> None:
        path.write_bytes(content)
        job_outcome([path], "17")

    return Fuzz(lambda rng: damaged_bytes(rng, _LOG.encode()), read)


class _Server:
    """Answers every request with the same bytes."""

    def __init__(self) -> None:
        self.answer = b""
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listening.getsockname()[1]}"
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            connection, _ = self._listening.accept()
            with connection:
                connection.settimeout(1)
                try:
                    connection.recv(2**16)
                    connection.sendall(self.answer)
                except OSError:
                    continue


def _web_server(folder: Path) -> Fuzz:
    server = _Server()
    storage = Storage(give_up_after=0.0, greatest_delay=0.0, read_timeout=0.5)

    def mutate(rng: random.Random) -> bytes:
        body = (damaged_bytes(rng, _PAGE.encode()) if rng.randrange(2) else _PAGE.encode())[:20_000]
        length = rng.choice(
            (str(len(body)), str(len(body)), "0", "-1", "99999999999999999999", "1e3", "x", "9" * 5000, "²")
        )
        head = f"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nConnection: close\r\nContent-Length: {length}\r\n"
        if rng.randrange(3) == 0:
            value = rng.choice(("bytes 0-0/9", "bytes */99", f"bytes 0-0/{'9' * 5000}", "bytes 0-0/-1", "bytes"))
            head = head.replace("200 OK", "206 Partial") + f"Content-Range: {value}\r\n"
        answer = head.encode() + b"\r\n" + body
        return damaged_bytes(rng, answer) if rng.randrange(3) == 0 else answer

    def read(content: bytes) -> None:
        server.answer = content
        for ask in (
            lambda: list_files(server.url, storage),
            lambda: list_folders(server.url, storage),
            lambda: read_bytes(f"{server.url}/a", storage, 0, 4),
        ):
            try:
                found = ask()
            except (CoatnetError, FileNotFoundError):
                continue
            if isinstance(found, dict) and any(size < 0 for size in found.values()):
                raise SilentAcceptance("a file of less than no bytes")

    return Fuzz(mutate, read)


TARGETS = [
    Target("cache-request", _cache_request),
    Target("downloader", _downloader),
    Target("download-failure", _download_failure),
    Target("slurm", _slurm),
    Target("job-log", _job_log),
    Target("web-server", _web_server),
]
