"""Micro-batches from shards: read, decode and augment in threads, delivered in the order of the steps."""

from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from data.augment import EvaluationTransform, TrainTransform
from data.cache import Cache
from data.dataset import Dataset
from data.decode import DecodeError, Pixels, decode
from data.errors import DataError
from data.order import SampleOrder, Samples, evaluation_positions
from data.prefetch import evaluation_shards, steps_read_ahead
from data.random_streams import RandomStream
from data.sample_reader import SampleReader
from data.shard import BrokenSample

_TRIES = 100  # neighbours tried for a sample that cannot be used


@dataclass(frozen=True, slots=True)
class SkippedSample:
    """A sample that could not be used: its place in the micro-batch, its shard, its key, and why."""

    position: int
    shard: str
    key: str
    reason: str


class SampleOrigin(NamedTuple):
    """Where a sample of a training micro-batch comes from."""

    epoch: int
    id: int
    """The sample that the order names, by its id in the index."""
    shard: str
    key: str
    """The one that was used for it: the same, unless that is broken."""


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """m samples of up to k classes each, and what was skipped."""

    images: Pixels
    """(m, S, S, 3) uint8."""
    labels: NDArray[np.int64]
    """(m, k), ascending, filled up with -1."""
    weights: NDArray[np.float32]
    """(m,)"""
    skipped: list[SkippedSample]
    origins: list[SampleOrigin]
    """(m,) in training; empty in an evaluation, which reads in the order of the index."""


def training_stream(
    dataset: Dataset,
    order: SampleOrder,
    transform: TrainTransform,
    *,
    micro_batch: int,
    rank: int,
    world_size: int,
    first_step: int,
    workers: int,
    cache: Cache | None = None,
) -> Generator[MicroBatch]:
    """One rank's micro-batches of step `first_step`, then of the next step, without end.

    A sample's pixels depend on (seed, epoch, sample id) alone. One that cannot be used is replaced by the next of
    its shard that can, and reported in the micro-batch.

    Raises:
        DataError: shards that are missing or damaged, or no usable sample among `_TRIES` neighbours.
        StorageDown: remote shards that cannot be had.
    """
    share = order.batch // world_size
    positions = range(rank * share, (rank + 1) * share, micro_batch)
    behind = steps_read_ahead(len(positions), workers)

    at_a_time = order.shards_ahead(first_step, positions.start, positions.stop, behind + 1)[0]

    # Twice, since lanes do not come to their next windows together.
    with closing(SampleReader(dataset, cache, 16 + 2 * len(at_a_time))) as reader:

        def load(step: int, start: int) -> MicroBatch:
            return _load_training(reader, order.at(step, start, start + micro_batch), transform, order.seed)

        def tasks() -> Iterator[Callable[[], MicroBatch]]:
            step = first_step
            while True:
                if reader.cached:
                    oldest = max(first_step, step - behind)
                    now, ahead = order.shards_ahead(oldest, positions.start, positions.stop, step + 1 - oldest)
                    reader.cached.request(now, ahead)
                for start in positions:
                    yield lambda step=step, start=start: load(step, start)  # type: ignore[misc]
                step += 1

        yield from _in_order(tasks(), workers, reader)


def evaluation_stream(
    dataset: Dataset,
    transform: EvaluationTransform,
    *,
    micro_batch: int,
    rank: int,
    world_size: int,
    workers: int,
    cache: Cache | None = None,
) -> Generator[MicroBatch]:
    """One rank's share of all samples, each with weight 1 on one rank, filled up with weight 0.

    A sample that cannot be used gets weight 0 and is reported.

    Raises:
        DataError: shards that are missing or damaged.
        StorageDown: remote shards that cannot be had.
    """
    ends = np.cumsum(dataset.shard_samples)
    ids, weights = evaluation_positions(dataset.samples, rank, world_size, micro_batch)

    with closing(SampleReader(dataset, cache)) as reader:

        def load(row: int) -> MicroBatch:
            images = np.zeros((micro_batch, transform.size, transform.size, 3), np.uint8)
            labels = np.full((micro_batch, dataset.labels_per_sample), -1, np.int64)
            weight, skipped = weights[row].copy(), list[SkippedSample]()
            for position, sample in enumerate(ids[row]):
                shard = int(np.searchsorted(ends, sample, side="right"))
                try:
                    number = int(sample - (ends[shard] - dataset.shard_samples[shard]))
                    _, pixels, classes = _decoded(reader, shard, number)
                    images[position] = transform(pixels)
                    labels[position, : len(classes)] = classes
                except BrokenSample as error:
                    if weight[position]:
                        skipped.append(SkippedSample(position, dataset.index.shards[shard].name, error.key, str(error)))
                    weight[position] = 0.0
            return MicroBatch(images, labels, weight, skipped, [])

        def tasks() -> Iterator[Callable[[], MicroBatch]]:
            for row in range(len(ids)):
                if reader.cached:
                    reader.cached.request(*evaluation_shards(dataset, row, micro_batch * world_size, workers))
                yield lambda row=row: load(row)  # type: ignore[misc]

        yield from _in_order(tasks(), workers, reader)


def _load_training(reader: SampleReader, samples: Samples, transform: TrainTransform, seed: int) -> MicroBatch:
    size = len(samples.id)
    images = np.empty((size, transform.size, transform.size, 3), np.uint8)
    labels = np.full((size, reader.dataset.labels_per_sample), -1, np.int64)
    skipped: list[SkippedSample] = []
    origins = []
    for position in range(size):
        shard, number = int(samples.shard[position]), int(samples.place[position])
        epoch, sample = int(samples.epoch[position]), int(samples.id[position])
        key, pixels, classes = _usable(reader, shard, number, position, skipped)
        labels[position, : len(classes)] = classes
        images[position] = transform(pixels, RandomStream.AUGMENTATION.generator(seed, epoch, sample))
        origins.append(SampleOrigin(epoch, sample, reader.dataset.index.shards[shard].name, key))
    return MicroBatch(images, labels, np.ones(size, np.float32), skipped, origins)


def _usable(
    reader: SampleReader, shard: int, number: int, position: int, skipped: list[SkippedSample]
) -> tuple[str, Pixels, tuple[int, ...]]:
    """Sample `number` of `shard`, or the next of it that can be used: its key, pixels and classes."""
    size = int(reader.dataset.shard_samples[shard])
    for attempt in range(min(size, _TRIES)):
        try:
            return _decoded(reader, shard, (number + attempt) % size)
        except BrokenSample as error:
            skipped.append(SkippedSample(position, reader.dataset.index.shards[shard].name, error.key, str(error)))
    raise DataError(
        f"shard {reader.dataset.index.location(shard)}: {min(size, _TRIES)} samples in a row cannot be used "
        f"(last: {skipped[-1].key}, {skipped[-1].reason}); copy it again or rebuild it"
    )


def _decoded(reader: SampleReader, shard: int, number: int) -> tuple[str, Pixels, tuple[int, ...]]:
    sample = reader.read(shard, number)
    try:
        return sample.key, decode(sample.image), sample.labels
    except DecodeError as error:
        raise BrokenSample(sample.key, str(error)) from None


def _in_order(tasks: Iterator[Callable[[], MicroBatch]], workers: int, reader: SampleReader) -> Iterator[MicroBatch]:
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
        reader.stop()
        executor.shutdown(wait=True, cancel_futures=True)
