"""Streams of micro-batches: samples are read, decoded and augmented in threads and delivered in step order."""

from collections.abc import Callable, Container, Generator, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from data.dataset import Dataset
from data.errors import DataError
from data.images.augment import EvaluationTransform, TrainTransform
from data.images.decode import DecodeError, Pixels, decode, decode_window
from data.images.jpeg_region import RegionDecoder, find_region_decoder
from data.images.random_erasing import ErasedRectangle
from data.order import SampleOrder, Samples, evaluation_positions
from data.ordered_results import results_in_order
from data.prefetch import evaluation_shards, prefetched_steps
from data.random_streams import RandomStream
from data.remote.cache import Cache
from data.sample_reader import SampleReader
from data.shard import BrokenSample

WHOLE_EVERY = 16
"""In one of so many epochs, the whole of a picture is decoded, so that damage since the shards were indexed is found
which its crops do not show. That costs a sixteenth of what decoding crops saves."""

_MAX_TRIED = 200  # samples of a shard; if a tenth of them can be used, all of these are unusable once in 10^9 times


class _Excluded(BrokenSample):
    """A sample that the recipe leaves out."""


@dataclass(frozen=True, slots=True)
class SkippedSample:
    """A sample that is not used: its position in the micro-batch, its shard, its key, and the reason."""

    position: int
    shard: str
    key: str
    reason: str
    excluded: bool = False
    """Whether the recipe leaves it out; otherwise it is unusable."""


class SampleOrigin(NamedTuple):
    """The origin of a sample of a micro-batch."""

    epoch: int
    id: int
    """Of the sample in the order, its id in the index."""
    shard: str
    key: str
    """Of the sample that was read: the same one, unless that is unusable."""


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """m samples with up to k classes each, and the samples that were skipped."""

    images: Pixels
    """(m, S, S, 3) uint8."""
    labels: NDArray[np.int64]
    """(m, k), ascending, padded with -1."""
    weights: NDArray[np.float32]
    """(m,)"""
    skipped: list[SkippedSample]
    origins: list[SampleOrigin]
    """(m,) of the samples that were read; in an evaluation all in epoch 0, the padding too."""
    erased: list[tuple[int, ErasedRectangle]] = field(default_factory=list)
    """Positions in the micro-batch and what to erase there once the images are normalized."""


_View = Callable[[bytes], Pixels]
"""An encoded image to network input, (S, S, 3) uint8; raises a DecodeError."""

AllocatePixels = Callable[[tuple[int, ...]], Pixels]
"""Makes pixels with undefined values: (shape) -> uint8."""


def new_pixels(shape: tuple[int, ...]) -> Pixels:
    """Pixels in ordinary memory, with undefined values."""
    return np.empty(shape, np.uint8)


class RankShare(NamedTuple):
    """The share of every step's samples that one rank reads, in micro-batches."""

    rank: int
    world_size: int
    micro_batch: int


