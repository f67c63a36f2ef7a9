"""The plan of a stage: what follows from its settings, its data and the number of ranks, checked before it runs."""

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from data.dataset import Dataset, open_dataset
from data.errors import DataError
from data.index import check_shards
from data.order import SampleOrder, default_lanes
from data.prefetch import evaluation_need, prefetched_steps
from data.remote.cache import Cache
from data.remote.storage import Storage, is_remote
from pipeline.built_shards import check_built
from pipeline.compiler import check_compiler
from pipeline.errors import ConfigError
from pipeline.excluded_samples import check_excluded_samples
from pipeline.fused_kernels import check_fused_depthwise
from pipeline.model_check import check_model
from pipeline.recipe.intervals import CheckpointSettings, EvaluationSettings
from pipeline.recipe.schema import Recipe, Stage, TrainStage
from pipeline.runs.past_settings import recorded_history, stages_of_history
from pipeline.runs.settings_history import SettingsHistory
from pipeline.training.parts import Begun, continued_order, plan_part
from pipeline.training.schedule import LearningRate


@dataclass(frozen=True)
class Plan:
    """A stage ready to run."""

    name: str
    seed: int
    stage: Stage
    validation: Dataset
    cache: Cache

    @property
    def classes(self) -> tuple[str, ...]:
        return self.validation.classes

    @cached_property
    def model_arguments(self) -> dict[str, Any]:
        """What `create_model` takes for the stage's model, except what only training needs; JSON can hold it."""
        model = self.stage.model
        size = {"num_classes": len(self.classes), "image_size": self.stage.resolution}
        return {"name": model.name, **size, **model.options}


@dataclass(frozen=True)
class TrainPlan(Plan):
    """A training stage ready to run: its steps from `first_step` on, and those before by other plans."""

    stage: TrainStage
    train: Dataset
    order: SampleOrder
    steps: int
    """Optimizer steps of the whole stage."""
    warmup_steps: int
    rate: LearningRate
    until: int
    """Steps taken when its settings have been in force for the last time: `steps`, unless they were changed before."""
    first_step: int = 0
    """The first step, from 0, that is taken with its settings."""
    samples_before: int = 0
    """Samples of all steps before that one."""
    earlier: "TrainPlan | None" = None
    """The plan of the steps before, if the settings were changed at `first_step`."""

    @cached_property
    def parts(self) -> tuple["TrainPlan", ...]:
        """The plans of all steps until the end of this one, oldest first."""
        return (*(self.earlier.parts if self.earlier else ()), self)

    def at(self, step: int) -> "TrainPlan":
        """The plan of step `step`, from 0."""
        return next(part for part in reversed(self.parts) if part.first_step <= step)

    def learning_rate(self, step: int) -> float:
        """The learning rate of step `step`, from 0."""
        return self.at(step).rate.at(step)

    def samples_after(self, step: int) -> int:
        """Samples trained on in the first `step` steps."""
        part = self.at(step)
        return part.samples_before + (step - part.first_step) * part.stage.batch.global_size


def plan_stage(
    recipe: Recipe,
    name: str,
    world_size: int | None = None,
    *,
    look_at_shards: bool = True,
    history: SettingsHistory | None = None,
) -> Plan:
    """The plan of stage `name` on `world_size` ranks, by default those of the recipe.

    With `look_at_shards` every shard file is checked for, which one rank does for all; `history` as in `train_plan`.

    Raises:
        ConfigError: an unknown stage, model or option, a missing compiler, a fused convolution that cannot be had, an
            image size that the model does not support, ranks that do not divide the micro-batches, lanes that do not
            fit, an earlier stage with another model, or existing shards that were not built as the recipe says.
        DataError: shards that are missing or truncated.
        StorageDown: remote shards that cannot be reached at present.
    """
    if name not in recipe.stages:
        raise ConfigError(f"recipe {recipe.name} has no stage {name}; its stages are {', '.join(recipe.stages)}")
    stage = recipe.stages[name]
    where = f"stage {name}: "
    check_model(recipe, stage, where)
    if recipe.shards and look_at_shards:
        check_built(recipe.shards)
    if isinstance(stage, TrainStage):
        if stage.compile:
            check_compiler(where)
        check_fused_depthwise(stage, where)
    world_size = world_size or stage.resources.ranks
    storage = Storage(**stage.data.storage.model_dump())
    cache = stage_cache(stage)
    validation = open_stage_dataset(stage, "validation", where)
    if look_at_shards:
        check_shards(validation.index, storage)
    if not isinstance(stage, TrainStage):
        _check_cache_fits(cache, required_cache_bytes(stage, world_size, validation), where)
        return Plan(name, recipe.seed, stage, validation, cache)
    check_ranks(stage, world_size, where)
    train = open_stage_dataset(stage, "train", where)
    if look_at_shards:
        check_shards(train.index, storage)
    plan = train_plan(recipe, name, train, validation, history)
    _check_cache_fits(cache, required_cache_bytes(stage, world_size, validation, plan), where)
    return plan


