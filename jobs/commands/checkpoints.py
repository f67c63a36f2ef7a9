"""`coatnet checkpoints`: what a run has saved, whether it is intact, and why it is kept."""

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table
from typer.core import TyperGroup

from data.errors import EXIT_CONFIG
from jobs.commands.arguments import AsJson, RunPath
from jobs.console import make_console, make_table, print_line
from jobs.exit_codes import STARTS_OVER, exit_on_error
from jobs.run_discovery import RunRef, find_runs
from pipeline.checkpoints.listing import (
    CheckpointedStage,
    ListedCheckpoint,
    checkpointed_stage,
    list_checkpoints,
    stage_of_recipe,
)
from pipeline.checkpoints.verification import find_damage
from pipeline.errors import ConfigError
from pipeline.recipe.loader import load_recipe
from pipeline.recipe.schema import TrainStage


class _ListsByDefault(TyperGroup):
    """`coatnet checkpoints RUN` is `coatnet checkpoints list RUN`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0] not in self.commands and args[0] not in ctx.help_option_names:
            args.insert(0, "list")
        return super().parse_args(ctx, args)


checkpoints = typer.Typer(cls=_ListsByDefault, no_args_is_help=True, add_completion=False)


@checkpoints.callback()
def _checkpoints() -> None:
    """List and verify the checkpoints of a run.

    `coatnet checkpoints RUN` lists them.
    """


@checkpoints.command(name="list")
def show(target: RunPath, as_json: AsJson = False) -> None:
    """List step, samples, size, ranks and accuracy, whether files are missing, and why each is kept."""
    with exit_on_error(STARTS_OVER):
        listed = [(run.name, one) for run, stage in _stages(target) for one in list_checkpoints(stage)]
        if as_json:
            print(json.dumps([asdict(one) for _, one in listed], indent=1))
        elif listed:
            make_console().print(table(listed))
        else:
            print(f"{target}: no checkpoints yet")


@checkpoints.command()
def verify(
    target: RunPath,
    step: Annotated[int | None, typer.Argument(metavar="[STEP]", help="Step to verify.", show_default="all")] = None,
) -> None:
    """Read every file of the published checkpoints and compare it with its checksum."""
    with exit_on_error(STARTS_OVER):
        console = make_console()
        found = [
            (place, one) for _, stage in _stages(target) for place in stage.stores for one in place.contents().steps
        ]
        chosen = [(place, one) for place, one in found if step in (None, one)]
        if step is not None and not chosen:
            steps = ", ".join(str(one) for _, one in found) or "none"
            raise ConfigError(f"{target}: no checkpoint of step {step}; there are: {steps}")
        damaged = 0
        for place, one in chosen:
            with console.status(place.at(one)):
                problem = find_damage(place.at(one), place.storage)
            damaged += problem is not None
            print_line(console, f"{place.at(one)}: {problem or 'intact'}")
        print_line(console, f"{len(chosen)} checkpoints, {damaged} damaged")
        if damaged:
            sys.exit(EXIT_CONFIG)


def table(listed: Sequence[tuple[str, ListedCheckpoint]]) -> Table:
    """A row for each checkpoint, which comes with the name of its run."""
    shown = {
        "run": len({run for run, _ in listed}) > 1,
        "stage": len({(run, one.stage) for run, one in listed}) > 1,
    }
    numbers = ("step", "samples", "MB", "ranks", "top-1")
    result = make_table(
        *(heading for heading, wanted in shown.items() if wanted),
        *("step", "samples", "MB", "ranks", "saved", "top-1", "verified", "kept as"),
        right=numbers,
    )
    for run, one in listed:
        named = {"run": run, "stage": one.stage}
        result.add_row(
            *(named[heading] for heading, wanted in shown.items() if wanted),
            _number(one.step),
            _number(one.samples),
            f"{one.bytes / 1e6:,.1f}",
            _number(one.world_size),
            (one.when or "-")[:16].replace("T", " "),
            "-" if one.top1 is None else f"{one.top1:.2%}",
            "yes"
            if one.problem is None
            else one.problem
            if one.state == "published"
            else f"{one.state}: {one.problem}",
            ", ".join(one.kept) or "-",
        )
    return result


def _stages(target: Path) -> list[tuple[RunRef, CheckpointedStage]]:
    """The training stages at `target`, with their runs.

    Raises:
        ConfigError: there are none.
    """
    runs = find_runs(target)
    if len(runs) == 1 and target.is_file() and not runs[0].settings:
        # Also stages that have yet to start on this machine.
        recipe = load_recipe(target)
        training = [name for name, stage in recipe.stages.items() if isinstance(stage, TrainStage)]
        return [(runs[0], stage_of_recipe(recipe, name)) for name in training]
    folders = [(run, run.folder(name)) for run in runs for name in run.stages()]
    found = [(run, stage) for run, folder in folders if (stage := checkpointed_stage(folder))]
    if not found:
        raise ConfigError(f"{target}: no training stage has started here")
    return found


def _number(value: int | None) -> str:
    return "-" if value is None else f"{value:,}"
