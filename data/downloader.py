"""The one process of a node that downloads remote shards into its cache: `python -m data.downloader FOLDER`.

It serves the requests of all living readers, urgent shards first. It ends with the reader that started it; any other
reader starts the next one. Only shards that no living reader requests are evicted, the least recently used first.
"""

import hashlib
import json
import logging
import os
import signal
import sys
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from itertools import zip_longest
from pathlib import Path

from data.atomic_file import unfinished_path, write_atomically
from data.cache import STOP_SIGNALS, Cache, CacheRequest, DownloadFailure, RequestedShard, try_lock
from data.errors import DataError, StorageDown
from data.json_records import parse_json
from data.storage import pieces

log = logging.getLogger(__name__)

_POLL_INTERVAL = 0.05  # seconds between looks at the requests
_ABANDONED_AFTER = 60.0  # seconds after which the lock of a reader without a request counts as left behind


class Downloader:
    """Downloads requested shards into the cache in `folder`."""

    def __init__(self, folder: Path) -> None:
        self._cache = Cache(folder, 0)
        self._running: dict[str, tuple[int, Future[None]]] = {}  # sha256 -> bytes, download
        self._executor = ThreadPoolExecutor(64, thread_name_prefix="download")
        self._unreadable: set[Path] = set()
        for part in (folder / "shards").glob("*.part"):
            part.unlink()
        for failure in (folder / "failed").iterdir():
            failure.unlink()
        for lock in (folder / "requests").glob("*.lock"):
            # Its reader was killed before its first request, unless it is only just starting.
            if not lock.with_suffix(".json").exists() and time.time() - lock.stat().st_mtime > _ABANDONED_AFTER:
                lock.unlink(missing_ok=True)

    def update(self) -> None:
        """Process the requests once: collect finished downloads, evict, start the next downloads."""
        request = self._merged_requests()
        requested = {shard.sha256 for shard in request.shards}
        for sha256 in [name for name, (_, future) in self._running.items() if future.done()]:
            del self._running[sha256]
        for failure in (self._cache.folder / "failed").glob("[!.]*"):  # not those that are being written
            if failure.name not in requested:
                failure.unlink()
        stored = {path.stem: path for path in (self._cache.folder / "shards").glob("*.tar")}
        sizes = {sha256: path.stat().st_size for sha256, path in stored.items()}
        used = sum(sizes.values()) + sum(size for size, _ in self._running.values())
        evictable = sorted(
            (path.stat().st_mtime_ns, sha256) for sha256, path in stored.items() if sha256 not in requested
        )
        for shard in request.shards:
            if len(self._running) >= request.downloads:
                break
            if sizes.get(shard.sha256, shard.bytes) != shard.bytes:
                stored.pop(shard.sha256).unlink()  # truncated by a crash of the node
                used -= sizes.pop(shard.sha256)
            if (
                shard.sha256 in stored
                or shard.sha256 in self._running
                or self._cache.failure_path(shard.sha256).exists()
            ):
                continue
            while evictable and used + shard.bytes > request.bytes:
                _, sha256 = evictable.pop(0)
                stored.pop(sha256).unlink()
                used -= sizes[sha256]
            # Urgent shards are downloaded even beyond the cap: runs that share a cache must not wait for each other.
            if used + shard.bytes > request.bytes and not shard.urgent:
                break
            used += shard.bytes
            self._running[shard.sha256] = (shard.bytes, self._executor.submit(self._download, shard))

    def _merged_requests(self) -> CacheRequest:
        """One request for all living readers, urgent shards first, readers in turns; removes those of dead readers."""
        requests: list[CacheRequest] = []
        for path in sorted((self._cache.folder / "requests").glob("*.json")):
            lock_file = path.with_suffix(".lock")
            lock = try_lock(lock_file)
            if lock is not None:
                for left_behind in (path, unfinished_path(path), lock_file):
                    left_behind.unlink(missing_ok=True)
                lock.close()
            elif (request := self._read_request(path)) is not None:
                requests.append(request)
        turns = [shard for turn in zip_longest(*(request.shards for request in requests)) for shard in turn if shard]
        shards: dict[str, RequestedShard] = {}
        for shard in sorted(turns, key=lambda shard: not shard.urgent):
            shards.setdefault(shard.sha256, shard)
        return CacheRequest(
            tuple(shards.values()),
            max((request.bytes for request in requests), default=0),
            max((request.downloads for request in requests), default=0),
        )

    def _read_request(self, path: Path) -> CacheRequest | None:
        """A reader's request; None if it was withdrawn or is damaged, which is logged once."""
        try:
            request = parse_json(CacheRequest, path.read_bytes())
        except FileNotFoundError:
            return None
        except ValueError as error:
            if path not in self._unreadable:
                log.warning("%s: not a request for shards (%s); it is skipped", path, error)
                self._unreadable.add(path)
            return None
        self._unreadable.discard(path)
        return request

    def _download(self, shard: RequestedShard) -> None:
        part = self._cache.folder / "shards" / f"{shard.sha256}.part"
        try:
            # A byte may flip on the way; if it happens twice, the source differs from what was indexed.
            for attempt in (1, 2):
                if download(shard, part):
                    part.replace(self._cache.shard_path(shard.sha256))
                    return
                log.warning("%s: sha256 differs from the index, attempt %d", shard.location, attempt)
            raise DataError(
                f"shard {shard.location}: downloaded twice, and its sha256 is not {shard.sha256[:16]}... as in the "
                "index; copy the shard again, or index the shards again with: coatnet shards index"
            )
        except Exception as error:
            log.exception("%s", shard.location)
            part.unlink(missing_ok=True)  # on a full disk it takes the space that the failure record needs
            known = isinstance(error, DataError | StorageDown)
            reason = str(error) if known else f"shard {shard.location}: {type(error).__name__}: {error}"
            self._record_failure(shard, DownloadFailure(reason, isinstance(error, StorageDown)))
        finally:
            part.unlink(missing_ok=True)

    def _record_failure(self, shard: RequestedShard, failure: DownloadFailure) -> None:
        write_atomically(self._cache.failure_path(shard.sha256), json.dumps(asdict(failure)))


def download(shard: RequestedShard, part: Path) -> bool:
    """Download the shard to `part` and flush it to the disk; False if its sha256 differs from the requested one."""
    sha256 = hashlib.sha256()
    with open(part, "wb") as file:
        for piece in pieces(shard.location, shard.bytes, shard.storage):
            sha256.update(piece)
            file.write(piece)
        file.flush()
        os.fsync(file.fileno())
    return sha256.hexdigest() == shard.sha256


def main(folder: Path) -> None:
    """Serve the cache in `folder` until standard input ends."""
    lock = try_lock(folder / "downloader.lock")
    if lock is None:
        return
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    for stop in STOP_SIGNALS:
        signal.signal(stop, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
    downloader = Downloader(folder)
    os.write(1, b"ready\n")

    def end_with_the_reader() -> None:
        os.read(0, 1)
        os._exit(0)  # the next downloader removes partial downloads

    threading.Thread(target=end_with_the_reader, daemon=True).start()
    while True:
        downloader.update()
        time.sleep(_POLL_INTERVAL)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
