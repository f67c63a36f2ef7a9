"""Random access to the samples of a dataset, whether its shards are on a local disk or in the node's cache."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from data.dataset import Dataset
from data.errors import DataError
from data.files.open_file_limit import allow_open_files
from data.remote.cache import Cache, CachedShards
from data.remote.storage import is_remote
from data.shard import BrokenSample, EncodedSample, OpenShards, Shard


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
        self.is_remote = is_remote(dataset.index.folder)
        """Whether its shards must be requested before they are read."""
        self._cached: CachedShards | None = None
        if self.is_remote:
            if cache is None:
                raise DataError(f"{dataset.index.folder}: remote shards are read through a cache; set data.cache")
            self._cached = CachedShards(cache, dataset)
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

    def request(self, now: Sequence[int], ahead: Sequence[int] = ()) -> None:
        """Have remote shards downloaded, those that are read `now` first, and close all others.

        An open file that the cache has evicted would go on taking space on the disk. Local shards are there anyway.
        """
        if self._cached:
            self._shards.close_others({*now, *ahead})
            self._cached.request(now, ahead)

    def stop(self) -> None:
        """End every wait for a shard with an error."""
        if self._cached:
            self._cached.stop()

    def close(self) -> None:
        """Release the cache."""
        if self._cached:
            self._cached.close()

    def _encoded(self, shard: int, number: int) -> EncodedSample:
        return self._shards[shard].read(self.dataset.place(shard, number))

    def _open(self, number: int) -> Shard:
        index = self.dataset.index
        entry = index.shards[number]
        while True:
            path = self._cached.path(number) if self._cached else Path(index.location(number))
            try:
                return Shard(path, index.image_fields, index.label.field, entry.samples)
            except FileNotFoundError:
                if self._cached is None:
                    raise DataError(f"shard {path}: it has been removed since the run started; copy it back") from None
                # Evicted just now: it is downloaded again.
