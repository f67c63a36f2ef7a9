"""SPDL: a pipeline of threads over a folder of files, with FFmpeg's decoder and filters; RandAugment is Pillow's."""

import itertools
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import spdl.io
import torch
from spdl.pipeline import PipelineBuilder

from benchmarks.loaders.task import AREA, BATCH, SIZE, Images, augmented_with_pillow
from data.images.augment import random_window
from data.images.decode import Pixels


def prepare(folder: Path) -> None:
    """Decode an image.

    Raises:
        ImportError: FFmpeg's libraries, which are loaded only now, are not installed.
    """
    try:
        _crop(next(_paths(folder / "images")), augmented=False)
    except RuntimeError as error:
        raise ImportError(str(error)) from error


def batches(folder: Path, workers: int, augmented: bool) -> Images:
    pipeline = (
        PipelineBuilder()
        .add_source(_paths(folder / "images"))
        .pipe(partial(_crop, augmented=augmented), concurrency=workers)
        .aggregate(BATCH)
        .pipe(_batch)
        .add_sink(3)
        .build(num_threads=workers)
    )
    with pipeline.auto_stop():
        yield from pipeline.get_iterator()


def _paths(folder: Path) -> Iterator[str]:
    paths = [str(path) for path in sorted(folder.rglob("*.jpg"))]
    rng = np.random.default_rng()
    for _ in itertools.count():
        yield from (paths[number] for number in rng.permutation(len(paths)))


def _crop(path: str, augmented: bool) -> Pixels:
    rng = np.random.default_rng()
    packets = spdl.io.demux_image(path)
    rows, columns = random_window(packets.height, packets.width, AREA, rng)
    width, height = columns.stop - columns.start, rows.stop - rows.start
    filters = [f"crop={width}:{height}:{columns.start}:{rows.start}:exact=1", f"scale={SIZE}:{SIZE}:flags=bilinear"]
    if rng.random() < 0.5:
        filters.append("hflip")
    frames = spdl.io.decode_packets(packets, filter_desc=",".join([*filters, "format=rgb24"]))
    pixels: Pixels = np.array(spdl.io.to_numpy(spdl.io.convert_frames(frames)))
    return augmented_with_pillow(pixels) if augmented else pixels


def _batch(crops: list[Pixels]) -> torch.Tensor:
    return torch.from_numpy(np.stack(crops))
