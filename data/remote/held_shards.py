"""The complete shards in a cache, kept as a list in memory: listing ten thousand files takes a core if done often."""

import heapq
from collections.abc import Container
from contextlib import suppress
from pathlib import Path

EARLIER = ".earlier"


class HeldShards:
    """The shards `<sha256>.tar` in `folder`, in the order of their last use, which is their modification time.

    Those that are there at first become `<sha256>.earlier`: they count, but must be verified before they are read.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._sizes: dict[str, int] = {}
        self._by_use: list[tuple[int, str]] = []
        """A heap of time of last use and sha256. The time may be an older one; it is compared when it matters."""
        for path in folder.glob("*.tar"):
            with suppress(FileNotFoundError):  # removed by a cleaner
                path.rename(path.with_suffix(EARLIER))
        for path in folder.glob(f"*{EARLIER}"):
            with suppress(FileNotFoundError):
                status = path.stat()
                self._sizes[path.stem] = status.st_size
                self._by_use.append((status.st_mtime_ns, path.stem))
        self._earlier = set(self._sizes)
        self.bytes = sum(self._sizes.values())
        heapq.heapify(self._by_use)

    def __contains__(self, sha256: str) -> bool:
        return sha256 in self._sizes and sha256 not in self._earlier

    def is_earlier(self, sha256: str) -> bool:
        """Whether the shard is there but must be verified."""
        return sha256 in self._earlier

    def check(self, sha256: str, size: int) -> None:
        """Compare the list with the file of a shard of `size` bytes: it may be new or gone.

        A file of another size, left by a crash of the node, is removed.
        """
        if sha256 in self._earlier and not self._path(sha256).exists():
            self._earlier.discard(sha256)  # it has been verified, or a cleaner has removed it
        try:
            status = self._path(sha256).stat()
        except FileNotFoundError:
            self._forget(sha256)
            return
        if status.st_size != size:
            self.evict(sha256)
        elif sha256 not in self._sizes:
            self._sizes[sha256] = size
            self.bytes += size
            heapq.heappush(self._by_use, (status.st_mtime_ns, sha256))

    def evict_least_recent(self, kept: Container[str]) -> bool:
        """Remove the shard that was not used for longest, apart from those in `kept`; False if there is none."""
        passed = []
        evicted = False
        while self._by_use and not evicted:
            known_use, sha256 = heapq.heappop(self._by_use)
            if sha256 not in self._sizes:
                continue
            try:
                last_use = self._path(sha256).stat().st_mtime_ns
            except FileNotFoundError:
                self._forget(sha256)
                continue
            if sha256 in kept:
                passed.append((last_use, sha256))
            elif last_use > known_use:
                heapq.heappush(self._by_use, (last_use, sha256))
            else:
                self.evict(sha256)
                evicted = True
        for entry in passed:
            heapq.heappush(self._by_use, entry)
        return evicted

    def evict(self, sha256: str) -> None:
        """Remove a shard, if it is there."""
        self._path(sha256).unlink(missing_ok=True)
        self._forget(sha256)

    def _forget(self, sha256: str) -> None:
        self.bytes -= self._sizes.pop(sha256, 0)
        self._earlier.discard(sha256)

    def _path(self, sha256: str) -> Path:
        return self._folder / f"{sha256}{EARLIER if sha256 in self._earlier else '.tar'}"