def train_plan(
    recipe: Recipe, name: str, train: Dataset, validation: Dataset, history: SettingsHistory | None = None
) -> TrainPlan:
    """The plan of the training stage `name` on its datasets.

    Args:
        recipe: with the settings of now.
        name: of the stage.
        train, validation: its data.
        history: of the stage's settings; by default that of its run folder.

    Raises:
        ConfigError: training and validation classes differ, softmax over one class, lanes that do not fit, too few
            samples for a step, or the warm-up is too long. Or the settings cannot follow those before them.
    """
    stage, where = recipe.stages[name], f"stage {name}: "
    assert isinstance(stage, TrainStage)
    if train.classes != validation.classes:
        raise ConfigError(
            f"{where}the classes of {stage.data.train} and {stage.data.validation} differ "
            f"({len(train.classes):,} and {len(validation.classes):,}"
            f"{_first_difference(train.classes, validation.classes)}); build "
            "both with one class list, or map one to the other with data.label_map or data.validation_label_map; "
            "existing shards get that of others by: coatnet shards index PATTERN --classes FOLDER --overwrite"
        )
    if len(train.classes) == 1 and stage.loss.kind == "softmax":
        raise ConfigError(
            f"{where}loss.kind: {stage.data.train} has one class, {train.classes[0]}, and the softmax over one class "
            "is always 1, so the loss is 0 and nothing is learned; add samples of other classes, or use sigmoid"
        )
    check_excluded_samples(stage, train, where)
    if history is None:
        history = recorded_history(recipe, name)
    cache, plan, first = stage_cache(stage), None, 0
    for settings, until in stages_of_history(stage, history, where):
        order = (
            continued_order(plan.order, settings, first, where)
            if plan
            else sample_order(settings, recipe.seed, train.shard_samples, where)
        )
        check_length(settings, train.samples, where)
        begun = Begun(plan.stage, plan.rate, first, plan.samples_after(first)) if plan else None
        part = plan_part(settings, train.samples, begun, where)
        plan = TrainPlan(
            name, recipe.seed, settings, validation, cache, train, order, part.steps, part.warmup_steps, part.rate,
            part.steps if until is None else until, first, plan.samples_after(first) if plan else 0, plan,
        )  # fmt: skip
        first = plan.until
    assert plan is not None
    return _with_end(plan, plan.steps)


def _with_end(plan: TrainPlan, steps: int) -> TrainPlan:
    """The plan for a stage of so many steps in all, which is what its interval settings are about."""
    stage = with_intervals(plan.stage, steps, plan.train.samples / plan.stage.batch.global_size)
    return replace(plan, stage=stage, steps=steps, earlier=_with_end(plan.earlier, steps) if plan.earlier else None)


def check_length(stage: TrainStage, samples: int, where: str) -> None:
    """Check that neither an epoch nor the stage is shorter than a step.

    Raises:
        ConfigError: one is.
    """
    batch, epochs = stage.batch.global_size, stage.epochs
    if samples < batch:
        raise ConfigError(
            f"{where}batch.global_size: a step takes {batch:,} samples and {stage.data.train} has {samples:,}, so a "
            f"step would take some of them several times; set it to {samples:,} or less"
        )
    if epochs is not None and epochs * samples < batch:
        raise ConfigError(
            f"{where}epochs: {epochs:g} epochs of {samples:,} samples are {epochs * samples:,.0f} samples, less than "
            f"one step of {batch:,} (batch.global_size), so 0 complete steps; set epochs to "
            f"{math.ceil(100 * batch / samples) / 100:g} or more, or lower batch.global_size"
        )


def with_intervals(stage: TrainStage, steps: int, steps_per_epoch: float) -> TrainStage:
    """The stage of `steps` steps with the steps between its saves and between its evaluations.

    By default it evaluates about every tenth of its length, and right after a save where that is possible.
    """

    def in_steps(settings: CheckpointSettings | EvaluationSettings, otherwise: int) -> int:
        if settings.every_epochs is None:
            return settings.every_steps or otherwise
        return max(1, round(settings.every_epochs * steps_per_epoch))

    saves = in_steps(stage.checkpoint, stage.checkpoint.interval)
    tenth = max(1, round(steps / 10))
    evaluations = in_steps(stage.evaluation, round(tenth / saves) * saves or tenth)
    return stage.model_copy(
        update={
            "checkpoint": stage.checkpoint.model_copy(update={"every_steps": saves, "every_epochs": None}),
            "evaluation": stage.evaluation.model_copy(update={"every_steps": evaluations, "every_epochs": None}),
        }
    )


def sample_order(stage: TrainStage, seed: int, shard_samples: NDArray[np.int64], where: str) -> SampleOrder:
    """The order in which a stage trains on its samples; `shard_samples` (S,) has the samples of each shard.

    Raises:
        ConfigError: lanes that do not fit.
    """
    try:
        return SampleOrder(
            shard_samples=shard_samples,
            seed=seed,
            batch=stage.batch.global_size,
            lanes=stage.data.lanes or default_lanes(stage.batch.global_size, int(shard_samples.sum())),
            window=stage.data.shuffle_window,
        )
    except DataError as error:
        raise ConfigError(f"{where}data.lanes: {error}") from None


