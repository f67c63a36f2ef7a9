"""A downloader in this process, and what it has stored."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from data.dataset import Dataset
from data.remote.cache import Cache
from data.remote.downloader import Downloader

CAP = 10**12


@contextmanager
def downloading(folder: Path, *, downloads: int = 4) -> Iterator[Cache]:
    """A cache, and a downloader that serves it."""
    cache = Cache(folder, CAP, downloads)
    cache.make()
    downloaders, end = [Downloader(folder)], threading.Event()

    def serve() -> None:
        while not end.wait(0.005):
            downloaders[-1]._next_check = 0.0
            try:
                downloaders[-1].update()
            except FileNotFoundError:  # a folder is removed under it: its process would end, and a reader start another
                downloaders.append(Downloader(folder))

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield cache
    finally:
        end.set()
        thread.join()
        for downloader in downloaders:
            downloader._executor.shutdown()


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.005)


def stored(cache: Cache, dataset: Dataset) -> list[int]:
    return [number for number, shard in enumerate(dataset.index.shards) if cache.shard_path(shard.sha256).exists()]
