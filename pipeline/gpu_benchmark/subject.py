"""What is measured: a training stage as one rank of it computes, on noise instead of its shards."""

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from pydantic import ValidationError

from data.dataset import Dataset
from data.index import LabelFormat, ShardEntry, ShardIndex
from data.stream import MicroBatch
from pipeline.errors import ConfigError
from pipeline.plan import TrainPlan, train_plan
from pipeline.ranks.device_settings import prepare_devices
from pipeline.ranks.distributed import Ranks, join_ranks
from pipeline.recipe.schema import Recipe, TrainStage
from pipeline.runs.settings_history import NO_CHANGES
from pipeline.training.pixels import pixel_allocator

MOST_ROUNDS = 4
"""Micro-batches of a step, at most: their number adds time to a step, and nothing new."""
_STEPS = 100_000
_WARM_UP = 10_000  # so that weights move as at the beginning of a run
_SHARDS, _KEPT = 64, 4


@dataclass(frozen=True, slots=True)
class MeasuredStage:
    """A stage to be measured on one rank; `data.files.json_records` reads it from JSON.

    Args:
        recipe: all settings as plain values, resolved.
        stage: name of the training stage.
        classes: of its data.
        changes: settings of the stage that replace those of the recipe.
        micro_size: in place of the recipe's.
        rounds: micro-batches of a step.
    """

    recipe: Mapping[str, Any]
    stage: str
    classes: int
    rounds: int
    changes: Mapping[str, Any] = field(default_factory=dict)
    micro_size: int | None = None

    @property
    def uses_gpus(self) -> bool:
        """Whether the ranks of the stage use GPUs where there are any."""
        return bool(self.recipe["stages"][self.stage]["resources"]["gpus_per_rank"])

    def plan(self) -> TrainPlan:
        """The plan of the stage for a single rank.

        Raises:
            ConfigError: the changes contradict the other settings.
        """
        recipe = Recipe.model_validate(self.recipe)
        stage = recipe.stages[self.stage]
        assert isinstance(stage, TrainStage)
        micro = self.micro_size or stage.batch.micro_size
        settings = stage.model_dump(mode="json") | {
            "start_from": None,
            "epochs": None,
            "steps": _STEPS,
            "batch": {"global_size": micro * self.rounds, "micro_size": micro},
        }
        settings["optimizer"] |= {"warmup_steps": _WARM_UP, "warmup_epochs": None}
        settings["data"] |= {"lanes": None}
        settings["resources"] |= {"nodes": 1, "ranks": 1}
        try:
            changed = TrainStage.model_validate(settings | dict(self.changes))
        except ValidationError as error:
            raise ConfigError(error.errors()[0]["msg"].removeprefix("Value error, ")) from None
        alone = recipe.model_copy(update={"stages": {self.stage: changed}})
        noise = _noise_dataset(self.classes, changed.batch.global_size)
        return train_plan(alone, self.stage, noise, noise, NO_CHANGES)


def rounds_of(stage: TrainStage) -> int:
    """Micro-batches of a step on each rank of a stage."""
    return stage.batch.micro_batches // stage.resources.ranks


def join(plan: TrainPlan) -> Ranks:
    """Set up this process as the one rank of a stage, as a start of the stage would."""
    resources = plan.stage.resources
    on_gpus = resources.gpus_per_rank > 0
    prepare_devices(gpus=on_gpus, deterministic=plan.stage.deterministic)
    return join_ranks(resources.threads_per_rank, gpus=on_gpus)


def noise(plan: TrainPlan, device: torch.device) -> Iterator[MicroBatch]:
    """Micro-batches without end, of pixels and labels by the recipe's seed: a few of them, again and again, made before
    the first is taken, in memory from which `device` copies them as in training."""
    rng, stage = np.random.default_rng(plan.seed), plan.stage
    size, micro = stage.resolution, stage.batch.micro_size
    allocate, kept = pixel_allocator(device), []
    for _ in range(_KEPT):
        pixels = allocate((micro, size, size, 3))
        pixels[:] = rng.integers(0, 256, pixels.shape, np.uint8)
        labels = rng.integers(0, len(plan.classes), (micro, 1))
        kept.append(MicroBatch(pixels, labels, np.ones(micro, np.float32), [], []))
    return itertools.cycle(kept)


def noise_images(plan: TrainPlan, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """(m, S, S, 3) normal noise on the device, as images that are normalized."""
    size, micro = plan.stage.resolution, plan.stage.batch.micro_size
    return torch.randn(micro, size, size, 3, device=device).to(dtype)


def _noise_dataset(classes: int, batch: int) -> Dataset:
    """A dataset that is only described: none of its shards exists, and none is read."""
    samples = max(1000, batch)
    shards = tuple(ShardEntry(f"{n:02d}.tar", samples, 1024 * samples, "0" * 64) for n in range(_SHARDS))
    names = tuple(str(number) for number in range(classes))
    return Dataset(ShardIndex("noise", names, ("jpg",), LabelFormat(), shards))
