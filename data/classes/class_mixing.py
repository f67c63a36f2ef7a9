"""How many classes the batches of an order mix, compared with globally shuffled shards.

In shards that are sorted by class, a lane reads few classes at a time: more lanes or longer windows mix more of them,
and shuffling the shards once mixes all. The estimate looks at some steps of the real order, not at all of them.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from data.dataset import Dataset
from data.index import read_labels
from data.order import SampleOrder, default_lanes

ENOUGH = 0.8
"""The share of the classes of shuffled shards below which batches are badly mixed."""
WINDOW = 8192
"""The window assumed while the recipe is not known."""
_BATCH, _MICRO_BATCH = 4096, 64  # likewise
_STEPS = 8  # looked at
_STEPS_OF_REMEDY = 3  # looked at for each setting that is tried
_MOST_LABELS = 2**28  # read at the start of a run: 1 GB


@dataclass(frozen=True, slots=True)
class ClassCount:
    """Mean number of classes of the batches, or micro-batches, of `size` samples."""

    size: int
    classes: float
    shuffled: float
    """If the shards were globally shuffled."""

    @property
    def share(self) -> float:
        return self.classes / self.shuffled if self.shuffled else 1.0


@dataclass(frozen=True, slots=True)
class ClassMixing:
    """The classes of the batches and of the micro-batches of an order."""

    batch: ClassCount
    micro_batch: ClassCount

    @property
    def is_enough(self) -> bool:
        return min(self.batch.share, self.micro_batch.share) >= ENOUGH

    def __str__(self) -> str:
        (batch, batch_shuffled), (micro, micro_shuffled) = (
            tuple(f"{number:,.{1 if number < 10 else 0}f}" for number in (count.classes, count.shuffled))
            for count in (self.batch, self.micro_batch)
        )
        return (
            f"a batch of {self.batch.size:,} has on average {batch} classes ({batch_shuffled} if all samples were "
            f"shuffled), and a micro-batch of {self.micro_batch.size:,} has {micro} ({micro_shuffled})"
        )


@dataclass(frozen=True, slots=True)
class Remedies:
    """Settings with either of which batches are mixed well enough; None where no value is."""

    lanes: int | None
    window: int | None


def class_mixing(labels: NDArray[np.int32], order: SampleOrder, micro_batch: int, steps: int = _STEPS) -> ClassMixing:
    """The classes that `order` mixes.

    Args:
        labels: (N, k) of all samples of the order by id, padded with -1.
        order: of the samples.
        micro_batch: its size, which divides the batch.
        steps: number of steps looked at, spread over an epoch.
    """
    epoch = max(steps, order.samples // order.batch)
    of_batches: list[int] = []
    of_micro_batches: list[int] = []
    for step in (np.arange(steps) * epoch // steps).tolist():
        found = labels[order.at(step, 0, order.batch).id]
        of_batches.append(_distinct(found))
        of_micro_batches += [_distinct(part) for part in found.reshape(-1, micro_batch, labels.shape[1])]
    shares = _class_shares(labels)
    return ClassMixing(
        ClassCount(order.batch, float(np.mean(of_batches)), _expected(shares, order.batch)),
        ClassCount(micro_batch, float(np.mean(of_micro_batches)), _expected(shares, micro_batch)),
    )


def remedies(labels: NDArray[np.int32], order: SampleOrder, micro_batch: int) -> Remedies:
    """The fewest lanes, and the shortest window, tried in steps of at least a factor of two, that mix well enough."""

    def is_enough(changed: SampleOrder) -> bool:
        return class_mixing(labels, changed, micro_batch, _STEPS_OF_REMEDY).is_enough

    most = min(order.batch, order.samples)
    more_lanes = _doubled([n for n in range(order.lanes + 1, most + 1) if order.batch % n == 0], order.lanes)
    longest = -(-order.samples // order.lanes)  # a whole lane
    doublings = int(np.ceil(np.log2(max(1.0, longest / order.window))))
    windows = [min(order.window << n, longest) for n in range(1, doublings + 1)]
    return Remedies(
        next((n for n in more_lanes if is_enough(replace(order, lanes=n))), None),
        next((n for n in windows if is_enough(replace(order, window=n))), None),
    )


def mixing_advice(
    labels: NDArray[np.int32], order: SampleOrder, micro_batch: int, folder: str
) -> tuple[str, str | None]:
    """What a batch of `order` mixes, and what to do about it; None if it mixes enough."""
    mixing = class_mixing(labels, order, micro_batch)
    if mixing.is_enough:
        return str(mixing), None
    found = remedies(labels, order, micro_batch)
    settings = [f"data.lanes to {found.lanes}"] if found.lanes else []
    settings += [f"data.shuffle_window to {found.window}"] if found.window else []
    shuffle = f"huffle them once with: coatnet shards build {folder} NEW_FOLDER"
    if not settings:
        return str(mixing), f"no data.lanes and no data.shuffle_window mixes enough: s{shuffle}"
    return str(mixing), f"set {' or '.join(settings)}, or s{shuffle}"


def advice_on_index(dataset: Dataset) -> Iterator[str]:
    """A warning, while no recipe is known, if the batches of a usual one would be badly mixed."""
    labels = dataset_labels(dataset)
    if labels is None or not dataset.samples:
        return
    batch = int(min(_BATCH, max(8, 2 ** int(np.log2(max(1, dataset.samples // 8))))))
    order = SampleOrder(dataset.shard_samples, 0, batch, default_lanes(batch, dataset.samples), WINDOW)
    what, fix = mixing_advice(labels, order, min(_MICRO_BATCH, batch // 4), dataset.index.home or dataset.index.folder)
    if fix:
        yield f"warning: the samples are sorted: with {order.lanes} lanes and windows of {WINDOW:,}, {what}; {fix}"


def dataset_labels(dataset: Dataset) -> NDArray[np.int32] | None:
    """The labels (N, k) of the samples of `dataset` by id, padded with -1; None if there are too many to read.

    Raises:
        DataError: no `labels.npy`, or one that does not match the index.
        StorageRefused, StorageDown: access refused, or no answer.
    """
    if dataset.index.samples * dataset.index.labels_per_sample > _MOST_LABELS:
        return None
    labels = read_labels(dataset.index, dataset.storage)
    if dataset.label_map is not None:
        # One more class at the end, dropped: the padding of -1 selects it.
        labels = np.append(dataset.label_map.targets, np.int32(-1))[labels]
    return labels if dataset.kept is None else labels[dataset.kept]


def _doubled(values: list[int], before: int) -> Iterator[int]:
    """The first of `values`, ascending, and further ones at least twice as large each, and the last."""
    for value in values:
        if value >= 2 * before or value == values[-1]:
            yield value
            before = value


def _distinct(labels: NDArray[np.int32]) -> int:
    return int(np.count_nonzero(np.unique(labels) >= 0))


def _class_shares(labels: NDArray[np.int32]) -> NDArray[np.float64]:
    """The share of the samples that has each class, for the classes that occur."""
    if labels.shape[1] == 1:
        counts = np.bincount(labels[labels >= 0])
    else:
        rows = np.sort(labels, axis=1)
        first = np.concatenate([np.ones((len(rows), 1), np.bool_), rows[:, 1:] != rows[:, :-1]], axis=1)
        counts = np.bincount(rows[first & (rows >= 0)])
    return counts[counts > 0] / len(labels)


def _expected(shares: NDArray[np.float64], draws: int) -> float:
    """The expected number of classes among `draws` samples."""
    return float((1 - (1 - shares) ** draws).sum())
