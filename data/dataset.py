"""A dataset as a run sees it: the samples of an index, with an optional label map applied."""

import hashlib
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data.classes.labels import LabelMap, LabelReader, read_label_map
from data.errors import DataError
from data.index import ShardIndex, read_index, read_labels
from data.remote.storage import Storage


@dataclass(frozen=True, eq=False)
class Dataset:
    """The samples of `index` that its ignored labels and `label_map` keep; sample ids count only those.

    Args:
        index: the index of the shards.
        storage: how to access them.
        label_map: maps to other classes; None keeps those of the index.
        kept: (samples of the index,) bool, which have a label that is neither dropped nor ignored; None for all.
        most_labels: greatest number of labels of one sample; None for that of the index.
    """

    index: ShardIndex
    storage: Storage = field(default_factory=Storage)
    label_map: LabelMap | None = None
    kept: NDArray[np.bool_] | None = None
    most_labels: int | None = None

    def __post_init__(self) -> None:
        sizes = self.index.shard_samples
        starts = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
        if self.kept is not None:
            before = np.concatenate([[0], np.cumsum(self.kept)]).astype(np.int64)
            sizes = before[starts[1:]] - before[starts[:-1]]
        object.__setattr__(self, "_starts", starts)
        object.__setattr__(self, "_sizes", sizes)
        object.__setattr__(self, "_read_label", LabelReader(self.index.label, self.index.classes))

    _starts: NDArray[np.int64] = field(init=False)
    _sizes: NDArray[np.int64] = field(init=False)
    _read_label: LabelReader = field(init=False)

    @property
    def classes(self) -> tuple[str, ...]:
        """Names; a label is a position in this list."""
        return self.label_map.classes if self.label_map else self.index.classes

    @property
    def samples(self) -> int:
        return int(self._sizes.sum())

    @property
    def shard_samples(self) -> NDArray[np.int64]:
        """(S,) samples of each shard."""
        return self._sizes

    @property
    def labels_per_sample(self) -> int:
        """Greatest number of labels of one sample."""
        return self.most_labels or self.index.labels_per_sample

    @property
    def digest(self) -> str:
        """sha256 of everything but the location."""
        if self.label_map is None:
            return self.index.digest
        return hashlib.sha256((self.index.digest + self.label_map.digest).encode()).hexdigest()

    def place(self, shard: int, number: int) -> int:
        """The place in the tar of `shard` of its sample `number`."""
        if self.kept is None:
            return number
        return int(np.flatnonzero(self.kept[self._starts[shard] : self._starts[shard + 1]])[number])

    def labels(self, content: bytes) -> tuple[int, ...]:
        """The classes that a label member names, ascending.

        Raises:
            ValueError: none of them belongs to the dataset.
        """
        labels = self._read_label(content)
        mapped = self.label_map(labels) if self.label_map else labels
        if not mapped:
            raise ValueError(f"the label {self.index.classes[labels[0]]} is dropped by the label map")
        if len(mapped) > self.labels_per_sample:
            raise ValueError(f"{len(mapped)} labels, but the index allows {self.labels_per_sample} at most")
        return mapped


def open_dataset(folder: str, storage: Storage, label_map: str | Path | None = None) -> Dataset:
    """The dataset whose index is in `folder`, a path or URL, with the label map of a file applied.

    Raises:
        DataError: the index or label map is unreadable, they do not match, or no sample is left.
        StorageRefused, StorageDown: access refused, or no answer.
    """
    index = read_index(folder, storage)
    mapping = None if label_map is None else read_label_map(label_map, index.classes)
    if not (mapping and mapping.drops) and not index.label.ignored:
        return Dataset(index, storage, mapping)
    labels = read_labels(index, storage)
    # One more class at the end, dropped: the padding of -1 selects it.
    targets = np.append(mapping.targets if mapping else np.arange(len(index.classes), dtype=np.int32), np.int32(-1))
    mapped = np.sort(targets[labels], axis=1)
    # Merged classes count once per sample.
    counts = (mapped[:, :1] >= 0).sum(axis=1) + ((mapped[:, 1:] >= 0) & (mapped[:, 1:] != mapped[:, :-1])).sum(axis=1)
    dataset = Dataset(index, storage, mapping, counts > 0, int(counts.max(initial=1)))
    if dataset.samples == 0:
        raise DataError(f"{label_map or folder}: no sample of {folder} is left")
    return dataset
