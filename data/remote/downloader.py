"""The one process of a node that downloads remote shards into its cache: `python -m data.remote.downloader FOLDER`.

It serves the requests of all living readers, urgent shards first. It ends with the reader that started it; any other
reader starts the next one. The least recently used shards that no living reader requests are evicted; if the disk is
full, prefetched ones make room for urgent ones, too.
"""

import hashlib
import json
import logging
import os
import signal
import sys
import threading
import time
import uuid
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict
from itertools import zip_longest
from pathlib import Path
from typing import BinaryIO, NamedTuple

from data.errors import DataError, StorageDown, may_pass
from data.files.atomic_file import write_atomically
from data.files.file_lock import is_at, try_lock
from data.files.json_records import parse_json
from data.files.regular_file import read_regular
from data.remote.byte_stream import ObjectReplaced
from data.remote.cache import (
    DISK_FULL,
    REQUEST_VERSION,
    Cache,
    CacheRequest,
    DownloadFailure,
    RequestedShard,
    refusal_path,
    request_files,
)
from data.remote.downloader_process import STOP_SIGNALS, start_record
from data.remote.held_shards import HeldShards
from data.remote.shard_download import download
from data.remote.web_address import without_secrets
from data.text.printable import PrintableFormatter

log = logging.getLogger(__name__)

_POLL_INTERVAL = 0.05  # seconds between looks at the requests
_CHECK_INTERVAL = 1.0  # seconds after which everything is looked at, even if no request has changed
_BLOCK = 512  # bytes, by which `stat` counts those of a file
_LOCK_ATTEMPTS = 20  # readers that look for a downloader hold its lock for an instant


class _Download(NamedTuple):
    shard: RequestedShard
    part: Path
    done: Future[bool]
    """True if the shard was downloaded or its failure recorded, False if there was no space for it."""


class _Request(NamedTuple):
    file: tuple[int, int]
    """Inode and modification time of the file; it is replaced when the request changes."""
    content: CacheRequest | None
    """None if it is damaged."""


