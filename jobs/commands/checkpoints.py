"""`coatnet checkpoints`: what a run has saved, whether it is intact, and why it is kept."""

import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import Annotated, Any

import typer
from rich.table import Table
from typer.core import TyperGroup

from data.errors import EXIT_CONFIG
from jobs.checkpoint_discovery import find_training_stages
from jobs.commands.arguments import AsJson, RunPath
from jobs.console import make_console, make_table, print_json, print_line
from jobs.exit_codes import STARTS_OVER, exit_on_error
from pipeline.checkpoints.listing import ListedCheckpoint, list_checkpoints
from pipeline.checkpoints.verification import find_damage
from pipeline.errors import ConfigError


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
        listed = [(run.name, one) for run, stage in find_training_stages(target) for one in list_checkpoints(stage)]
        if as_json:
            print_json([asdict(one) for _, one in listed])
        elif listed:
            make_console().print(table(listed))
        else:
            print_line(make_console(), f"{target}: no checkpoints yet")


@checkpoints.command()
def verify(
    target: RunPath,
    step: Annotated[int | None, typer.Argument(metavar="[STEP]", help="Step to verify.", show_default="all")] = None,
) -> None:
    """Read every file of the published checkpoints and compare it with its checksum."""
    with exit_on_error(STARTS_OVER):
        console = make_console()
        found = [
            (place, one)
            for _, stage in find_training_stages(target)
            for place in stage.stores
            for one in place.contents().steps
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


def _number(value: int | None) -> str:
    return "-" if value is None else f"{value:,}"
