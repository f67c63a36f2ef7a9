"""Remote shards in a folder of this node that all its ranks share, filled by one process; see `downloader.py`.

    <folder>/shards/<sha256>.tar        complete shards, verified since the downloader was started
    <folder>/shards/<sha256>.earlier    those of earlier downloaders, verified again when they are requested
    <folder>/shards/<sha256>.<id>.part  being downloaded, by the downloader with this id
    <folder>/requests/<id>.json, .lock  what one reader needs, most urgent first; it holds the lock while it is alive
    <folder>/requests/<id>.refused      why the downloader cannot read that request
    <folder>/failed/<sha256>            why a download failed
    <folder>/downloader.lock            held by the one downloader, see `downloader_process.py`

Only their user can change the folders, see `private_folder.py`: others on the node would choose what is read, and what
is fetched in his name. The locks are the kernel's; see `file_lock.py`. Any of these files may vanish at any time, since
cleaners of temporary folders remove what they take for old: readers and the downloader make them again.
"""

import contextlib
import errno
import json
import os
import shutil
import tempfile
import threading
import time
import uuid
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final, Literal

from data.dataset import Dataset
from data.errors import DataError, StorageDown
from data.files.atomic_file import unfinished_path, write_atomically
from data.files.file_lock import check_locks, is_at, locked, try_lock
from data.files.json_records import check_at_least, check_sha256, parse_json
from data.files.regular_file import read_regular
from data.remote.downloader_process import DownloaderProcess
from data.remote.private_folder import check_private_files, make_private
from data.remote.storage import Storage, is_remote

_POLL_INTERVAL = 0.02  # seconds between checks for a shard
_CHECK_INTERVAL = 1.0  # seconds between checks that a downloader is running and sees the request
_FAILURE_HOLDS = 60.0  # seconds before a shard is needed in which a failed download of it still counts
_RESERVE = 2 * 10**9  # bytes, at most
_RESERVED_SHARE = 50  # and at most this part of the disk

_PATIENCE = 10.0  # seconds in which a full disk may get room for a request
DISK_FULL = {errno.ENOSPC, errno.EDQUOT}

_FOLDERS = ("shards", "requests", "failed")

REQUEST_VERSION: Final = 2


