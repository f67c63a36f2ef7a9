"""The one process of a node that fetches remote shards into its cache: `python -m data.downloader FOLDER`.

It works through the requests of all living readers, those that wait first; it ends with the reader that started it, and
any other starts the next. Only what no living reader wants is evicted, the least recently used first.
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
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple

from data.atomic_file import unfinished_path, write_atomically
from data.cache import STOP_SIGNALS, Cache, try_lock
from data.errors import DataError, StorageDown
from data.storage import Storage, pieces

log = logging.getLogger(__name__)

_PAUSE = 0.05  # seconds between looks at the requests


class Wanted(NamedTuple):
    """A shard that a reader wants."""

    location: str
    bytes: int
    sha256: str
    storage: Storage
    now: bool
    """Whether the reader is at it, and not only about to be."""


class Requests(NamedTuple):
    """What all living readers want, the most urgent first, and the cap and number of downloads they ask for."""

    shards: list[Wanted]
    bytes: int
    downloads: int


def read_requests(folder: Path) -> Requests:
    """Collect the requests of the living and remove those of the dead."""
    lists: list[list[Wanted]] = []
    cap = downloads = 0
    for request in sorted((folder / "requests").glob("*.json")):
        lock_file = request.with_suffix(".lock")
        lock = try_lock(lock_file)
        if lock is not None:
            for path in (request, unfinished_path(request), lock_file):
                path.unlink(missing_ok=True)
            lock.close()
            continue
        try:
            content: dict[str, Any] = json.loads(request.read_text())
        except FileNotFoundError:
            continue
        storage = Storage(**content["storage"])
        cap, downloads = max(cap, content["bytes"]), max(downloads, content["downloads"])
        lists.append(
            [Wanted(**shard, storage=storage, now=n < content["now"]) for n, shard in enumerate(content["shards"])]
        )
    turns = [wanted for turn in zip_longest(*lists) for wanted in turn if wanted is not None]
    shards: dict[str, Wanted] = {}
    for wanted in sorted(turns, key=lambda wanted: not wanted.now):
        shards.setdefault(wanted.sha256, wanted)
    return Requests(list(shards.values()), cap, downloads)


class Downloader:
    """Fetches what is wished for into `folder`."""

    def __init__(self, folder: Path) -> None:
        self._cache = Cache(folder, 0)
        self._running: dict[str, tuple[int, Future[None]]] = {}  # sha256 -> bytes, download
        self._executor = ThreadPoolExecutor(64, thread_name_prefix="download")
        for part in (folder / "shards").glob("*.part"):
            part.unlink()
        for failure in (folder / "failed").iterdir():
            failure.unlink()
        for lock in (folder / "requests").glob("*.lock"):
            # Of a reader killed before its first request, unless it is only just beginning.
            if not lock.with_suffix(".json").exists() and time.time() - lock.stat().st_mtime > 60:
                lock.unlink(missing_ok=True)

    def turn(self) -> None:
        """Look at the requests once: collect what has ended, make room, start what comes next."""
        requests = read_requests(self._cache.folder)
        wanted = {shard.sha256 for shard in requests.shards}
        for sha256 in [name for name, (_, future) in self._running.items() if future.done()]:
            del self._running[sha256]
        for failure in (self._cache.folder / "failed").glob("[!.]*"):  # not what a download is just writing
            if failure.name not in wanted:
                failure.unlink()
        held = {path.stem: path for path in (self._cache.folder / "shards").glob("*.tar")}
        sizes = {sha256: path.stat().st_size for sha256, path in held.items()}
        used = sum(sizes.values()) + sum(size for size, _ in self._running.values())
        idle = sorted((path.stat().st_mtime_ns, sha256) for sha256, path in held.items() if sha256 not in wanted)
        for shard in requests.shards:
            if len(self._running) >= requests.downloads:
                break
            if sizes.get(shard.sha256, shard.bytes) != shard.bytes:
                held.pop(shard.sha256).unlink()  # cut short by a crash of the node
                used -= sizes.pop(shard.sha256)
            if shard.sha256 in held or shard.sha256 in self._running or self._cache.failure(shard.sha256).exists():
                continue
            while idle and used + shard.bytes > requests.bytes:
                _, sha256 = idle.pop(0)
                held.pop(sha256).unlink()
                used -= sizes[sha256]
            # What a reader waits for is fetched in any case: runs that share a cache must not wait for each other.
            if used + shard.bytes > requests.bytes and not shard.now:
                break
            used += shard.bytes
            self._running[shard.sha256] = (shard.bytes, self._executor.submit(self._fetch, shard))

    def _fetch(self, shard: Wanted) -> None:
        part = self._cache.folder / "shards" / f"{shard.sha256}.part"
        try:
            # A byte may flip on the way; if it happens twice, the source is not what the index was made of.
            for attempt in (1, 2):
                if download(shard, part):
                    part.replace(self._cache.shard(shard.sha256))
                    return
                log.warning("%s: another hash than in the index, attempt %d", shard.location, attempt)
            raise DataError(
                f"shard {shard.location}: fetched twice, and its sha256 is not {shard.sha256[:16]}... as the index has "
                "it; copy the shard again, or index the shards again with: coatnet shards index"
            )
        except Exception as error:
            log.exception("%s", shard.location)
            part.unlink(missing_ok=True)  # on a full disk it takes the room that the reason needs
            known = isinstance(error, DataError | StorageDown)
            reason = str(error) if known else f"shard {shard.location}: {type(error).__name__}: {error}"
            self._fail(shard, {"down": isinstance(error, StorageDown), "reason": reason})
        finally:
            part.unlink(missing_ok=True)

    def _fail(self, shard: Wanted, failed: dict[str, Any]) -> None:
        failure = self._cache.failure(shard.sha256)
        write_atomically(failure, json.dumps(failed))


def download(shard: Wanted, part: Path) -> bool:
    """Fetch the shard to `part` and flush it to the disk; False if its sha256 is another one."""
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

    def end_with_the_starter() -> None:
        os.read(0, 1)
        os._exit(0)  # parts are removed by the next downloader

    threading.Thread(target=end_with_the_starter, daemon=True).start()
    while True:
        downloader.turn()
        time.sleep(_PAUSE)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
