"""Run all stages of a recipe on this machine, in order, continuing where an earlier call stopped."""

import os
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.table import Table

from data.errors import DataError
from jobs.bundled_recipes import load_recipe
from jobs.console import print_line
from jobs.frozen_recipe import FrozenRecipe, frozen_recipe
from jobs.inherited_environment import discard_foreign_variables
from jobs.launch import launch_ranks, refuse_other_machines, started_at
from jobs.scheduler.job_end import node_name
from jobs.shard_building import build_and_report
from pipeline.built_shards import check_built
from pipeline.checkpoints.claim import refuse_foreign_place
from pipeline.checkpoints.lost import check_final_checkpoint, continues_alone, is_left_behind
from pipeline.checkpoints.saved import if_repeated
from pipeline.checkpoints.store import checkpoint_store
from pipeline.errors import RunFailed
from pipeline.faults.preemption import StopSignals
from pipeline.model_check import check_model
from pipeline.monitoring.console import styled_text
from pipeline.plan import Plan, TrainPlan, check_start_classes, plan_stage
from pipeline.preflight.stage_facts import Facts
from pipeline.preflight.unused_settings import unused_settings
from pipeline.recipe.schema import Recipe
from pipeline.recipe.sections import ShardBuildSettings
from pipeline.runs.event_log import Event
from pipeline.runs.extension import Extension, extension
from pipeline.runs.run_folder import RunFolder, final_checkpoint, run_folder, start_digest
from pipeline.runs.stage_settings import checked_data


def run_chain(
    path: Path, overrides: list[str], console: Console, signals: StopSignals, *, extend: bool = False
) -> None:
    """Run every stage of the recipe at `path` that is not done, and print the results; build its shards first.

    The file is read once: it may be edited for the next run meanwhile. With `extend`, stages that have begun with other
    settings go on with these from their last checkpoints.

    Raises:
        ConfigError, DataError: found before the first stage starts.
        StageFailed: a stage failed, or was asked to stop.
    """
    discard_foreign_variables()
    recipe = load_recipe(path, overrides)
    for name, stage in recipe.stages.items():
        refuse_other_machines(name, stage)
        check_model(recipe, stage, f"stage {name}: ")
    if recipe.shards:
        build_missing(recipe.shards, console)
    plans: dict[str, Plan] = {}
    changes: list[Extension] = []
    for name, stage in recipe.stages.items():
        if is_left_behind(recipe, name):
            folder = os.path.relpath(run_folder(recipe, name).path)
            print_line(console, (name, "bold"), f"  not trained again: {folder} is gone, and no other stage needs it")
            continue
        change = extension(recipe, name) if extend else None
        plan = _planned(recipe, name, console, change)
        if plan is None:
            continue
        plans[name] = plan
        if stage.start_stage in plans:
            check_start_classes(plan, plans[stage.start_stage])
        if change:
            changes.append(change)
            continue
        _check_places(plan, recipe)
        check_final_checkpoint(recipe, name)
    if extend:
        record_extensions(changes, console)
    frozen = frozen_recipe(recipe)
    for plan in plans.values():
        # The stages before it may have taken days, and a time limit is that of one stage.
        _run_planned(plan, frozen, console, signals, started=time.time())
    console.print(result_table(recipe))


def build_missing(shards: ShardBuildSettings, console: Console) -> None:
    """Build the shards of a recipe, unless they are there.

    Raises:
        ConfigError: those that are there were not built as the recipe says.
        DataError: as `data.building.build_shards`.
    """
    doubt = check_built(shards)
    if doubt:
        print_line(console, doubt)
    if not Path(shards.folder).exists():
        print_line(console, ("shards", "bold"), f"  builds {shards.folder} from {shards.source}")
        build_and_report(console, shards.source, Path(shards.folder), **shards.build_options)


def run_one(recipe: Recipe, name: str, console: Console, signals: StopSignals, *, extend: bool = False) -> None:
    """Run stage `name` of the recipe as its own set of rank processes, unless it is done; `extend` as in `run_chain`.

    Raises:
        ConfigError, DataError: the stage cannot start.
        StageFailed: it failed, or was asked to stop.
    """
    discard_foreign_variables()
    change = extension(recipe, name) if extend and name in recipe.stages else None
    plan = _planned(recipe, name, console, change)
    if plan is not None:
        refuse_other_machines(name, plan.stage)
        if extend:
            record_extensions([change] if change else [], console)
        _run_planned(plan, frozen_recipe(recipe), console, signals, started=signals.started)


