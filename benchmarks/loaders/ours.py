"""Our reader: threads, and the order of a run."""

from dataclasses import replace
from pathlib import Path

from benchmarks.loaders.task import BATCH, LAYERS, MAGNITUDE, SIZE, Images
from data.dataset import Dataset
from data.images.augment import TrainTransform
from data.images.jpeg_region import RegionDecoder
from data.images.random_augment import RandomAugment
from data.index import read_index
from data.order import SampleOrder
from data.stream import RankShare, training_stream


def batches(folder: Path, workers: int, augmented: bool) -> Images:
    return batches_of(folder / "shards", workers, augmented)


def batches_without_libturbojpeg(folder: Path, workers: int, augmented: bool) -> Images:
    return batches_of(folder / "shards", workers, augmented, regions=RegionDecoder())


def batches_of_whole_pictures(folder: Path, workers: int, augmented: bool) -> Images:
    return batches_of(folder / "shards", workers, augmented, crops_alone=False)


def batches_of(
    shards: Path, workers: int, augmented: bool, *, regions: RegionDecoder | None = None, crops_alone: bool = True
) -> Images:
    dataset = Dataset(replace(read_index(shards), images_decode=crops_alone))
    # Few samples make few lanes: about as many for each shard as a large run has.
    order = SampleOrder(shard_samples=dataset.shard_samples, seed=0, batch=4 * BATCH, lanes=4, window=8192)
    stream = training_stream(
        dataset, order, transform(augmented), RankShare(0, 1, BATCH), first_step=0, workers=workers, regions=regions
    )  # fmt: skip
    return (batch.images for batch in stream)


def transform(augmented: bool) -> TrainTransform:
    return TrainTransform(SIZE, random_augment=RandomAugment(LAYERS, MAGNITUDE) if augmented else None)
