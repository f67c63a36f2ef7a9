"""`coatnet checkpoints`: what a run has saved, whether it is whole, and why it is kept."""

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.table import Table
from typer.core import TyperGroup

from data.errors import EXIT_CONFIG
from jobs.exit_codes import exit_on_error
from pipeline.errors import ConfigError

if TYPE_CHECKING:
    from pipeline.checkpoints.listing import ListedCheckpoint

AGAIN = "the same command begins anew"


class _ListsByDefault(TyperGroup):
    """`coatnet checkpoints RUN` is `coatnet checkpoints list RUN`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0] not in self.commands and args[0] not in ctx.help_option_names:
            args.insert(0, "list")
        return super().parse_args(ctx, args)


checkpoints = typer.Typer(cls=_ListsByDefault, no_args_is_help=True, help="List the checkpoints of a run: RUN.")

RunPath = Annotated[Path, typer.Argument(metavar="RUN", help="A run folder, a folder of such, or a recipe file.")]


@checkpoints.command(name="list")
def show(
    run: RunPath,
    as_json: Annotated[bool, typer.Option("--json", help="For programs: a list of objects.")] = False,
) -> None:
    """Step, samples, size, ranks, accuracy; whether sizes and manifests are right, and why each is kept."""
    with exit_on_error(AGAIN):
        from pipeline.checkpoints.listing import find_runs, list_checkpoints

        listed = [one for found in find_runs(run) for one in list_checkpoints(found)]
        if as_json:
            print(json.dumps([asdict(one) for one in listed], indent=1))
        elif listed:
            # A pipe has no width to keep to.
            Console(highlight=False, width=None if sys.stdout.isatty() else 170).print(table(listed))
        else:
            print(f"{run}: no checkpoints yet")


@checkpoints.command()
def verify(
    run: RunPath,
    step: Annotated[int | None, typer.Argument(metavar="[STEP]", help="Of one checkpoint; by default all.")] = None,
) -> None:
    """Read every file of the published checkpoints and hold it against its checksum."""
    with exit_on_error(AGAIN):
        from pipeline.checkpoints.listing import find_runs
        from pipeline.checkpoints.verification import find_damage

        console = Console(highlight=False)
        found = [(place, one) for stage in find_runs(run) for place in stage.stores for one in place.contents().steps]
        chosen = [(place, one) for place, one in found if step in (None, one)]
        if step is not None and not chosen:
            steps = ", ".join(str(one) for _, one in found) or "none"
            raise ConfigError(f"{run}: no checkpoint of step {step}; there are: {steps}")
        damaged = 0
        for place, one in chosen:
            with console.status(place.at(one)):
                problem = find_damage(place.at(one), place.storage)
            damaged += problem is not None
            console.print(f"{place.at(one)}: {problem or 'whole'}", soft_wrap=True, markup=False)
        console.print(f"{len(chosen)} checkpoints, {damaged} damaged")
        if damaged:
            sys.exit(EXIT_CONFIG)


def table(listed: "Sequence[ListedCheckpoint]") -> Table:
    """One row for each."""
    result = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1))
    stages = len({one.stage for one in listed}) > 1
    if stages:
        result.add_column("stage")
    for heading in ("step", "samples", "MB", "ranks", "saved", "top-1"):
        result.add_column(heading, justify="left" if heading == "saved" else "right")
    result.add_column("verified", overflow="fold")
    result.add_column("kept as", overflow="fold")
    for one in listed:
        result.add_row(
            *([one.stage] if stages else []),
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
