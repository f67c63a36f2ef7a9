"""Whether a node can feed its ranks: what its readers deliver, where their time goes, and what training needs."""

import contextlib
import itertools
import json
import os
import subprocess
import sys
import time
from contextlib import closing
from dataclasses import astuple, dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data.errors import DataError
from data.files.child_process import own_packages_first, python_module
from data.images.decode import DecodeError, decode_window
from data.images.jpeg_region import find_region_decoder
from data.sample_reader import SampleReader
from data.shard import BrokenSample
from models.complexity import count_training_cost
from pipeline.plan import TrainPlan, plan_stage
from pipeline.ranks.gpus import PEAKS
from pipeline.recipe.loader import load_recipe
from pipeline.recipe.schema import TrainStage
from pipeline.training.training_batches import open_stream, train_transform

_WARM_UP = 2  # micro-batches: shards are opened, queues filled


@dataclass(frozen=True, slots=True)
class LoaderThroughput:
    """What the readers of all ranks of a node deliver in total."""

    images_per_second: float
    images_per_cpu_second: float
    skipped: int


@dataclass(frozen=True, slots=True)
class LoaderCosts:
    """Milliseconds of one core for one image."""

    reading: float
    decoding: float
    cropping: float
    random_augment: float
    color_jitter: float
    random_erasing: float

    @property
    def total(self) -> float:
        return float(sum(astuple(self)))


def demand(stage: TrainStage, device: str, utilization: float) -> float:
    """Images per second that one `device`, a key of `PEAKS`, trains on at a share `utilization` of its peak."""
    return images_per_second(stage, PEAKS[device] * utilization)


def images_per_second(stage: TrainStage, operations_per_second: float) -> float:
    """Images per second of training at this speed.

    Blocks that activation checkpointing recomputes count as work; a multiply-add is two operations.
    """
    policy = stage.activation_checkpointing
    cost = count_training_cost(stage.model.variant, stage.resolution, policy=policy)
    return operations_per_second / (2 * cost.multiply_adds)


def time_parts(plan: TrainPlan, samples: int) -> LoaderCosts:
    """The time that one thread spends on a sample, by part: mean over the first `samples` usable samples of the run."""
    transform, spent, done = train_transform(plan), [0.0] * len(fields(LoaderCosts)), 0
    plain = replace(transform, random_augment=None, color_jitter=None, random_erasing=None)
    order, regions = plan.order, find_region_decoder() if plan.train.index.images_decode else None
    with closing(SampleReader(plan.train, plan.cache, open_shards=samples)) as reader:
        for step in range(-(-2 * samples // order.batch)):
            found = order.at(step, 0, order.batch)
            reader.request(sorted(set(found.shard.tolist())))
            for shard, place in zip(found.shard.tolist(), found.place.tolist(), strict=True):
                rng = np.random.default_rng(done)
                marks = [time.thread_time()]
                try:
                    sample = reader.read(shard, place)
                    marks.append(time.thread_time())
                    pixels = decode_window(sample.image, partial(plain.window, rng=rng), regions)
                except (BrokenSample, DecodeError):
                    continue
                marks.append(time.thread_time())
                pixels = plain.view(pixels, rng)
                marks.append(time.thread_time())
                for augment in (transform.random_augment, transform.color_jitter):
                    if augment:
                        pixels = augment(pixels, rng)
                    marks.append(time.thread_time())
                if transform.random_erasing:
                    transform.random_erasing.rectangles(transform.size, rng)
                marks.append(time.thread_time())
                spent = [a + b for a, b in zip(spent, np.diff(marks), strict=True)]
                done += 1
                if done == samples:
                    return LoaderCosts(*(1e3 * seconds / samples for seconds in spent))
    return LoaderCosts(*(1e3 * seconds / max(1, done) for seconds in spent))


def measure(
    recipe: Path, overrides: list[str], stage: str, ranks: int, world_size: int, seconds: float
) -> LoaderThroughput:
    """Run the readers of `ranks` ranks of this node concurrently, each in its own process as in training.

    Raises:
        DataError: one of them failed; the reason is on standard error.
    """
    arguments = [str(recipe), stage, str(world_size), str(seconds), *overrides]
    readers = [
        subprocess.Popen(
            python_module("pipeline.throughput", str(rank), *arguments),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | own_packages_first() | {"OMP_NUM_THREADS": "1"},
        )
        for rank in range(ranks)
    ]
    for reader in readers:
        assert reader.stdout is not None
        reader.stdout.readline()  # warm: all start to count at the same time
    answers = []
    for reader in readers:
        assert reader.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            reader.stdin.write("go\n")
            reader.stdin.flush()
    for reader in readers:
        answers.append(reader.communicate()[0])
        if reader.returncode:
            raise DataError(f"a reader failed with exit code {reader.returncode}; its error is above")
    counts = [json.loads(answer) for answer in answers]
    return LoaderThroughput(
        images_per_second=sum(count["images"] / count["seconds"] for count in counts),
        images_per_cpu_second=sum(c["images"] for c in counts) / max(1e-9, sum(c["cpu_seconds"] for c in counts)),
        skipped=sum(count["skipped"] for count in counts),
    )


def _read(rank: int, recipe: Path, stage: str, world_size: int, seconds: float, overrides: list[str]) -> dict[str, Any]:
    """Run one rank's reader for `seconds`, after a warm-up and a line on standard input."""
    torch.set_num_threads(1)
    plan = plan_stage(load_recipe(recipe, overrides), stage, world_size, look_at_shards=False)
    assert isinstance(plan, TrainPlan)
    images = skipped = 0
    with closing(open_stream(plan, rank, world_size, 0)) as stream:
        for _ in itertools.islice(stream, _WARM_UP):
            pass
        print("warm", flush=True)
        sys.stdin.readline()
        began, cpu_began = time.monotonic(), time.process_time()
        while time.monotonic() < began + seconds:
            batch = next(stream)
            images += len(batch.labels)
            skipped += len(batch.skipped)
        taken, cpu = time.monotonic() - began, time.process_time() - cpu_began
    return {"images": images, "skipped": skipped, "seconds": taken, "cpu_seconds": cpu}


if __name__ == "__main__":
    _, rank_text, recipe_path, stage_name, world_text, seconds_text, *changes = sys.argv
    print(
        json.dumps(_read(int(rank_text), Path(recipe_path), stage_name, int(world_text), float(seconds_text), changes))
    )