class Downloader:
    """Downloads requested shards into the cache in `folder`."""

    def __init__(self, folder: Path) -> None:
        self._cache = Cache(folder, 0)
        self._shards = folder / "shards"
        self._id = uuid.uuid4().hex
        self._running: dict[str, _Download] = {}  # by sha256
        self._executor = ThreadPoolExecutor(64, thread_name_prefix="download")
        self._requests: dict[Path, _Request] = {}
        self._merged = CacheRequest(REQUEST_VERSION, (), 0, 0)
        self._next_check = 0.0
        self._one_at_a_time = False
        """Whether the disk was full, so that concurrent downloads would take each other's space."""
        self._cache.make_folders()
        for left_behind in [*self._shards.glob("*.part"), *(folder / "failed").iterdir()]:
            left_behind.unlink(missing_ok=True)
        for lock in (folder / "requests").glob("*.lock"):
            if not lock.with_suffix(".json").exists():
                self._remove_if_dead(lock)
        self._held = HeldShards(self._shards)

    def update(self) -> None:
        """Process the requests once: collect finished downloads, evict, start the next downloads."""
        finished = self._collect()
        changed = self._read_requests()
        if not finished and not changed and time.monotonic() < self._next_check:
            return
        self._next_check = time.monotonic() + _CHECK_INTERVAL
        self._cache.make_folders()
        request = self._merged
        requested = {shard.sha256 for shard in request.shards}
        failed = set()
        for failure in (self._cache.folder / "failed").glob("[!.]*"):  # not those that are being written
            failed.add(failure.name)
            if failure.name not in requested:
                failure.unlink(missing_ok=True)
        for shard in request.shards:
            self._held.check(shard.sha256, shard.bytes)
        if request.shards:  # others may have filled the disk
            self._evict_to(min(request.bytes, self._disk_room()), 0, requested)
        for shard in request.shards:
            if len(self._running) >= request.downloads or (self._one_at_a_time and self._running):
                break
            if shard.sha256 in self._held or shard.sha256 in self._running or shard.sha256 in failed:
                continue
            if not self._held.is_earlier(shard.sha256) and not self._make_room(shard, request, requested):
                break
            part = self._shards / f"{shard.sha256}.{self._id}.part"
            self._running[shard.sha256] = _Download(shard, part, self._executor.submit(self._download, shard, part))

    def _collect(self) -> bool:
        """Take note of downloads that have ended; returns whether there were any."""
        ended = [download for download in self._running.values() if download.done.done()]
        for shard, _, done in ended:
            del self._running[shard.sha256]
            if done.result():
                self._held.check(shard.sha256, shard.bytes)
                self._one_at_a_time = self._one_at_a_time and shard.sha256 not in self._held
            else:
                self._one_at_a_time = True
                self._free_space_for(shard)
        return bool(ended)

    def _make_room(self, shard: RequestedShard, request: CacheRequest, requested: set[str]) -> bool:
        """Evict what must make room for `shard`; returns whether it may be downloaded now."""
        room = self._disk_room()
        if self._evict_to(min(request.bytes, room), shard.bytes, requested):
            return True
        if not shard.urgent:
            return False
        # Urgent shards are downloaded even beyond the cap: runs that share a cache must not wait for each other.
        prefetched = [other.sha256 for other in request.shards if not other.urgent]
        while self._used() + shard.bytes > room and prefetched:
            self._held.evict(prefetched.pop())
        # The reserve of the disk is there for the shard without which a run ends.
        return self._used() + shard.bytes <= room or not self._running

    def _evict_to(self, limit: int, more: int, requested: set[str]) -> bool:
        """Evict shards that are not requested until `more` bytes fit below `limit`; returns whether they do."""
        while self._used() + more > limit and self._held.evict_least_recent(requested):
            pass
        return self._used() + more <= limit

    def _used(self) -> int:
        new = (download.shard for download in self._running.values())
        return self._held.bytes + sum(shard.bytes for shard in new if not self._held.is_earlier(shard.sha256))

    def _disk_room(self) -> int:
        """Bytes that shards, complete and partial ones, can take on the disk."""
        partial = 0
        for running in self._running.values():
            with suppress(FileNotFoundError):
                partial += _BLOCK * running.part.stat().st_blocks  # ranges leave holes
        return self._cache.disk_room(self._held.bytes + partial)

    def _free_space_for(self, shard: RequestedShard) -> None:
        """Evict what takes the space of `shard`, for which the disk was full; if nothing does, record its failure."""
        requested = {other.sha256 for other in self._merged.shards}
        before = self._held.bytes
        goal = before - shard.bytes
        while self._held.bytes > goal and self._held.evict_least_recent(requested):
            pass
        if shard.urgent:
            prefetched = [other.sha256 for other in self._merged.shards if not other.urgent]
            while self._held.bytes > goal and prefetched:
                self._held.evict(prefetched.pop())
        if self._held.bytes == before and not self._running:
            reason = (
                f"shard {shard.location}: no space for its {shard.bytes / 1e6:,.1f} MB in {self._cache.folder}, and "
                "running readers need all shards there; set data.cache.folder to a larger disk, or reduce "
                "data.shuffle_window"
            )
            self._record_failure(shard, reason, storage_down=False)

    def _read_requests(self) -> bool:
        """Make `_merged` one request for all living readers, urgent shards first, readers in turns.

        Requests of dead readers are removed. Returns whether anything has changed.
        """
        found: dict[Path, _Request] = {}
        for path in sorted((self._cache.folder / "requests").glob("*.json")):
            with suppress(FileNotFoundError):  # withdrawn in the meantime
                if not self._remove_if_dead(path.with_suffix(".lock")):
                    found[path] = self._request(path)
        if found == self._requests:
            return False
        self._requests = found
        requests = [request.content for request in found.values() if request.content is not None]
        turns = [shard for turn in zip_longest(*(request.shards for request in requests)) for shard in turn if shard]
        shards: dict[str, RequestedShard] = {}
        for shard in sorted(turns, key=lambda shard: not shard.urgent):
            shards.setdefault(shard.sha256, shard)
        self._merged = CacheRequest(
            REQUEST_VERSION,
            tuple(shards.values()),
            max((request.bytes for request in requests), default=0),
            max((request.downloads for request in requests), default=0),
        )
        return True

    def _remove_if_dead(self, lock_path: Path) -> bool:
        """Remove the files of a reader that does not hold its lock; one whose lock was removed writes them again."""
        try:
            lock = try_lock(lock_path, create=False)
        except FileNotFoundError:
            lock = None
        else:
            if lock is None:
                return False
        request = lock_path.with_suffix(".json")
        for left_behind in request_files(request):
            left_behind.unlink(missing_ok=True)
        if lock is not None:
            lock.close()
        return True

    def _request(self, path: Path) -> _Request:
        """A reader's request. One that is damaged is logged once.

        Raises:
            FileNotFoundError: it was withdrawn.
        """
        status = path.stat()
        file = (status.st_ino, status.st_mtime_ns)
        known = self._requests.get(path)
        if known is not None and known.file == file:
            return known
        try:
            request = _Request(file, parse_json(CacheRequest, read_regular(path)))
        except FileNotFoundError:
            raise
        except (ValueError, OSError) as error:
            if known is None or known.content is not None:
                log.warning("%s: not a request for shards (%s); it is skipped", path, error)
            with suppress(OSError):
                write_atomically(refusal_path(path), str(error))
            return _Request(file, None)
        if known is None or known.content is None:
            refusal_path(path).unlink(missing_ok=True)
        return request

    def _download(self, shard: RequestedShard, part: Path) -> bool:
        try:
            if self._verify_earlier(shard):
                return True
            # A byte may flip on the way, and the same file be copied again; if it happens twice, the source differs
            # from what was indexed.
            for attempt in (1, 2):
                try:
                    if download(shard, part):
                        with suppress(FileNotFoundError):  # removed by a cleaner: it will be downloaded again
                            part.replace(self._cache.shard_path(shard.sha256))
                        return True
                    wrong = f"its sha256 is not {shard.sha256[:16]}... as in the index"
                except ObjectReplaced:
                    wrong = "it was replaced meanwhile"
                log.warning("%s: %s, attempt %d", shard.location, wrong, attempt)
            raise DataError(
                f"shard {shard.location}: downloaded twice, and {wrong}; copy the shard again, or index the shards "
                "again with: coatnet shards index"
            )
        except Exception as error:
            log.exception("%s", shard.location)
            part.unlink(missing_ok=True)  # on a full disk it takes the space that the failure record needs
            if isinstance(error, OSError) and error.errno in DISK_FULL:
                return False
            known = isinstance(error, DataError | StorageDown)
            reason = str(error) if known else f"shard {shard.location}: {type(error).__name__}: {error}"
            self._record_failure(shard, reason, storage_down=may_pass(error))
            return True
        finally:
            part.unlink(missing_ok=True)

    def _verify_earlier(self, shard: RequestedShard) -> bool:
        """Whether the cache has the shard from an earlier downloader, undamaged; a damaged one is removed."""
        path = self._cache.earlier_path(shard.sha256)
        try:
            with open(path, "rb") as file:
                undamaged = hashlib.file_digest(file, "sha256").hexdigest() == shard.sha256
            if undamaged:
                path.replace(self._cache.shard_path(shard.sha256))
                return True
        except FileNotFoundError:  # there is none, or it was removed in the meantime
            return False
        log.warning("%s: damaged in the cache, downloaded again", shard.location)
        path.unlink(missing_ok=True)
        return False

    def _record_failure(self, shard: RequestedShard, reason: str, *, storage_down: bool) -> None:
        failure = DownloadFailure(without_secrets(reason), storage_down, shard.urgent, time.monotonic())
        try:
            write_atomically(self._cache.failure_path(shard.sha256), json.dumps(asdict(failure)))
        except OSError:
            log.exception("%s: its failure cannot be recorded, so it is tried again", shard.location)


