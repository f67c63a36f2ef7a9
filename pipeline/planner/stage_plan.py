"""The plan of a training stage on a cluster: its size, time, memory, cost and loads."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from data.order import default_lanes
from data.text.counted import counted
from pipeline.model_check import check_model
from pipeline.plan import check_length, check_ranks, with_intervals
from pipeline.planner.alternatives import Alternative, Recommendation, alternatives, recommend
from pipeline.planner.datasets import PlannedDataset
from pipeline.planner.failures.run_timing import RunTiming
from pipeline.planner.failures.save_interval import IntervalAdvice, best_interval
from pipeline.planner.failures.useful_time import UsefulTime, useful_time
from pipeline.planner.hardware import Cluster, figure_range
from pipeline.planner.ranges import Range
from pipeline.planner.stage_loads import (
    CheckpointLoad,
    LoaderLoad,
    ShardLoad,
    checkpoint_load,
    loader_load,
    shard_load,
)
from pipeline.planner.stage_memory import GpuMemory, gpu_memory, with_settings
from pipeline.planner.stage_timing import stage_timing
from pipeline.planner.step_estimate import (
    MeasuredSpeed,
    StepEstimate,
    estimate_step,
    multiply_adds_of,
    parameters_of,
)
from pipeline.recipe.schema import Recipe, TrainStage
from pipeline.training.parts import plan_part

_HOUR = 3600.0


@dataclass(frozen=True, slots=True)
class StageCost:
    """Of a whole stage, if nothing stops it; evaluations and starts are not counted."""

    hours: Range
    hours_with_failures: Range | None
    """With the first start, and what failures cost at their usual rate; None if they come so often that it never
    ends."""
    gpu_hours: Range
    energy: Range
    """Kilowatt-hours of the data centre."""
    price: Range | None
    """In the currency of the price that was given; None without one."""


@dataclass(frozen=True, slots=True)
class StagePlan:
    """What a training stage costs and needs."""

    recipe: str
    name: str
    stage: TrainStage
    """As in the recipe."""
    cluster: Cluster
    dataset: PlannedDataset
    parameters: int
    multiply_adds: int
    """Of a forward of one image."""
    steps: int
    step: StepEstimate
    memory: GpuMemory
    cost: StageCost
    loader: LoaderLoad
    shards: ShardLoad
    checkpoints: CheckpointLoad
    timing: RunTiming
    useful: UsefulTime
    """Of the time of the stage, with failures at their usual rate."""
    intervals: IntervalAdvice
    alternatives: tuple[Alternative, ...]
    recommended: Recommendation
    remarks: tuple[str, ...]
    """What is not counted, or does not hold, in sentences."""

    @property
    def is_measured(self) -> bool:
        """Whether a step of such a GPU was measured; otherwise times are estimates with a range."""
        return self.step.measured


@dataclass(frozen=True, slots=True)
class PlannedTime:
    """How long a stage takes, without what else it costs."""

    stage: TrainStage
    step: StepEstimate
    steps: int
    """Of the stage."""
    timing: RunTiming


def plan_time(
    recipe: Recipe, name: str, cluster: Cluster, dataset: PlannedDataset, measured: MeasuredSpeed | None = None
) -> PlannedTime:
    """The step, its number, and the timing of training stage `name`; arguments and errors as for `plan_cost`."""
    stage = recipe.stages[name]
    assert isinstance(stage, TrainStage)
    where = f"stage {name}: "
    check_model(recipe, stage, where)
    check_ranks(stage, cluster.gpus, where)
    check_length(stage, dataset.samples, where)
    steps = plan_part(stage, dataset.samples, None, where).steps
    step = estimate_step(stage, dataset.classes, cluster, measured)
    interval = with_intervals(stage, steps, dataset.samples / stage.batch.global_size).checkpoint.interval
    interval = min(interval, steps)  # the last step is saved in any case
    timing = stage_timing(stage, dataset.classes, dataset.shards, cluster, step.seconds.value, interval)
    return PlannedTime(stage, step, steps, timing)


def plan_cost(
    recipe: Recipe,
    name: str,
    cluster: Cluster,
    dataset: PlannedDataset,
    *,
    price: float | None = None,
    measured: MeasuredSpeed | None = None,
) -> StagePlan:
    """The plan of training stage `name` on `cluster`, whose number of GPUs replaces that of the recipe.

    Args:
        recipe: with the stage.
        name: of the stage.
        cluster: where it runs.
        dataset: what it trains on.
        price: of a GPU for an hour.
        measured: how a measured step on such a GPU compares with the estimate.

    Raises:
        ConfigError: the GPUs do not divide the micro-batches, or another setting that needs no shards to be wrong.
    """
    planned = plan_time(recipe, name, cluster, dataset, measured)
    stage, step, steps, timing = planned.stage, planned.step, planned.steps, planned.timing
    classes, batch = dataset.classes, stage.batch.global_size
    memory = gpu_memory(stage, classes, cluster)
    found = alternatives(stage, classes, cluster, measured)
    lanes = stage.data.lanes or default_lanes(batch, dataset.samples)
    loader = loader_load(stage, step, cluster)
    useful = useful_time(timing, duration=steps * timing.step)
    return StagePlan(
        recipe=recipe.name,
        name=name,
        stage=stage,
        cluster=cluster,
        dataset=dataset,
        parameters=parameters_of(stage, classes),
        multiply_adds=multiply_adds_of(stage, classes),
        steps=steps,
        step=step,
        memory=memory,
        cost=_cost(steps, step, cluster, price, timing.start, useful),
        loader=loader,
        shards=shard_load(dataset, step, cluster, lanes),
        checkpoints=checkpoint_load(stage, classes, steps, timing.interval, step, cluster),
        timing=timing,
        useful=useful,
        intervals=best_interval(timing),
        alternatives=found,
        recommended=recommend(stage, classes, cluster, found, dataset.samples),
        remarks=(*_remarks(stage, cluster, memory, loader, step), *_faster_precision(stage, classes, cluster, step)),
    )


def _cost(
    steps: int, step: StepEstimate, cluster: Cluster, price: float | None, start: float, useful: UsefulTime
) -> StageCost:
    hours = step.seconds * (steps / _HOUR)
    with_failures = hours * (1 / useful.exact) + Range.exactly(start / _HOUR) if useful.exact else None
    gpu_hours = hours * cluster.gpus
    facility = figure_range(cluster.law.facility)
    kilowatts = cluster.power / 1e3
    energy = Range(
        gpu_hours.value * kilowatts * facility.value,
        gpu_hours.least * kilowatts * facility.least,
        gpu_hours.most * kilowatts * facility.most,
    )
    return StageCost(hours, with_failures, gpu_hours, energy, None if price is None else gpu_hours * price)


def _remarks(
    stage: TrainStage, cluster: Cluster, memory: GpuMemory, loader: LoaderLoad, step: StepEstimate
) -> Iterator[str]:
    if stage.resources.gpus_per_rank == 0:
        yield "resources.gpus_per_rank is 0, so the recipe's ranks compute on CPUs; this plan is for GPUs"
    if not memory.fits:
        yield (
            f"it does not fit: a GPU needs {memory.needed / 1e9:.1f} of {memory.size / 1e9:.1f} GB, so the times are "
            "those of a step that cannot run"
        )
    if stage.fused_depthwise:
        yield "fused_depthwise is not in the estimate: time and memory are those of the operations that it replaces"
    if stage.zero_stage == 3:
        yield (
            "with ZeRO 3 gathers are taken to hide behind the computation, and above a billion parameters each weight "
            "to be gathered again for the backward; neither was measured on a GPU"
        )
    if step.issuing.value >= step.computing.value:
        better = "a lower ZeRO stage" if stage.zero_stage == 3 else "larger micro-batches or compile"
        yield f"the host issues kernels more slowly than the GPU runs them; {better} would help"
    if loader.cores_per_gpu.value > stage.data.workers:
        share = stage.data.workers / loader.cores_per_gpu.value
        yield (
            f"data.workers: {counted(stage.data.workers, 'reader thread')} of a rank can deliver {share:.0%} of what "
            f"training needs, by estimate; set {math.ceil(loader.cores_per_gpu.value)} or more. The times do not "
            "include that"
        )
    cores = cluster.cores_per_node
    if cores is not None and loader.cores.value > cores:
        share = cores / loader.cores.value
        yield (
            f"a node has {counted(cores, 'core')} and its readers keep {loader.cores.value:.0f} busy: by estimate "
            f"data comes at {share:.0%} of the speed of training, which the times do not include"
        )
    yield "hours and GPU-hours are those of training alone: evaluations are not counted"


def _faster_precision(stage: TrainStage, classes: int, cluster: Cluster, step: StepEstimate) -> Iterator[str]:
    """What float32 costs on GPUs, where matrix products in it do not use the tensor cores."""
    if stage.precision == "fp32":
        zero_stage = max(1, stage.zero_stage)
        autocast = with_settings(stage, precision="bf16_autocast", zero_stage=zero_stage)
        seconds = estimate_step(autocast, classes, cluster).seconds.value
        yield (
            f"precision: with bf16_autocast, whose weights stay float32, a step would take {1e3 * seconds:,.1f} ms by "
            f"estimate, and with fp32 {1e3 * step.seconds.value:,.1f} ms; it makes another run"
        )
