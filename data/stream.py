"""Micro-batches from shards: read, decode and augment in threads, delivered in the order of the steps."""

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from data.augment import EvaluationTransform, TrainTransform
from data.decode import DecodeError, Pixels, decode
from data.errors import DataError
from data.index import ShardIndex
from data.order import SampleOrder, Samples, evaluation_positions
from data.shard import OpenShards

_AUGMENTATION = 3  # keeps these draws apart from those of data/order.py
_TRIES = 100  # neighbours tried for a sample that does not decode


@dataclass(frozen=True, slots=True)
class Skipped:
    """A sample that could not be decoded: its shard, key and the decoder's words."""

    shard: str
    key: str
    reason: str


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """m samples: images (m, S, S, 3) uint8, labels (m,) int64, weights (m,) float32, and what was skipped."""

    images: Pixels
    labels: NDArray[np.int64]
    weights: NDArray[np.float32]
    skipped: list[Skipped]


def training_stream(
    index: ShardIndex,
    order: SampleOrder,
    transform: TrainTransform,
    *,
    micro_batch: int,
    rank: int,
    world_size: int,
    first_step: int,
    workers: int,
) -> Iterator[MicroBatch]:
    """One rank's micro-batches of step `first_step`, then of the next step, without end.

    A sample's pixels depend on (seed, epoch, sample id) alone. One that does not decode is replaced by the next of
    its shard that does, and reported in the micro-batch.
    """
    shards = OpenShards(index)
    share = order.batch // world_size

    def load(step: int, start: int) -> MicroBatch:
        samples = order.at(step, start, start + micro_batch)
        return _load_training(shards, samples, transform, order.seed)

    def tasks() -> Iterator[Callable[[], MicroBatch]]:
        step = first_step
        while True:
            for start in range(rank * share, (rank + 1) * share, micro_batch):
                yield lambda step=step, start=start: load(step, start)  # type: ignore[misc]
            step += 1

    return _in_order(tasks(), workers)


def evaluation_stream(
    index: ShardIndex, transform: EvaluationTransform, *, micro_batch: int, rank: int, world_size: int, workers: int
) -> Iterator[MicroBatch]:
    """One rank's share of all samples, each with weight 1 on one rank, filled up with weight 0.

    A sample that does not decode gets weight 0 and is reported.
    """
    shards = OpenShards(index)
    sizes = np.array([shard.samples for shard in index.shards], np.int64)
    ends = np.cumsum(sizes)
    ids, weights = evaluation_positions(index.samples, rank, world_size, micro_batch)

    def load(row: int) -> MicroBatch:
        images, labels, skipped = [], [], list[Skipped]()
        weight = weights[row].copy()
        for column, sample in enumerate(ids[row]):
            number = int(np.searchsorted(ends, sample, side="right"))
            encoded = shards[number].read(int(sample - (ends[number] - sizes[number])))
            try:
                images.append(transform(decode(encoded.image)))
            except DecodeError as error:
                images.append(np.zeros((transform.size, transform.size, 3), np.uint8))
                skipped += [Skipped(index.shards[number].name, encoded.key, str(error))] if weight[column] else []
                weight[column] = 0.0
            labels.append(encoded.label)
        return MicroBatch(np.stack(images), np.array(labels, np.int64), weight, skipped)

    return _in_order((lambda row=row: load(row) for row in range(len(ids))), workers)  # type: ignore[misc]


def _load_training(shards: OpenShards, samples: Samples, transform: TrainTransform, seed: int) -> MicroBatch:
    size = len(samples.id)
    images = np.empty((size, transform.size, transform.size, 3), np.uint8)
    labels = np.empty(size, np.int64)
    skipped: list[Skipped] = []
    for position in range(size):
        pixels, labels[position] = _read_decodable(
            shards, int(samples.shard[position]), int(samples.place[position]), skipped
        )
        rng = np.random.default_rng([seed, _AUGMENTATION, int(samples.epoch[position]), int(samples.id[position])])
        images[position] = transform(pixels, rng)
    return MicroBatch(images, labels, np.ones(size, np.float32), skipped)


def _read_decodable(shards: OpenShards, number: int, place: int, skipped: list[Skipped]) -> tuple[Pixels, int]:
    entry = shards.index.shards[number]
    shard = shards[number]
    for attempt in range(min(entry.samples, _TRIES)):
        sample = shard.read((place + attempt) % entry.samples)
        try:
            return decode(sample.image), sample.label
        except DecodeError as error:
            skipped.append(Skipped(entry.name, sample.key, str(error)))
    raise DataError(
        f"shard {shards.index.location(number)}: {min(entry.samples, _TRIES)} samples in a row do not decode "
        f"(last: {skipped[-1].key}, {skipped[-1].reason}); copy it again or rebuild it"
    )


def _in_order(tasks: Iterator[Callable[[], MicroBatch]], workers: int) -> Iterator[MicroBatch]:
    """Run `tasks` in threads, a few ahead of the reader, and yield their results in order."""
    executor = ThreadPoolExecutor(workers, thread_name_prefix="reader")
    pending: deque[Future[MicroBatch]] = deque()
    try:
        for task in tasks:
            pending.append(executor.submit(task))
            if len(pending) > 2 * workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        executor.shutdown(wait=True, cancel_futures=True)