def training_stream(
    dataset: Dataset,
    order: SampleOrder,
    transform: TrainTransform,
    share: RankShare,
    *,
    first_step: int,
    workers: int,
    cache: Cache | None = None,
    allocate: AllocatePixels = new_pixels,
    excluded: Container[str] = (),
    regions: RegionDecoder | None = None,
) -> Generator[MicroBatch]:
    """One rank's endless micro-batches, starting with those of step `first_step`, in memory from `allocate`.

    The pixels of a sample depend on (seed, epoch, sample id) only. A sample that is unusable, or among the `excluded`
    ones (`shard/key`), is replaced by another one of its shard, drawn by the same three numbers, and reported in the
    micro-batch. Where the index says that every image decodes, the crop alone is decoded of a JPEG, by `regions` or
    what `find_region_decoder` finds, and in one epoch of `WHOLE_EVERY` the whole.

    Raises:
        DataError: shards are missing or damaged, none of the samples drawn from a shard is usable, or the environment
            names a libturbojpeg that cannot be used.
        StorageDown: remote shards cannot be downloaded.
    """
    size = order.batch // share.world_size
    positions = range(share.rank * size, (share.rank + 1) * size, share.micro_batch)
    prefetched = prefetched_steps(len(positions), workers)

    regions = (regions or find_region_decoder()) if dataset.index.images_decode else None
    concurrent_shards = order.shards_ahead(first_step, positions.start, positions.stop, prefetched + 1)[0]

    # Twice, since lanes do not reach their next windows together.
    with closing(SampleReader(dataset, cache, 16 + 2 * len(concurrent_shards))) as reader:

        def load(step: int, start: int) -> MicroBatch:
            samples = order.at(step, start, start + share.micro_batch)
            return _load_training(reader, samples, transform, order.seed, allocate, excluded, regions)

        def tasks() -> Iterator[Callable[[], MicroBatch]]:
            step = first_step
            while True:
                if reader.is_remote:
                    oldest = max(first_step, step - prefetched)
                    reader.request(*order.shards_ahead(oldest, positions.start, positions.stop, step + 1 - oldest))
                for start in positions:
                    yield lambda step=step, start=start: load(step, start)  # type: ignore[misc]
                step += 1

        yield from results_in_order(tasks(), workers, reader.stop)


def evaluation_stream(
    dataset: Dataset,
    transform: EvaluationTransform,
    share: RankShare,
    *,
    workers: int,
    cache: Cache | None = None,
) -> Generator[MicroBatch]:
    """One rank's share of all samples: each has weight 1 on exactly one rank; padding has weight 0.

    An unusable sample gets weight 0 and is reported.

    Raises:
        DataError: shards are missing or damaged.
        StorageDown: remote shards cannot be downloaded.
    """
    ends = np.cumsum(dataset.shard_samples)
    per_pass = share.micro_batch * share.world_size
    ids, weights = evaluation_positions(dataset.samples, *share)

    def view(encoded: bytes) -> Pixels:
        return transform(decode(encoded))

    with closing(SampleReader(dataset, cache)) as reader:

        def load(row: int) -> MicroBatch:
            images = np.zeros((share.micro_batch, transform.size, transform.size, 3), np.uint8)
            labels = np.full((share.micro_batch, dataset.labels_per_sample), -1, np.int64)
            weight, skipped, origins = weights[row].copy(), list[SkippedSample](), list[SampleOrigin]()
            for position, sample in enumerate(ids[row].tolist()):
                shard = int(np.searchsorted(ends, sample, side="right"))
                name = dataset.index.shards[shard].name
                try:
                    number = int(sample - (ends[shard] - dataset.shard_samples[shard]))
                    key, images[position], classes = _viewed(reader, shard, number, view)
                    labels[position, : len(classes)] = classes
                except BrokenSample as error:
                    key = error.key
                    if weight[position]:
                        skipped.append(SkippedSample(position, name, key, str(error)))
                    weight[position] = 0.0
                origins.append(SampleOrigin(0, sample, name, key))
            return MicroBatch(images, labels, weight, skipped, origins)

        def tasks() -> Iterator[Callable[[], MicroBatch]]:
            for row in range(len(ids)):
                if reader.is_remote:
                    reader.request(*evaluation_shards(dataset, row, per_pass, workers))
                yield lambda row=row: load(row)  # type: ignore[misc]

        yield from results_in_order(tasks(), workers, reader.stop)


