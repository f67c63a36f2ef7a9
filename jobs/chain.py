"""Run all stages of a recipe on this machine, in order, continuing where an earlier call stopped."""

import os
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from jobs.bundled_recipes import load_recipe
from jobs.frozen_recipe import FrozenRecipe, frozen_recipe
from jobs.launch import launch_ranks, refuse_other_machines
from jobs.shard_building import build_and_report
from pipeline.checkpoints.claim import refuse_foreign_place
from pipeline.checkpoints.lost import check_final_checkpoint
from pipeline.checkpoints.saved import if_repeated
from pipeline.checkpoints.store import checkpoint_store
from pipeline.errors import RunFailed
from pipeline.faults.preemption import StopSignals
from pipeline.plan import Plan, TrainPlan, check_model, check_start_classes, plan_stage
from pipeline.recipe.schema import Recipe
from pipeline.recipe.sections import ShardBuildSettings
from pipeline.run_folder import checked_data, final_checkpoint, run_folder, start_digest


def run_chain(path: Path, overrides: list[str], console: Console, signals: StopSignals) -> None:
    """Run every stage of the recipe at `path` that is not done, and print the results; build its shards first.

    The file is read once: it may be edited for the next run meanwhile.

    Raises:
        ConfigError, DataError: found before the first stage starts.
        StageFailed: a stage failed, or was asked to stop.
    """
    recipe = load_recipe(path, overrides)
    for name, stage in recipe.stages.items():
        refuse_other_machines(name, stage)
        check_model(recipe, stage, f"stage {name}: ")
    if recipe.shards:
        build_missing(recipe.shards, console)
    plans: dict[str, Plan] = {}
    for name, stage in recipe.stages.items():
        plan = plans[name] = plan_stage(recipe, name)
        if stage.start_from:
            check_start_classes(plan, plans[stage.start_from])
        _check_places(plan, recipe)
        check_final_checkpoint(recipe, name)
    frozen = frozen_recipe(recipe)
    for plan in plans.values():
        _run_planned(plan, frozen, console, signals)
    console.print(result_table(recipe))


def build_missing(shards: ShardBuildSettings, console: Console) -> None:
    """Build the shards of a recipe, unless they are there.

    Raises:
        DataError: as `data.building.build_shards`.
    """
    if not Path(shards.folder).exists():
        console.print(f"[bold]shards[/]  builds {escape(shards.folder)} from {escape(shards.source)}", soft_wrap=True)
        build_and_report(console, shards.source, Path(shards.folder), **shards.build_options)


def run_one(recipe: Recipe, name: str, console: Console, signals: StopSignals) -> None:
    """Run stage `name` of the recipe as its own set of rank processes, unless it is done.

    Raises:
        ConfigError, DataError: the stage cannot start.
        StageFailed: it failed, or was asked to stop.
    """
    plan = plan_stage(recipe, name)
    refuse_other_machines(name, plan.stage)
    _run_planned(plan, frozen_recipe(recipe), console, signals)


def _check_places(plan: Plan, recipe: Recipe) -> None:
    """Whether the run folder, and the place of the checkpoints, are those of this run."""
    folder = run_folder(recipe, plan.name)
    folder.check(plan, start_digest(recipe, plan.name))
    if isinstance(plan, TrainPlan):
        refuse_foreign_place(checkpoint_store(folder, plan.stage), folder)


def _run_planned(plan: Plan, frozen: FrozenRecipe, console: Console, signals: StopSignals) -> None:
    recipe = frozen.recipe
    folder = run_folder(recipe, plan.name)
    _check_places(plan, recipe)  # the stage it starts from may only just have ended
    if folder.result() is not None:
        check_final_checkpoint(recipe, plan.name)
        console.print(f"[bold]{plan.name}[/]  done before")
        return
    if plan.stage.start_from:
        final_checkpoint(recipe, plan.stage.start_from)  # refused once, rather than by every rank
    folder.create()
    frozen.write()
    signals.if_repeated = partial(if_repeated, folder)
    launch_ranks(["train", str(frozen.path), plan.name], plan.stage, folder, signals, checked_data(plan))
    if folder.result() is None:
        raise RunFailed(f"stage {plan.name}: its ranks ended without a result in {folder.path}; see the logs there")


def result_table(recipe: Recipe) -> Table:
    """Stage, steps, images/s, top-1 and checkpoint of the stages that are done."""
    runs = os.path.relpath(Path(recipe.runs) / recipe.name)
    table = Table(title=Text(f"{recipe.name}, in {runs}", "bold"), title_justify="left")
    table.add_column("stage")
    for heading in ("steps", "images/s", "top-1"):
        table.add_column(heading, justify="right")
    table.add_column("checkpoint", overflow="fold")
    for name in recipe.stages:
        result = run_folder(recipe, name).result()
        if result is not None:
            speed = result.images_per_second
            table.add_row(
                name,
                f"{result.steps:,}",
                f"{speed:,.0f}" if speed else "-",
                f"{result.validation.top1:.2%}",
                result.checkpoint,
            )
    return table