def open_stage_dataset(stage: Stage, part: Literal["train", "validation"], where: str) -> Dataset:
    """The training or validation samples of a stage.

    Raises:
        ConfigError: samples have several classes, and the loss takes one.
        DataError, StorageDown: as for `open_dataset`.
    """
    data = stage.data
    folder, label_map = data.validation, data.validation_label_map
    if part == "train":
        assert data.train is not None
        folder, label_map = data.train, data.label_map
    dataset = open_dataset(folder, Storage(**data.storage.model_dump()), label_map)
    if dataset.labels_per_sample > 1 and stage.loss.kind == "softmax":
        raise ConfigError(
            f"{where}loss.kind: samples of {folder} have up to {dataset.labels_per_sample} classes, and softmax "
            "takes one; use sigmoid"
        )
    return dataset


def check_ranks(stage: TrainStage, world_size: int, where: str) -> None:
    """Check that the ranks share the micro-batches of a step evenly.

    Raises:
        ConfigError: they do not.
    """
    if stage.batch.micro_batches % world_size:
        raise ConfigError(
            f"{where}{world_size} ranks do not divide the {stage.batch.micro_batches} micro-batches of a step "
            f"(global_size {stage.batch.global_size} / micro_size {stage.batch.micro_size}); "
            "change resources.ranks or batch"
        )


def stage_cache(stage: Stage) -> Cache:
    """The cache in which the nodes of a stage keep remote shards."""
    settings = stage.data.cache
    return Cache(Path(settings.folder), int(settings.gigabytes * 1e9), settings.downloads)


def required_cache_bytes(stage: Stage, world_size: int, validation: Dataset, plan: TrainPlan | None = None) -> int:
    """Bytes of remote shards that a node needs at the same time: for the evaluation, and for the training of `plan`."""
    need = 0
    if is_remote(validation.index.folder):
        need = evaluation_need(validation, stage.batch.micro_size * world_size, stage.data.workers)
    if plan is not None and is_remote(plan.train.index.folder):
        need += training_need(
            plan.stage, world_size, plan.order, np.array([shard.bytes for shard in plan.train.index.shards], np.int64)
        )
    return need


def training_need(stage: TrainStage, world_size: int, order: SampleOrder, shard_bytes: NDArray[np.int64]) -> int:
    """Bytes of shards that a node needs at the same time for training; `shard_bytes` (S,) are those of each shard."""
    return order.greatest_need(
        shard_bytes,
        world_size,
        ranks_per_node(stage, world_size),
        1 + prefetched_steps(stage.batch.micro_batches // world_size, stage.data.workers),
    )


def ranks_per_node(stage: TrainStage, world_size: int) -> int:
    """How many of `world_size` ranks share a node: as the launcher says, or otherwise the recipe."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", -(-world_size // stage.resources.nodes)))


def check_start_classes(plan: Plan, start: Plan) -> None:
    """Check that a stage that only evaluates does so on the classes of the stage that it starts from.

    Raises:
        ConfigError: it does not.
    """
    if not isinstance(plan, TrainPlan) and plan.classes != start.classes:
        raise ConfigError(
            f"stage {plan.name}: data.validation has other classes than stage {start.name}, which it evaluates "
            f"({len(plan.classes):,} and {len(start.classes):,}{_first_difference(plan.classes, start.classes)}); "
            "map them with data.validation_label_map, or evaluate on other shards"
        )


def _first_difference(classes: Sequence[str], others: Sequence[str]) -> str:
    for number, (one, other) in enumerate(zip(classes, others, strict=False)):
        if one != other:
            return f"; class {number} is {one} in one and {other} in the other"
    return ""


def check_cache_size(cache: Cache, need: int, where: str) -> None:
    """Check that a cache is allowed to hold the `need` bytes of shards that a node needs at the same time.

    Raises:
        ConfigError: it is not; the message has a sufficient size.
    """
    if need > cache.bytes:
        raise ConfigError(
            f"{where}data.cache.gigabytes: {cache.bytes / 1e9:g} is too little for the shards that a node needs at "
            f"the same time; set it to {math.ceil(need / 1e8) / 10:g}, or reduce data.shuffle_window"
        )


def _check_cache_fits(cache: Cache, need: int, where: str) -> None:
    """Check the size of the cache, and the free space of its disk."""
    check_cache_size(cache, need, where)
    if need:
        cache.make()
        room = cache.room_for_another_run()
        if room < need:
            raise ConfigError(
                f"{where}data.cache.folder: {cache.folder} has room for {max(0, room) / 1e9:.1f} GB of shards beside "
                f"those that running jobs read, and needs {need / 1e9:.1f}; use another disk, or reduce "
                "data.shuffle_window"
            )
