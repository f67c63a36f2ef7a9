"""`coatnet bench`: whether this machine can do what a recipe asks of it."""

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from jobs.exit_codes import exit_on_error

bench = typer.Typer(no_args_is_help=True, help="Measure this machine against a recipe.")


@bench.callback()
def _group() -> None:
    """Keeps `data` a word of its own."""


@bench.command()
def data(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="A YAML file.")],
    stage: Annotated[str | None, typer.Argument(help="A training stage; by default the first.")] = None,
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Settings that replace those of the recipe.")
    ] = None,
    ranks: Annotated[int | None, typer.Option(min=1, help="Ranks of this node; by default all of the stage.")] = None,
    seconds: Annotated[float, typer.Option(min=0.1, help="How long the readers run.")] = 20.0,
    device: Annotated[str | None, typer.Option(help="GPU of a rank; by default the one here, or H100.")] = None,
    utilization: Annotated[float, typer.Option(min=0.01, max=1, help="Share of its peak that training reaches.")] = 0.4,
    images_per_second: Annotated[
        float | None, typer.Option(min=0.01, help="What one rank trains on, where that is known.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """Say whether this node can feed its GPUs: images per second, where the time goes, and what the recipe asks for."""
    with exit_on_error():
        # STAGE may be left out before a KEY=VALUE.
        changes = [text for text in [stage, *(overrides or [])] if text is not None and "=" in text]
        chosen = stage if stage is not None and "=" not in stage else None
        console = Console(highlight=False)
        with console.status("reading samples of the recipe"):
            facts = _measure(recipe, chosen, changes, ranks, seconds, device, utilization, images_per_second)
        if as_json:
            print(json.dumps(facts, indent=1))
        else:
            _show(facts, console)


def _measure(
    recipe: Path,
    stage: str | None,
    overrides: list[str],
    ranks: int | None,
    seconds: float,
    device: str | None,
    utilization: float,
    images_per_second: float | None,
) -> dict[str, Any]:
    from jobs.bundled_recipes import load_recipe
    from pipeline.errors import ConfigError
    from pipeline.gpus import PEAKS, present_gpu
    from pipeline.plan import TrainPlan, plan_stage
    from pipeline.recipe.schema import TrainStage
    from pipeline.throughput import demand, measure, time_parts

    loaded = load_recipe(recipe, overrides)
    name = stage or next((n for n, s in loaded.stages.items() if isinstance(s, TrainStage)), "")
    plan = plan_stage(loaded, name)
    if not isinstance(plan, TrainPlan):
        raise ConfigError(f"stage {name} evaluates; name a stage that trains")
    world_size = plan.stage.resources.ranks
    ranks = ranks or world_size
    if ranks > world_size:
        raise ConfigError(f"--ranks {ranks}: stage {name} has {world_size}")
    device = device or present_gpu() or "H100"
    if device not in PEAKS:
        raise ConfigError(f"--device {device}: not one of {', '.join(PEAKS)}; say --images-per-second instead")
    asked = images_per_second or demand(plan.stage, device, utilization)
    parts = time_parts(plan, samples=200)
    delivery = measure(recipe, overrides, name, ranks, world_size, seconds)
    return {
        "stage": name,
        "model": plan.stage.model.name,
        "resolution": plan.stage.resolution,
        "cores": len(os.sched_getaffinity(0)),
        "ranks": ranks,
        "workers": plan.stage.data.workers,
        "delivered": asdict(delivery),
        "milliseconds_per_image": asdict(parts),
        "demand_per_rank": asked,
        "demand": asked * ranks,
        "assumed": None if images_per_second else {"device": device, "utilization": utilization},
        "enough": delivery.images_per_second >= asked * ranks,
    }


def _show(facts: dict[str, Any], console: Console) -> None:
    delivered, asked = facts["delivered"], facts["demand"]
    rate, by_core = delivered["images_per_second"], delivered["images_per_cpu_second"]
    console.print(
        f"{facts['stage']}: {facts['ranks']} ranks with {facts['workers']} reader threads each, {facts['cores']} cores"
    )
    table = Table(box=box.SIMPLE_HEAD, show_edge=False)
    table.add_column("part")
    table.add_column("ms of a core per image", justify="right")
    table.add_column("share", justify="right")
    parts = facts["milliseconds_per_image"]
    for part, milliseconds in parts.items():
        table.add_row(part.replace("_", " "), f"{milliseconds:.3f}", f"{milliseconds / sum(parts.values()):.0%}")
    console.print(table)
    why = (
        f"{facts['model']} at {facts['resolution']} pixels on {facts['assumed']['device']} at "
        f"{facts['assumed']['utilization']:.0%} of its peak"
        if facts["assumed"]
        else "as told"
    )
    console.print(f"delivered  {rate:,.0f} images/s, {by_core:,.0f} for each second of a core", soft_wrap=True)
    console.print(
        f"asked for  {asked:,.0f} images/s, {facts['demand_per_rank']:,.0f} by each rank ({why})", soft_wrap=True
    )
    if delivered["skipped"]:
        console.print(f"{delivered['skipped']:,} samples could not be used")
    if facts["enough"]:
        console.print(f"[green]enough[/]: {rate / asked:.1f} times what is asked for")
    else:
        console.print(
            f"[red]too little[/]: {rate / asked:.0%} of what is asked for. It takes {asked / by_core:,.0f} cores for "
            "reading; give the node more cores and data.workers, shrink the pictures when building the shards "
            "(--short-side), or leave RandAugment out",
            soft_wrap=True,
        )