def record_extensions(changes: Sequence[Extension], console: Console) -> None:
    """Write the changes of settings to the run folders, and show them.

    Raises:
        ConfigError, RunInUse: as for `Extension.record`.
    """
    for change in changes:
        change.record(node_name(os.environ))
        for line in change.lines:
            print_line(console, (change.plan.name, "bold"), f"  {line}")
    if not changes:
        print_line(console, "--extend: no stage that has begun has other settings, so nothing is changed")


def _planned(recipe: Recipe, name: str, console: Console, change: Extension | None = None) -> Plan | None:
    """The plan of a stage; None for one that is done and whose data, which nothing reads any more, is gone."""
    if change:
        return plan_stage(recipe, name, history=change.history)
    try:
        return plan_stage(recipe, name)
    except DataError as error:
        folder = run_folder(recipe, name)
        if folder.result() is None:
            raise
        folder.check_settings(recipe)
        check_final_checkpoint(recipe, name)
        print_line(console, (name, "bold"), f"  done before; its data is not needed any more ({error})")
        return None


def _check_places(plan: Plan, recipe: Recipe) -> None:
    """Whether the run folder, and the place of the checkpoints, are those of this run, and what it starts from fits."""
    folder = run_folder(recipe, plan.name)
    if plan.stage.start_source and not continues_alone(recipe, plan.name):
        from pipeline.initial_weights.start import checked_start  # torch, which only such stages need here

        checked_start(plan, folder)
    folder.check(plan, start_digest(recipe, plan.name, to_compare=True))
    if isinstance(plan, TrainPlan):
        refuse_foreign_place(checkpoint_store(folder, plan.stage), folder)


def _run_planned(plan: Plan, frozen: FrozenRecipe, console: Console, signals: StopSignals, *, started: float) -> None:
    """Run a stage unless it is done; its time limit counts from `started`, in seconds since the epoch."""
    recipe = frozen.recipe
    folder = run_folder(recipe, plan.name)
    _check_places(plan, recipe)  # the stage it starts from may only just have ended
    if folder.result() is not None:
        remark = check_final_checkpoint(recipe, plan.name)
        print_line(console, (plan.name, "bold"), f"  done before{'; ' if remark else ''}{remark}")
        return
    if plan.stage.start_stage and not continues_alone(recipe, plan.name):
        final_checkpoint(recipe, plan.stage.start_stage)  # refused once, rather than by every rank
    _note_slurm_settings(plan, recipe, console)
    folder.create()
    frozen.write()
    variables = {**checked_data(plan), **started_at(started)}
    signals.if_repeated = partial(if_repeated, folder)
    advice = partial(_memory_advice, plan, folder)
    launch_ranks(["train", str(frozen.path), plan.name], plan.stage, folder, signals, variables, advice)
    if folder.result() is None:
        raise RunFailed(f"stage {plan.name}: its ranks ended without a result in {folder.path}; see the logs there")


def _memory_advice(plan: Plan, folder: RunFolder) -> str:
    if not isinstance(plan, TrainPlan):
        return "Set resources.ranks or batch.micro_size to less"
    from pipeline.memory_estimate import host_advice  # torch, which the launcher does without

    return host_advice(plan.stage, len(plan.classes), begun=bool(folder.events.of(Event.SAVE)))


def _note_slurm_settings(plan: Plan, recipe: Recipe, console: Console) -> None:
    """A line for each setting that only jobs of Slurm have; its ranks say what else has no effect."""
    without, unknown = (unused_settings(Facts(recipe, plan.name, slurm=slurm)) for slurm in (False, None))
    for finding in without:
        if finding not in unknown:
            print_line(console, (plan.name, "bold"), f"  {finding.what}")


def result_table(recipe: Recipe) -> Table:
    """Stage, steps, images/s, top-1 and checkpoint of the stages that are done."""
    runs = os.path.relpath(Path(recipe.runs) / recipe.name)
    table = Table(title=styled_text((f"{recipe.name}, in {runs}", "bold")), title_justify="left")
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
