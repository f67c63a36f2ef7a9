"""Our reader: threads, and the order of a run."""

from pathlib import Path

from benchmarks.loaders.task import BATCH, LAYERS, MAGNITUDE, SIZE, Images
from data.dataset import Dataset
from data.images.augment import TrainTransform
from data.images.random_augment import RandomAugment
from data.index import read_index
from data.order import SampleOrder
from data.stream import RankShare, training_stream


def batches(folder: Path, workers: int, augmented: bool) -> Images:
    dataset = Dataset(read_index(folder / "shards"))
    # Few samples make few lanes: about as many for each shard as a large run has.
    order = SampleOrder(shard_samples=dataset.shard_samples, seed=0, batch=4 * BATCH, lanes=4, window=8192)
    stream = training_stream(
        dataset, order, transform(augmented), RankShare(0, 1, BATCH), first_step=0, workers=workers
    )  # fmt: skip
    return (batch.images for batch in stream)


def transform(augmented: bool) -> TrainTransform:
    return TrainTransform(SIZE, random_augment=RandomAugment(LAYERS, MAGNITUDE) if augmented else None)
