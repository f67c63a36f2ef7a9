"""Random access to the samples of a dataset, whether its shards are on a local disk or in the node's cache."""

import resource
from pathlib import Path
from typing import NamedTuple

from data.dataset import Dataset
from data.errors import DataError
from data.remote.cache import Cache, CachedShards
from data.remote.storage import is_remote
from data.shard import BrokenSample, EncodedSample, OpenShards, Shard

_OTHER_FILES = 512  # libraries, logs, sockets
_FEWEST = 16  # shards open even so


class LabelledSample(NamedTuple):
    """One sample as stored, with its classes."""

    key: str
    image: bytes
    labels: tuple[int, ...]


class SampleReader:
    """Random access to the samples of `dataset`; threads may share it.

    Args:
        dataset: the samples to read.
        cache: of remote shards.
        open_shards: number of shards kept open, fewer where the system does not allow as many open files; should cover
            those that are read alternately.

    Raises:
        DataError: a remote dataset without a cache, or a cache that cannot be created.
    """

    def __init__(self, dataset: Dataset, cache: Cache | None, open_shards: int = 64) -> None:
        self.dataset = dataset
        self.cached: CachedShards | None = None
        if is_remote(dataset.index.folder):
            if cache is None:
                raise DataError(f"{dataset.index.folder}: remote shards are read through a cache; set data.cache")
            self.cached = CachedShards(cache, dataset)
        self._shards = OpenShards(self._open, allow_open_files(open_shards))

    def read(self, shard: int, number: int) -> LabelledSample:
        """Sample `number` of those of `shard` that the dataset keeps.

        Raises:
            BrokenSample: it is unusable.
            DataError: the shard is missing or does not match the index.
            StorageDown: it cannot be downloaded for now.
        """
        sample = self._encoded(shard, number)
        try:
            return LabelledSample(sample.key, sample.image, self.dataset.labels(sample.label))
        except ValueError as error:
            raise BrokenSample(sample.key, str(error)) from None

    def key(self, shard: int, number: int) -> str:
        """The key of sample `number` of those of `shard` that the dataset keeps.

        Raises:
            DataError, StorageDown: as for `read`.
        """
        return self._shards[shard].key(self.dataset.place(shard, number))

    def stop(self) -> None:
        """End every wait for a shard with an error."""
        if self.cached:
            self.cached.stop()

    def close(self) -> None:
        """Release the cache."""
        if self.cached:
            self.cached.close()

    def _encoded(self, shard: int, number: int) -> EncodedSample:
        return self._shards[shard].read(self.dataset.place(shard, number))

    def _open(self, number: int) -> Shard:
        index = self.dataset.index
        entry = index.shards[number]
        while True:
            path = self.cached.path(number) if self.cached else Path(index.location(number))
            try:
                return Shard(path, index.image_fields, index.label.field, entry.samples)
            except FileNotFoundError:
                if self.cached is None:
                    raise DataError(f"shard {path}: it has been removed since the run started; copy it back") from None
                # Evicted just now: it is downloaded again.


def allow_open_files(count: int) -> int:
    """Raise this process's limit of open files, usually 1,024, if `count` more might exceed it.

    Returns how many of them may be open: fewer if the hard limit, which only the system can raise, is too low.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = count + _OTHER_FILES
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return count
    limit = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
    return min(count, max(_FEWEST, limit - _OTHER_FILES))
