"""The samples of indexed shards as images to classify."""

from collections.abc import Sequence

import numpy as np

from data.dataset import Dataset
from data.errors import CoatnetError, DataError
from data.inputs.image_source import StoredImage, UnreadableImage
from data.remote.web_address import without_signature
from data.sample_reader import SampleReader
from data.shard import BrokenSample

_AHEAD = 2  # shards


class ShardSamples:
    """The samples of the dataset of `reader` in the order of its index, or those of the shards `only`."""

    def __init__(self, reader: SampleReader, only: Sequence[int] | None = None) -> None:
        self.classes = reader.dataset.classes
        self._reader = reader
        self._shards = list(range(len(reader.dataset.index.shards))) if only is None else list(only)
        self._sizes = reader.dataset.shard_samples[self._shards]
        self._ends = np.cumsum(self._sizes)

    def __len__(self) -> int:
        return int(self._sizes.sum())

    def name(self, number: int) -> str:
        """The shard and the key; its position in the shard instead where that cannot be opened."""
        shard, place = self._place(number)
        location = without_signature(self._reader.dataset.index.location(shard))
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
        begin, end = self._position(first), self._position(last - 1) + 1
        self._reader.request(self._shards[begin:end], self._shards[end : end + _AHEAD])

    def stop(self) -> None:
        """See `ImageSource.stop`."""
        self._reader.stop()

    def close(self) -> None:
        """See `ImageSource.close`."""
        self._reader.close()

    def _position(self, number: int) -> int:
        """The position of the shard of sample `number` among the shards of this source."""
        return int(np.searchsorted(self._ends, number, side="right"))

    def _place(self, number: int) -> tuple[int, int]:
        """The shard of sample `number`, and its number there."""
        position = self._position(number)
        return self._shards[position], number - int(self._ends[position] - self._sizes[position])


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