def _load_training(
    reader: SampleReader,
    samples: Samples,
    transform: TrainTransform,
    seed: int,
    allocate: AllocatePixels,
    excluded: Container[str],
    regions: RegionDecoder | None,
) -> MicroBatch:
    size = len(samples.id)
    images = allocate((size, transform.size, transform.size, 3))
    labels = np.full((size, reader.dataset.labels_per_sample), -1, np.int64)
    skipped: list[SkippedSample] = []
    origins = []
    for position in range(size):
        shard, number = int(samples.shard[position]), int(samples.place[position])
        epoch, sample = int(samples.epoch[position]), int(samples.id[position])
        view = partial(training_view, transform=transform, seed=seed, epoch=epoch, sample=sample, regions=regions)
        try:
            key, pixels, classes = _viewed(reader, shard, number, view, excluded)
        except BrokenSample as error:
            left_out, name = isinstance(error, _Excluded), reader.dataset.index.shards[shard].name
            skipped.append(SkippedSample(position, name, error.key, str(error), left_out))
            draw = RandomStream.REPLACEMENT.generator(seed, epoch, sample)
            key, pixels, classes = _replacement(reader, shard, number, draw, error, view, excluded)
        labels[position, : len(classes)] = classes
        images[position] = pixels
        origins.append(SampleOrigin(epoch, sample, reader.dataset.index.shards[shard].name, key))
    erased = erased_rectangles(transform, seed, [(origin.epoch, origin.id) for origin in origins])
    return MicroBatch(images, labels, np.ones(size, np.float32), skipped, origins, erased)


def training_view(
    encoded: bytes, transform: TrainTransform, seed: int, epoch: int, sample: int, regions: RegionDecoder | None
) -> Pixels:
    """What training sees of an image, (S, S, 3) uint8, as sample `sample` of `epoch`; without `regions` from the whole.

    Raises:
        DecodeError: it is damaged or refused.
    """
    rng = RandomStream.AUGMENTATION.generator(seed, epoch, sample)
    whole = (seed + epoch + sample) % WHOLE_EVERY == 0
    crop = decode_window(encoded, partial(transform.window, rng=rng), None if whole else regions)
    return transform.view(crop, rng)


def erased_rectangles(
    transform: TrainTransform, seed: int, samples: Iterable[tuple[int, int]]
) -> list[tuple[int, ErasedRectangle]]:
    """What is erased of a micro-batch's `samples`, each an epoch and an id in the index; with positions among them."""
    if transform.random_erasing is None:
        return []
    return [
        (position, found)
        for position, (epoch, sample) in enumerate(samples)
        for found in transform.random_erasing.rectangles(
            transform.size, RandomStream.ERASING.generator(seed, epoch, sample)
        )
    ]


def _replacement(
    reader: SampleReader,
    shard: int,
    number: int,
    draw: np.random.Generator,
    broken: BrokenSample,
    view: _View,
    excluded: Container[str],
) -> tuple[str, Pixels, tuple[int, ...]]:
    """Key, view and classes of a usable sample of `shard` in place of the `broken` sample `number`.

    The other samples are tried in an order that is drawn: of a row of broken samples, each gets another replacement.
    """
    size = int(reader.dataset.shard_samples[shard])
    others = draw.permutation(size)
    others = others[others != number][: _MAX_TRIED - 1]
    for other in others.tolist():
        try:
            return _viewed(reader, shard, other, view, excluded)
        except BrokenSample as error:
            broken = error
    raise DataError(
        f"shard {reader.dataset.index.location(shard)}: {1 + len(others):,} of its {size:,} samples were tried and all "
        f"are unusable (last: {broken.key}, {broken}); copy it again or rebuild it"
    )


def _viewed(
    reader: SampleReader, shard: int, number: int, view: _View, excluded: Container[str] = ()
) -> tuple[str, Pixels, tuple[int, ...]]:
    """Key, view and classes of sample `number` of `shard`."""
    sample = reader.read(shard, number)
    if excluded and f"{reader.dataset.index.shards[shard].name}/{sample.key}" in excluded:
        raise _Excluded(sample.key, "the recipe excludes it (data.excluded_samples)")
    try:
        return sample.key, view(sample.image), sample.labels
    except DecodeError as error:
        raise BrokenSample(sample.key, str(error)) from None