@dataclass(frozen=True, slots=True)
class Cache:
    """A folder on a disk of this node, its capacity in bytes of shards, and the number of concurrent downloads."""

    folder: Path
    bytes: int
    downloads: int = 4

    def make(self) -> None:
        """Create the folders.

        Raises:
            DataError: they cannot be created or written, others can write in them, or their file system has no locks.
        """
        try:
            self.make_folders()
            check_private_files(self.folder, _FOLDERS)
            for name in _FOLDERS:
                with tempfile.TemporaryFile(dir=self.folder / name):
                    pass  # it may be on a file system that is read-only
            check_locks(self.folder, "set data.cache.folder to a folder on a disk of this node")
        except OSError as error:
            raise DataError(
                f"{self.folder}: {error.strerror}; the cache of remote shards needs a folder on a disk of this "
                "node: set data.cache.folder"
            ) from error

    def make_folders(self) -> None:
        """Create those of the folders that do not exist.

        Raises:
            DataError: others can write in one.
            OSError: one cannot be created.
        """
        make_private(self.folder, _FOLDERS)

    def shard_path(self, sha256: str) -> Path:
        """Where the shard with this hash is stored once it is complete."""
        return self.folder / "shards" / f"{sha256}.tar"

    def earlier_path(self, sha256: str) -> Path:
        """Where it is stored until this downloader has verified it, if an earlier one has downloaded it."""
        return self.folder / "shards" / f"{sha256}.earlier"

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

    def disk_room(self, used: int) -> int:
        """Bytes that shards can take on the disk if they take `used` now: all but what is left to others."""
        disk = shutil.disk_usage(self.folder)
        return disk.free + used - min(_RESERVE, disk.total // _RESERVED_SHARE)

    def room_for_another_run(self) -> int:
        """Bytes of shards for which a run that starts now finds room: living readers keep what they want."""
        wanted = {shard.sha256: shard.bytes for request in self._living_requests() for shard in request.shards}
        return self.disk_room(self.used_bytes()) - sum(wanted.values())

    def _living_requests(self) -> Iterator["CacheRequest"]:
        for path in (self.folder / "requests").glob("*.json"):
            with contextlib.suppress(OSError, ValueError):
                lock = try_lock(path.with_suffix(".lock"), create=False)
                if lock is None:
                    yield parse_json(CacheRequest, read_regular(path))
                else:
                    lock.close()


@dataclass(frozen=True, slots=True)
class RequestedShard:
    """A remote shard that a reader needs."""

    location: str
    bytes: int
    sha256: str
    storage: Storage
    urgent: bool
    """Whether the reader needs it now rather than soon."""

    def __post_init__(self) -> None:
        if not is_remote(self.location):
            raise ValueError(f"location: {self.location!r} is not a URL")
        check_sha256(self.sha256)
        check_at_least(0, bytes=self.bytes)


@dataclass(frozen=True, slots=True)
class CacheRequest:
    """The shards that a reader needs, most urgent first, and the limits it was configured with."""

    version: Literal[2]
    """`REQUEST_VERSION`. It comes first, so that the request of another version is refused as that."""
    shards: tuple[RequestedShard, ...]
    bytes: int
    downloads: int

    def __post_init__(self) -> None:
        check_at_least(0, bytes=self.bytes, downloads=self.downloads)


@dataclass(frozen=True, slots=True)
class DownloadFailure:
    """Why a shard could not be downloaded."""

    reason: str
    storage_down: bool
    """Whether the storage did not answer, so that a later attempt may succeed."""
    urgent: bool
    """Whether a reader needed it at once."""
    time: float
    """When it failed, by the monotonic clock, which the processes of a node share."""


class CachedShards:
    """One reader's access to the cache: it requests shards and waits for them. Its threads may share it.

    Raises:
        DataError: the cache folder cannot be written.
    """

    def __init__(self, cache: Cache, dataset: Dataset) -> None:
        self._cache, self._dataset = cache, dataset
        cache.make()
        name = cache.folder / "requests" / uuid.uuid4().hex
        self._request_path = name.with_suffix(".json")
        self._lock_path = name.with_suffix(".lock")
        self._lock = locked(self._lock_path)
        self._requested: tuple[list[int], list[int]] = ([], [])
        self._awaited: Counter[int] = Counter()
        """Shards that threads wait for."""
        self._changing = threading.RLock()
        self._downloader = DownloaderProcess(cache.folder)
        self._served = False
        """Whether a downloader was seen, which has set aside the shards that it must verify."""
        self._stopped = threading.Event()

    def request(self, now: Sequence[int], ahead: Sequence[int]) -> None:
        """Have the shards `now` downloaded first, then `ahead`; none of them is evicted until the next request.

        Shards without samples in the dataset are never read, and left out.
        """
        samples = self._dataset.shard_samples
        requested = ([n for n in now if samples[n]], [n for n in ahead if samples[n]])
        with self._changing:
            if requested == self._requested:
                return
            self._requested = requested
            self._publish()
        if self._downloader.own is None:
            self._ensure_downloader()

    def path(self, number: int) -> Path:
        """The file of shard `number`, once it is there. Open it at once: an open file survives eviction.

        If it is evicted before it is open, ask again.

        Raises:
            DataError: it cannot be downloaded.
            StorageDown: the storage has not answered for too long.
        """
        sha256 = self._dataset.index.shards[number].sha256
        path = self._cache.shard_path(sha256)
        if not self._served:
            self._ensure_downloader()
        if _touch(path):
            return path
        began = next_check = time.monotonic()
        with self._awaiting(number):
            while not _touch(path):
                self._raise_failure(self._cache.failure_path(sha256), began)
                if time.monotonic() >= next_check:
                    self._raise_refusal()
                    self._restore()
                    self._ensure_downloader()
                    next_check = time.monotonic() + _CHECK_INTERVAL
                if self._stopped.wait(_POLL_INTERVAL):
                    raise StorageDown(
                        f"shard {self._dataset.index.location(number)}: not downloaded before reading was stopped"
                    )
        return path

    def stop(self) -> None:
        """End every wait in `path` with an error."""
        self._stopped.set()

    def close(self) -> None:
        """Withdraw the request and stop the downloader if this reader started it."""
        for path in request_files(self._request_path):
            path.unlink(missing_ok=True)
        self._lock.close()
        self._downloader.end()

    @contextmanager
    def _awaiting(self, number: int) -> Iterator[None]:
        """Request shard `number` as urgent, whatever else is requested meanwhile."""
        with self._changing:
            self._awaited[number] += 1
            if number not in self._requested[0] and self._awaited[number] == 1:
                self._publish()
        try:
            yield
        finally:
            with self._changing:
                self._awaited[number] -= 1
                self._awaited += Counter()  # without those that nobody waits for any more

    def _publish(self) -> None:
        """Write the request. Needs `_changing`."""
        now, ahead = self._requested
        urgent = dict.fromkeys([*self._awaited, *now])
        shards = [self._requested_shard(number, urgent=True) for number in urgent]
        shards += [self._requested_shard(number, urgent=False) for number in ahead if number not in urgent]
        content = json.dumps(
            asdict(CacheRequest(REQUEST_VERSION, tuple(shards), self._cache.bytes, self._cache.downloads))
        )
        deadline = time.monotonic() + _PATIENCE
        while True:
            try:
                if not is_at(self._lock_path, self._lock):
                    self._lock.close()
                    self._lock = locked(self._lock_path)
                write_atomically(self._request_path, content)
                return
            except FileNotFoundError:
                self._cache.make()
            except OSError as error:
                # Without the old request there is space for the new one, and the downloader evicts what was in it.
                if error.errno not in DISK_FULL or time.monotonic() > deadline:
                    raise DataError(
                        f"{self._cache.folder}: a request for shards cannot be written ({error.strerror}); set "
                        "data.cache.folder to a folder on another disk"
                    ) from error
                self._request_path.unlink(missing_ok=True)
                time.sleep(_POLL_INTERVAL)

    def _restore(self) -> None:
        """Write the request again if it or its lock was removed."""
        with self._changing:
            if not (self._request_path.exists() and is_at(self._lock_path, self._lock)):
                self._publish()

    def _requested_shard(self, number: int, *, urgent: bool) -> RequestedShard:
        index = self._dataset.index
        entry = index.shards[number]
        return RequestedShard(index.location(number), entry.bytes, entry.sha256, self._dataset.storage, urgent)

    def _raise_failure(self, path: Path, needed_since: float) -> None:
        """Raise the error of a failed download; one of a prefetch, or of long ago, is removed and so tried again."""
        try:
            failure = parse_json(DownloadFailure, read_regular(path))
        except FileNotFoundError:
            return
        except ValueError as error:
            raise DataError(f"{path}: not the record of a failed download ({error}); remove it and try again") from None
        if not failure.urgent or failure.time < needed_since - _FAILURE_HOLDS:
            path.unlink(missing_ok=True)
            return
        raise StorageDown(failure.reason) if failure.storage_down else DataError(failure.reason)

    def _raise_refusal(self) -> None:
        """Raise an error if the downloader cannot read the request: it would be waited for without end."""
        try:
            reason = refusal_path(self._request_path).read_text(errors="replace")
        except FileNotFoundError:
            return
        raise StorageDown(
            f"{self._cache.folder}: the downloader of this node, which another run has started, does not understand "
            f"the request of this one ({reason}); they are of different versions: wait until that run has ended, or "
            "set data.cache.folder to another folder"
        )

    def _ensure_downloader(self) -> None:
        """Start a downloader unless one is running.

        Raises:
            StorageDown: one after the other has died.
        """
        try:
            self._served = self._downloader.ensure()
        except FileNotFoundError:
            self._cache.make()
            self._served = self._downloader.ensure()


def refusal_path(request: Path) -> Path:
    """Where the downloader writes why it cannot read the request in the file `request`."""
    return request.with_suffix(".refused")


def request_files(request: Path) -> tuple[Path, ...]:
    """All files of a reader, the lock last."""
    return request, unfinished_path(request), refusal_path(request), request.with_suffix(".lock")


def _touch(path: Path) -> bool:
    """Set the time of last use of a file, by which eviction goes; False if there is no such file."""
    try:
        os.utime(path)
    except FileNotFoundError:
        return False
    return True
