"""Remote shards in a folder of this node that all its ranks share, filled by one process; see `downloader.py`.

    <folder>/shards/<sha256>.tar      whole shards, checked; a name that is there is whole
    <folder>/shards/<sha256>.part     being fetched
    <folder>/requests/<id>.json, .lock  what one reader wants, in the order of its need; it holds the lock while alive
    <folder>/failed/<sha256>          why a shard cannot be had
    <folder>/downloader.lock          held by the one downloader

Locks are those of the kernel, which go with the process however it ends.
"""

import contextlib
import fcntl
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import BinaryIO

from data.atomic_file import unfinished_path, write_atomically
from data.dataset import Dataset
from data.errors import DataError, StorageDown

_POLL = 0.02  # seconds between looks for a shard
_LOOK_AFTER = 1.0  # seconds between looks whether there is a downloader

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
"""What Slurm sends to all processes of a job that is to stop. It is for readers: the downloader ends with its own."""


@dataclass(frozen=True, slots=True)
class Cache:
    """A folder on a disk of this node, the bytes of shards it may hold, and how many are fetched at a time."""

    folder: Path
    bytes: int
    downloads: int = 4

    def make(self) -> None:
        """Make the folders.

        Raises:
            DataError: they cannot be made.
        """
        try:
            for name in ("shards", "requests", "failed"):
                (self.folder / name).mkdir(parents=True, exist_ok=True)
                with tempfile.TemporaryFile(dir=self.folder / name):
                    pass  # another user's folder shows itself only now
        except OSError as error:
            raise DataError(
                f"{self.folder}: {error.strerror}; the cache of remote shards needs a folder on a disk of this "
                "node: set data.cache.folder"
            ) from error

    def shard(self, sha256: str) -> Path:
        """Where the shard with this hash lies when it is there."""
        return self.folder / "shards" / f"{sha256}.tar"

    def held(self) -> int:
        """Bytes of all shards in it, and of those that are on their way."""
        total = 0
        for path in (self.folder / "shards").iterdir():
            with contextlib.suppress(FileNotFoundError):  # evicted or renamed a moment ago
                total += path.stat().st_size
        return total

    def failure(self, sha256: str) -> Path:
        """Where the reason lies when it cannot be had."""
        return self.folder / "failed" / sha256


class CachedShards:
    """One reader's view of the cache: says what it wants, and waits for it.

    Raises:
        DataError: a cache folder that cannot be written.
    """

    def __init__(self, cache: Cache, dataset: Dataset) -> None:
        self._cache, self._dataset = cache, dataset
        cache.make()
        name = cache.folder / "requests" / uuid.uuid4().hex
        self._request = name.with_suffix(".json")
        self._lock = locked(name.with_suffix(".lock"))
        self._wanted: tuple[list[int], list[int]] | None = None
        self._downloader: subprocess.Popen[bytes] | None = None
        self._stopped = threading.Event()

    def want(self, now: Sequence[int], ahead: Sequence[int]) -> None:
        """Have the shards `now` fetched first and `ahead` after them; none of them is evicted until the next call."""
        wanted = (list(now), list(ahead))
        if wanted == self._wanted:
            return
        self._wanted = wanted
        index = self._dataset.index
        text = json.dumps(
            {
                "storage": asdict(self._dataset.storage),
                "bytes": self._cache.bytes,
                "downloads": self._cache.downloads,
                "now": len(wanted[0]),
                "shards": [
                    {
                        "location": index.location(n),
                        "bytes": index.shards[n].bytes,
                        "sha256": index.shards[n].sha256,
                    }
                    for n in wanted[0] + wanted[1]
                ],
            }
        )
        write_atomically(self._request, text)
        if self._downloader is None:
            self._see_to_a_downloader()

    def path(self, number: int) -> Path:
        """The file of shard `number`, waited for. The caller opens it at once, and an open file outlives eviction.

        Raises:
            DataError: it cannot be had.
            StorageDown: the storage has not answered for long.
        """
        entry = self._dataset.index.shards[number]
        path, failure = self._cache.shard(entry.sha256), self._cache.failure(entry.sha256)
        look = time.monotonic()
        while True:
            try:
                os.utime(path)  # the order of eviction
                return path
            except FileNotFoundError:
                pass
            if failure.exists():
                failed = json.loads(failure.read_text())
                raise StorageDown(failed["reason"]) if failed["down"] else DataError(failed["reason"])
            if time.monotonic() >= look:
                self._see_to_a_downloader()
                look = time.monotonic() + _LOOK_AFTER
            if self._stopped.wait(_POLL):
                raise StorageDown(f"shard {self._dataset.index.location(number)} came too late: reading was stopped")

    def stop(self) -> None:
        """End all waiting in `path`."""
        self._stopped.set()

    def close(self) -> None:
        """Want nothing more."""
        for path in (self._request, unfinished_path(self._request), self._request.with_suffix(".lock")):
            path.unlink(missing_ok=True)
        self._lock.close()
        if self._downloader is not None and self._downloader.stdin is not None:
            # The end of its input ends the downloader; other readers start another.
            self._downloader.stdin.close()
            self._downloader.wait()

    def _see_to_a_downloader(self) -> None:
        """Start a downloader unless there is one; readers that see none at the same time start one together."""
        with locked(self._cache.folder / "start.lock"):
            probe = try_lock(self._cache.folder / "downloader.lock")
            if probe is None:
                return
            probe.close()
            if self._downloader is not None:
                self._downloader.communicate()
            # It begins with these held back, as this thread has them, until it comes to ignore them.
            held_back = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
            try:
                with open(self._cache.folder / "downloader.log", "ab") as log:
                    self._downloader = subprocess.Popen(
                        [sys.executable, "-m", "data.downloader", str(self._cache.folder)],
                        stdin=subprocess.PIPE,
                        stdout=subprocess.PIPE,
                        stderr=log,
                        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
                        start_new_session=True,  # an interrupt from the keyboard is for those who read
                    )
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, held_back)
            assert self._downloader.stdout is not None
            if not self._downloader.stdout.readline() and self._downloader.wait():
                raise DataError(f"the downloader of remote shards does not start; see {log.name}")


def locked(path: Path) -> BinaryIO:
    """The file at `path`, made if need be, locked against all other processes until it is closed."""
    file = open(path, "ab")  # noqa: SIM115 (the caller closes it)
    fcntl.flock(file, fcntl.LOCK_EX)
    return file


def try_lock(path: Path) -> BinaryIO | None:
    """The same, or None at once where another process has the lock."""
    file = open(path, "ab")  # noqa: SIM115 (the caller closes it)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        return None
    return file
