"""Remote shards in a folder of this node that all its ranks share, filled by one process; see `downloader.py`.

    <folder>/shards/<sha256>.tar        complete, verified shards
    <folder>/shards/<sha256>.part       being downloaded
    <folder>/requests/<id>.json, .lock  what one reader needs, most urgent first; it holds the lock while it is alive
    <folder>/failed/<sha256>            why a download failed
    <folder>/downloader.lock            held by the one downloader

The locks are the kernel's: they are released when their process ends, however it ends.
"""

import contextlib
import fcntl
import json
import os
import signal
import subprocess
import tempfile
import threading
import time
import uuid
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import BinaryIO

from data.atomic_file import unfinished_path, write_atomically
from data.child_process import own_packages_first, python_module
from data.dataset import Dataset
from data.errors import DataError, StorageDown
from data.json_records import parse_json
from data.storage import Storage

_POLL_INTERVAL = 0.02  # seconds between checks for a shard
_DOWNLOADER_CHECK_INTERVAL = 1.0  # seconds between checks that a downloader is running

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
"""What Slurm sends to every process of a job that must stop. Readers act on it; the downloader ends with its reader."""


@dataclass(frozen=True, slots=True)
class Cache:
    """A folder on a disk of this node, its capacity in bytes of shards, and the number of concurrent downloads."""

    folder: Path
    bytes: int
    downloads: int = 4

    def make(self) -> None:
        """Create the folders.

        Raises:
            DataError: they cannot be created or written.
        """
        try:
            for name in ("shards", "requests", "failed"):
                (self.folder / name).mkdir(parents=True, exist_ok=True)
                with tempfile.TemporaryFile(dir=self.folder / name):
                    pass  # a folder of another user exists but cannot be written
        except OSError as error:
            raise DataError(
                f"{self.folder}: {error.strerror}; the cache of remote shards needs a folder on a disk of this "
                "node: set data.cache.folder"
            ) from error

    def shard_path(self, sha256: str) -> Path:
        """Where the shard with this hash is stored once it is complete."""
        return self.folder / "shards" / f"{sha256}.tar"

    def failure_path(self, sha256: str) -> Path:
        """Where a `DownloadFailure` of the shard with this hash is stored."""
        return self.folder / "failed" / sha256

    def used_bytes(self) -> int:
        """Bytes of all shards in the cache, partial downloads included."""
        total = 0
        for path in (self.folder / "shards").iterdir():
            with contextlib.suppress(FileNotFoundError):  # evicted or renamed in the meantime
                total += path.stat().st_size
        return total


@dataclass(frozen=True, slots=True)
class RequestedShard:
    """A remote shard that a reader needs."""

    location: str
    bytes: int
    sha256: str
    storage: Storage
    urgent: bool
    """Whether the reader needs it now rather than soon."""


@dataclass(frozen=True, slots=True)
class CacheRequest:
    """The shards that a reader needs, most urgent first, and the limits it was configured with."""

    shards: tuple[RequestedShard, ...]
    bytes: int
    downloads: int


@dataclass(frozen=True, slots=True)
class DownloadFailure:
    """Why a shard could not be downloaded."""

    reason: str
    storage_down: bool
    """Whether the storage did not answer, so that a later attempt may succeed."""


