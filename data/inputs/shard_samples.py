"""The samples of indexed shards as images to classify."""

import numpy as np

from data.dataset import Dataset
from data.errors import CoatnetError, DataError
from data.inputs.image_source import StoredImage, UnreadableImage
from data.remote.cache import Cache
from data.remote.web_address import without_signature
from data.sample_reader import SampleReader
from data.shard import BrokenSample

_AHEAD = 2  # shards


class ShardSamples:
    """The samples of `dataset` in the order of its index, or those of its shard `only`.

    Raises:
        DataError: a remote dataset without a cache, or a cache that cannot be created.
    """

    def __init__(self, dataset: Dataset, cache: Cache | None, only: int | None = None) -> None:
        self.classes = dataset.classes
        sizes = dataset.shard_samples
        ends = np.cumsum(sizes)
        self._first = 0 if only is None else int(ends[only] - sizes[only])
        self._samples = int(dataset.samples if only is None else sizes[only])
        self._ends, self._sizes, self._dataset = ends, sizes, dataset
        self._reader = SampleReader(dataset, cache)

    def __len__(self) -> int:
        return self._samples

    def name(self, number: int) -> str:
        """The shard and the key; its position in the shard instead where that cannot be opened."""
        shard, place = self._place(number)
        location = without_signature(self._dataset.index.location(shard))
        try:
            return f"{location}: {self._reader.key(shard, place)}"
        except (CoatnetError, OSError):
            return f"{location}: sample {place:,}"

    def read(self, number: int) -> StoredImage:
        """Sample `number`; see `ImageSource.read`."""
        shard, place = self._place(number)
        try:
            sample = self._reader.read(shard, place)
        except BrokenSample as error:
            raise UnreadableImage(str(error)) from None
        except CoatnetError as error:
            raise UnreadableImage(str(error), may_pass=error.retryable) from None
        except OSError as error:
            raise UnreadableImage(error.strerror or str(error)) from None
        return StoredImage(sample.image, sample.labels)

    def prepare(self, first: int, last: int) -> None:
        """Have the shards of these samples downloaded, and then the next ones."""
        if self._reader.cached:
            one, other = (self._place(number)[0] for number in (first, last - 1))
            self._reader.cached.request(
                range(one, other + 1), range(other + 1, min(other + 1 + _AHEAD, len(self._ends)))
            )

    def stop(self) -> None:
        """See `ImageSource.stop`."""
        self._reader.stop()

    def close(self) -> None:
        """See `ImageSource.close`."""
        self._reader.close()

    def _place(self, number: int) -> tuple[int, int]:
        sample = self._first + number
        shard = int(np.searchsorted(self._ends, sample, side="right"))
        return shard, sample - int(self._ends[shard] - self._sizes[shard])


def shard_number(dataset: Dataset, name: str) -> int:
    """Which shard of `dataset` the tar `name` in its folder is.

    Raises:
        DataError: none.
    """
    names = [shard.name.partition("?")[0] for shard in dataset.index.shards]
    if name not in names:
        raise DataError(
            f"{without_signature(dataset.index.folder)}: {name} is not a shard of its index; index it again with: "
            "coatnet shards index"
        )
    return names.index(name)
