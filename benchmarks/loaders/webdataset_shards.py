"""webdataset as in its documentation: shards and samples shuffled, batches made in worker processes."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
import webdataset

from benchmarks.loaders import ours
from benchmarks.loaders.task import BATCH, Images, with_opencv, with_pillow
from data.images.decode import decode


def batches_with_pillow(folder: Path, workers: int, augmented: bool) -> Images:
    return _batches(folder, workers, partial(with_pillow, augmented=augmented))


def batches_with_opencv(folder: Path, workers: int, augmented: bool) -> Images:
    return _batches(folder, workers, partial(with_opencv, augmented=augmented))


def batches_with_our_transform(folder: Path, workers: int, augmented: bool) -> Images:
    return _batches(folder, workers, partial(_our_tensor, augmented=augmented))


def _batches(folder: Path, workers: int, to_tensor: Callable[[bytes], torch.Tensor]) -> Images:
    shards = [str(path) for path in sorted((folder / "shards").glob("*.tar"))]
    samples = (
        webdataset.WebDataset(shards, resampled=True, shardshuffle=False)
        .shuffle(1000)
        .to_tuple("jpg", "cls")
        .map_tuple(to_tensor, int)
        .batched(BATCH)
    )
    return (images for images, _ in webdataset.WebLoader(samples, num_workers=workers, batch_size=None))


def _our_tensor(encoded: bytes, augmented: bool) -> torch.Tensor:
    return torch.from_numpy(ours.transform(augmented)(decode(encoded), np.random.default_rng()))
