"""`coatnet bench`: whether this machine can keep up with a recipe, and what its GPU does with it."""

from dataclasses import asdict, dataclass
from typing import Annotated

import typer
from rich.console import Console

from jobs.bundled_recipes import load_recipe
from jobs.commands.arguments import AsJson, OptionalStage, Overrides, RecipePath, stage_and_changes, training_stage
from jobs.commands.bench_gpu import gpu
from jobs.console import make_console, make_table, print_json, print_line
from jobs.exit_codes import exit_on_error
from jobs.scheduler import slurm
from pipeline.errors import ConfigError
from pipeline.plan import TrainPlan, plan_stage
from pipeline.planner.step_estimate import computing_speed
from pipeline.preflight.machine import Machine, this_machine
from pipeline.ranks.cpu_speed import training_rate
from pipeline.ranks.gpus import PEAKS, present_gpu
from pipeline.recipe.schema import Recipe
from pipeline.throughput import LoaderCosts, LoaderThroughput, demand, measure, time_parts
from pipeline.throughput import images_per_second as images_per_second_at

_CORES = "the cores of this machine"

bench = typer.Typer(no_args_is_help=True, add_completion=False)


@dataclass(frozen=True, slots=True)
class AssumedDevice:
    """The device whose demand was computed rather than given."""

    device: str
    utilization: float | None
    """Share of its peak, as given; None for an estimate, as by `coatnet plan`, and for the cores of this machine, whose
    speed is measured."""


@dataclass(frozen=True, slots=True)
class LoaderBenchmark:
    """What `--json` prints."""

    stage: str
    model: str
    resolution: int
    cores: int
    ranks: int
    workers: int
    delivered: LoaderThroughput
    milliseconds_per_image: LoaderCosts
    demand_per_rank: float
    """Images per second."""
    demand: float
    assumed: AssumedDevice | None
    enough: bool


@bench.callback()
def _bench() -> None:
    """Measure whether this machine can keep up with a recipe, and what its GPU does with it."""


bench.command()(gpu)


@bench.command()
def data(
    recipe: RecipePath,
    stage: OptionalStage = None,
    overrides: Overrides = None,
    ranks: Annotated[
        int | None, typer.Option(min=1, help="Number of ranks on this node.", show_default="all of the stage")
    ] = None,
    seconds: Annotated[float, typer.Option(min=0.1, help="How long to run the readers.")] = 20.0,
    device: Annotated[
        str | None, typer.Option(help="GPU model of each rank.", show_default="that of this machine")
    ] = None,
    utilization: Annotated[
        float | None,
        typer.Option(
            min=0.001, max=1, help="Fraction of the GPU's peak that training reaches.", show_default="by estimate"
        ),
    ] = None,
    images_per_second: Annotated[
        float | None, typer.Option(min=0.01, help="Training speed of one rank, if known; replaces the estimate.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Measure whether this node can feed its GPUs: images per second, where the time goes, and the recipe's demand."""
    with exit_on_error():
        stage, changes = stage_and_changes(stage, overrides)
        plan = _training_plan(load_recipe(recipe, changes), stage)
        world_size = plan.stage.resources.ranks
        ranks = ranks or world_size
        if ranks > world_size:
            raise ConfigError(f"--ranks {ranks}: stage {plan.name} has {world_size}")
        if device is not None and device not in PEAKS:
            raise ConfigError(f"--device {device}: not one of {', '.join(PEAKS)}; give --images-per-second instead")
        machine, console = this_machine(), make_console()
        assumed = None if images_per_second else _assumed(device, utilization, plan, machine)
        with console.status("measuring how fast this machine trains, and reading samples of the recipe"):
            per_rank = images_per_second or _needed(plan, ranks, machine, assumed)
            costs = time_parts(plan, samples=200)
            delivered = measure(recipe, changes, plan.name, ranks, world_size, seconds)
        found = LoaderBenchmark(
            stage=plan.name,
            model=plan.stage.model.name,
            resolution=plan.stage.resolution,
            cores=machine.host.cores,
            ranks=ranks,
            workers=plan.stage.data.workers,
            delivered=delivered,
            milliseconds_per_image=costs,
            demand_per_rank=per_rank,
            demand=per_rank * ranks,
            assumed=assumed,
            enough=delivered.images_per_second >= per_rank * ranks,
        )
        if as_json:
            print_json(asdict(found))
        else:
            _show(found, console)


def _assumed(device: str | None, utilization: float | None, plan: TrainPlan, machine: Machine) -> AssumedDevice:
    """The named GPU, else that of this machine; without one, its cores, unless the recipe is for a cluster."""
    if device is None and not machine.gpus and (plan.stage.resources.gpus_per_rank == 0 or not slurm.has_cluster()):
        return AssumedDevice(_CORES, None)
    return AssumedDevice(device or present_gpu() or "H100", utilization)


def _needed(plan: TrainPlan, ranks: int, machine: Machine, assumed: AssumedDevice | None) -> float:
    """Images per second of a rank on that device."""
    if assumed is not None and assumed.device != _CORES:
        if assumed.utilization is not None:
            return demand(plan.stage, assumed.device, assumed.utilization)
        return computing_speed(plan.stage, len(plan.classes), assumed.device).value
    cores = min(machine.host.cores, ranks * plan.stage.resources.threads_per_rank)
    return images_per_second_at(plan.stage, training_rate() * cores / ranks)


def _training_plan(recipe: Recipe, stage: str | None) -> TrainPlan:
    """The plan of a stage, by default of the first that trains."""
    plan = plan_stage(recipe, training_stage(recipe, stage))
    assert isinstance(plan, TrainPlan)
    return plan


def _show(found: LoaderBenchmark, console: Console) -> None:
    rate, per_core = found.delivered.images_per_second, found.delivered.images_per_cpu_second
    print_line(
        console, f"{found.stage}: {found.ranks} ranks with {found.workers} reader threads each, {found.cores} cores"
    )
    table = make_table("part", "ms of a core per image", "share", right=("ms of a core per image", "share"))
    for part, milliseconds in asdict(found.milliseconds_per_image).items():
        share = milliseconds / found.milliseconds_per_image.total
        table.add_row(part.replace("_", " "), f"{milliseconds:.3f}", f"{share:.0%}")
    console.print(table)
    source = "as given"
    if found.assumed and found.assumed.device == _CORES:
        source = f"{found.model} at {found.resolution} pixels on {found.assumed.device}, as measured with a small model"
    elif found.assumed:
        share = found.assumed.utilization
        speed = "by estimate, as `coatnet plan`" if share is None else f"at {share:.0%} of its peak"
        source = f"{found.model} at {found.resolution} pixels on {found.assumed.device} {speed}"
    print_line(console, f"delivered  {rate:,.0f} images/s, {per_core:,.0f} per core-second")
    print_line(console, f"needed     {found.demand:,.0f} images/s, {found.demand_per_rank:,.0f} per rank ({source})")
    if found.delivered.skipped:
        print_line(console, f"{found.delivered.skipped:,} samples could not be used")
    if found.enough:
        print_line(console, ("enough", "green"), f": {rate / found.demand:.1f} times what is needed")
    else:
        print_line(
            console,
            ("too little", "red"),
            f": {rate / found.demand:.0%} of what is needed. Reading would take "
            f"{found.demand / per_core:,.0f} cores: give the node more cores and data.workers, build shards that "
            "decode faster (--restart-markers, --short-side, --subsampling, --recompress), or turn off RandAugment",
        )
