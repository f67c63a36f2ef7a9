"""What follows from a stage, its data and the number of ranks, worked out and checked before anything runs."""

import math
import os
import shutil
from dataclasses import dataclass

import numpy as np

from data.errors import DataError
from data.index import ShardIndex, check_shards, read_index
from data.order import SampleOrder
from pipeline.errors import ConfigError
from pipeline.recipe import Model, Recipe, Stage, TrainStage
from pipeline.schedule import learning_rate


@dataclass(frozen=True)
class Plan:
    """A stage ready to run."""

    name: str
    seed: int
    stage: Stage
    validation: ShardIndex

    @property
    def classes(self) -> tuple[str, ...]:
        return self.validation.classes


@dataclass(frozen=True)
class TrainPlan(Plan):
    """A training stage ready to run."""

    stage: TrainStage
    train: ShardIndex
    order: SampleOrder
    steps: int
    """Optimizer steps of the whole stage."""
    warmup_steps: int

    def learning_rate(self, step: int) -> float:
        """The rate of step `step`, from 0."""
        settings = self.stage.optimizer
        return learning_rate(
            step,
            steps=self.steps,
            warmup_steps=self.warmup_steps,
            peak=settings.peak_learning_rate,
            minimum=settings.minimum_learning_rate,
            schedule=settings.schedule,
        )


def plan_stage(recipe: Recipe, name: str, world_size: int | None = None) -> Plan:
    """The plan of stage `name` on `world_size` ranks, by default those of the recipe.

    Raises:
        ConfigError: an unknown stage, model or option, a missing compiler, a picture size that the model
            cannot take, ranks that do not divide the micro-batches, lanes that do not fit, or an earlier stage with
            another model.
        DataError: shards that are absent or not whole.
    """
    if name not in recipe.stages:
        raise ConfigError(f"recipe {recipe.name} has no stage {name}; its stages are {', '.join(recipe.stages)}")
    stage = recipe.stages[name]
    where = f"stage {name}: "
    _check_model(recipe, stage, where)
    if isinstance(stage, TrainStage) and stage.compile:
        _check_compiler(where)
    world_size = world_size or stage.resources.ranks
    validation = read_index(stage.data.validation)
    check_shards(validation)
    if not isinstance(stage, TrainStage):
        return Plan(name, recipe.seed, stage, validation)
    if stage.batch.micro_batches % world_size:
        raise ConfigError(
            f"{where}{world_size} ranks do not divide the {stage.batch.micro_batches} micro-batches of a step "
            f"(global_size {stage.batch.global_size} / micro_size {stage.batch.micro_size}); "
            "change resources.ranks or batch"
        )
    assert stage.data.train is not None
    train = read_index(stage.data.train)
    check_shards(train)
    if train.classes != validation.classes:
        raise ConfigError(
            f"{where}the classes of {train.folder} and {validation.folder} differ "
            f"({len(train.classes)} and {len(validation.classes)}); build both from one source"
        )
    try:
        order = SampleOrder(
            shard_samples=np.array([shard.samples for shard in train.shards], np.int64),
            seed=recipe.seed,
            batch=stage.batch.global_size,
            lanes=stage.data.lanes,
            window=stage.data.shuffle_window,
        )
    except DataError as error:
        raise ConfigError(f"{where}data.lanes: {error}") from None
    steps_per_epoch = train.samples / stage.batch.global_size
    steps = stage.steps or math.ceil((stage.epochs or 0.0) * steps_per_epoch)
    optimizer = stage.optimizer
    warmup_steps = optimizer.warmup_steps or round((optimizer.warmup_epochs or 0.0) * steps_per_epoch)
    if warmup_steps >= steps:
        raise ConfigError(
            f"{where}optimizer: the warm-up of {warmup_steps} steps fills the stage's {steps}; shorten it"
        )
    return TrainPlan(name, recipe.seed, stage, validation, train, order, steps, warmup_steps)


def _check_model(recipe: Recipe, stage: Stage, where: str) -> None:
    try:
        variant = stage.model.variant
    except ValueError as error:
        raise ConfigError(f"{where}model: {error}") from None
    if stage.resolution % variant.stride:
        lower = max(variant.stride, stage.resolution // variant.stride * variant.stride)
        raise ConfigError(
            f"{where}resolution: {stage.resolution} is no multiple of {variant.stride}, as {stage.model.name} needs; "
            f"{lower} is"
        )
    if stage.start_from is not None and recipe.stages[stage.start_from].model.variant != variant:
        other = recipe.stages[stage.start_from].model
        raise ConfigError(
            f"{where}model: {_described(stage.model)} cannot start from stage {stage.start_from}, which trains "
            f"{_described(other)}; use one model"
        )


def _check_compiler(where: str) -> None:
    # Torch writes C++ for CPUs, and C for the launchers of its GPU kernels.
    names = [os.environ.get("CXX"), os.environ.get("CC"), "g++", "gcc", "clang++", "clang", "cc"]
    if not any(name and shutil.which(name) for name in names):
        raise ConfigError(
            f"{where}compile: torch.compile needs a C++ compiler and there is none on PATH; "
            "install one (on Debian: apt-get install g++) or leave compile out"
        )


def _described(model: Model) -> str:
    options = ", ".join(f"{name} {value}" for name, value in model.options.items())
    return f"{model.name} ({options})" if options else model.name