def main(folder: Path) -> None:
    """Serve the cache in `folder` until standard input ends."""
    path = folder / "downloader.lock"
    lock = try_lock(path)
    if lock is None:
        return
    handler = logging.StreamHandler()
    handler.setFormatter(PrintableFormatter())
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    for stop in STOP_SIGNALS:
        signal.signal(stop, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
    downloader = Downloader(folder)
    os.write(1, b"ready\n")

    def end_in_order() -> None:
        with suppress(OSError):
            start_record(folder).unlink()  # the end of this one is no failure
        os._exit(0)  # the next downloader removes partial downloads

    def end_with_the_reader() -> None:
        os.read(0, 1)
        end_in_order()

    threading.Thread(target=end_with_the_reader, daemon=True).start()
    try:
        while lock is not None:
            downloader.update()
            time.sleep(_POLL_INTERVAL)
            lock = _kept(lock, path)
    except BaseException:
        log.exception("the downloader has failed")
        os._exit(1)  # else it would wait for its downloads, and keep the lock, for as long as they are tried again
    os._exit(0)  # another one serves the cache, and its start is on record


def _kept(lock: BinaryIO, path: Path) -> BinaryIO | None:
    """The lock at `path`, taken again if a cleaner removed it; None if another process has it."""
    for _ in range(_LOCK_ATTEMPTS):
        if is_at(path, lock):
            return lock
        with suppress(FileNotFoundError):
            path.parent.mkdir(parents=True, exist_ok=True)
            taken = try_lock(path)
            if taken is not None:
                lock.close()
                lock = taken
                continue
        time.sleep(_POLL_INTERVAL)
    return None


if __name__ == "__main__":
    main(Path(sys.argv[1]))
