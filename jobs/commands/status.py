"""`coatnet status`: how runs are, during and after their jobs, with Slurm and without."""

import json
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from jobs.exit_codes import exit_on_error

if TYPE_CHECKING:
    from jobs.run_discovery import RunRef
    from jobs.scheduler.stage_status import StatusReport

RUN_HELP = "A recipe file, the folder of a run (runs/NAME), or of one of its stages."
_PIPE_WIDTH = 200  # a pipe has no width to keep to


def status(
    target: Annotated[
        Path | None, typer.Argument(metavar="[RECIPE|RUN]", help=f"{RUN_HELP} By default all below runs.")
    ] = None,
    watch: Annotated[bool, typer.Option("--watch", "-w", help="Keep it fresh until everything has ended.")] = False,
    every: Annotated[float, typer.Option(min=0.1, metavar="SECONDS", help="Between two looks of --watch.")] = 5.0,
    as_json: Annotated[bool, typer.Option("--json", help="For programs; with --watch an object on each line.")] = False,
) -> None:
    """Show each stage: its job, state, progress, last checkpoint and time left; of a sweep, compare the runs."""
    with exit_on_error("the runs go on"):
        from jobs.run_discovery import runs_at
        from jobs.scheduler.stage_status import look

        runs = runs_at(target)
        if watch:
            _watch(target, runs, every, as_json)
        elif as_json:
            print(json.dumps(_as_json(runs, look(runs)), indent=1))
        else:
            _print(runs, look(runs))


def _print(runs: "list[RunRef]", report: "StatusReport") -> None:
    from jobs.scheduler.status_table import status_view

    if not runs:
        print("no runs yet")
        return
    _console().print(status_view(runs, report), soft_wrap=False)


def _watch(target: Path | None, runs: "list[RunRef]", every: float, as_json: bool) -> None:
    from rich.live import Live

    from jobs.run_discovery import runs_at
    from jobs.scheduler.stage_status import look
    from jobs.scheduler.status_table import status_view

    console = _console()
    try:
        with Live(console=console, auto_refresh=False, vertical_overflow="visible") as live:
            while True:
                report = look(runs)
                if as_json:
                    print(json.dumps(_as_json(runs, report)), flush=True)
                elif console.is_terminal:
                    live.update(status_view(runs, report), refresh=True)
                else:
                    console.print(time.strftime("%Y-%m-%d %H:%M:%S"))
                    console.print(status_view(runs, report))
                if report.settled:
                    return
                time.sleep(every)
                runs = runs_at(target)  # others may have begun
    except KeyboardInterrupt:
        return  # how one leaves it


def _as_json(runs: "list[RunRef]", report: "StatusReport") -> dict[str, Any]:
    settings = {run.name: dict(run.settings) for run in runs}
    stages = [{**asdict(row), "settings": settings[row.run]} for row in report.stages]
    return {"slurm": report.slurm, "stages": stages}


def _console() -> Console:
    return Console(highlight=False, width=None if sys.stdout.isatty() else _PIPE_WIDTH)