class CachedShards:
    """One reader's access to the cache: it requests shards and waits for them.

    Raises:
        DataError: the cache folder cannot be written.
    """

    def __init__(self, cache: Cache, dataset: Dataset) -> None:
        self._cache, self._dataset = cache, dataset
        cache.make()
        name = cache.folder / "requests" / uuid.uuid4().hex
        self._request_path = name.with_suffix(".json")
        self._lock = locked(name.with_suffix(".lock"))
        self._requested: tuple[list[int], list[int]] | None = None
        self._downloader: subprocess.Popen[bytes] | None = None
        self._stopped = threading.Event()

    def request(self, now: Sequence[int], ahead: Sequence[int]) -> None:
        """Have the shards `now` downloaded first, then `ahead`; none of them is evicted until the next request."""
        requested = (list(now), list(ahead))
        if requested == self._requested:
            return
        self._requested = requested
        shards = [self._requested_shard(number, urgent=True) for number in now]
        shards += [self._requested_shard(number, urgent=False) for number in ahead]
        request = CacheRequest(tuple(shards), self._cache.bytes, self._cache.downloads)
        write_atomically(self._request_path, json.dumps(asdict(request)))
        if self._downloader is None:
            self._ensure_downloader()

    def path(self, number: int) -> Path:
        """The file of shard `number`, once it is there. Open it at once: an open file survives eviction.

        Raises:
            DataError: it cannot be downloaded.
            StorageDown: the storage has not answered for too long.
        """
        sha256 = self._dataset.index.shards[number].sha256
        path = self._cache.shard_path(sha256)
        next_check = time.monotonic()
        while True:
            with contextlib.suppress(FileNotFoundError):
                os.utime(path)  # eviction goes by the time of last use
                return path
            self._raise_failure(self._cache.failure_path(sha256))
            if time.monotonic() >= next_check:
                self._ensure_downloader()
                next_check = time.monotonic() + _DOWNLOADER_CHECK_INTERVAL
            if self._stopped.wait(_POLL_INTERVAL):
                raise StorageDown(
                    f"shard {self._dataset.index.location(number)}: not downloaded before reading was stopped"
                )

    def stop(self) -> None:
        """End every wait in `path` with an error."""
        self._stopped.set()

    def close(self) -> None:
        """Withdraw the request and stop the downloader if this reader started it."""
        for path in (self._request_path, unfinished_path(self._request_path), self._request_path.with_suffix(".lock")):
            path.unlink(missing_ok=True)
        self._lock.close()
        if self._downloader is not None and self._downloader.stdin is not None:
            # The end of its input ends the downloader; another reader starts the next one.
            self._downloader.stdin.close()
            self._downloader.wait()

    def _requested_shard(self, number: int, *, urgent: bool) -> RequestedShard:
        index = self._dataset.index
        entry = index.shards[number]
        return RequestedShard(index.location(number), entry.bytes, entry.sha256, self._dataset.storage, urgent)

    def _raise_failure(self, path: Path) -> None:
        try:
            failure = parse_json(DownloadFailure, path.read_bytes())
        except FileNotFoundError:
            return
        except ValueError as error:
            raise DataError(f"{path}: not the record of a failed download ({error}); remove it and try again") from None
        raise StorageDown(failure.reason) if failure.storage_down else DataError(failure.reason)

    def _ensure_downloader(self) -> None:
        """Start a downloader unless one is running; readers that find none at the same time start only one."""
        with locked(self._cache.folder / "start.lock"):
            probe = try_lock(self._cache.folder / "downloader.lock")
            if probe is None:
                return
            probe.close()
            if self._downloader is not None:
                self._downloader.communicate()
            # It inherits this thread's blocked signals and unblocks them once it ignores them.
            previous_mask = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
            try:
                with open(self._cache.folder / "downloader.log", "ab") as log:
                    self._downloader = subprocess.Popen(
                        python_module("data.downloader", str(self._cache.folder)),
                        stdin=subprocess.PIPE,
                        stdout=subprocess.PIPE,
                        stderr=log,
                        env=os.environ | own_packages_first(),
                        start_new_session=True,  # Ctrl-C is for the readers
                    )
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, previous_mask)
            assert self._downloader.stdout is not None
            if not self._downloader.stdout.readline() and self._downloader.wait():
                raise DataError(f"the downloader of remote shards does not start; see {log.name}")


def locked(path: Path) -> BinaryIO:
    """The file at `path`, created if necessary, locked against all other processes until it is closed."""
    file = open(path, "ab")  # noqa: SIM115 (the caller closes it)
    fcntl.flock(file, fcntl.LOCK_EX)
    return file


def try_lock(path: Path) -> BinaryIO | None:
    """As `locked`, or None at once if another process holds the lock."""
    file = open(path, "ab")  # noqa: SIM115 (the caller closes it)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        return None
    return file
