"""`coatnet status`: the state of runs, during and after their jobs, with Slurm and without."""

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from jobs.commands.arguments import RUN_HELP
from jobs.console import make_console, make_table, print_json
from jobs.evaluation_status import evaluation_table
from jobs.exit_codes import exit_on_error
from jobs.run_discovery import RunRef, find_runs
from jobs.scheduler.stage_status import StageStatus, State, StatusReport, clock, duration, stage_statuses
from pipeline.monitoring.console import styled_text

_LONGEST_REASON = 44
"""In a cell; the whole of a longer one is printed below the table."""
_STYLES: dict[State, str] = {
    "done": "green",
    "running": "bold cyan",
    "waiting": "yellow",
    "failed": "bold red",
    "stopped": "magenta",
    "cancelled": "magenta",
    "not started": "dim",
    "unknown": "yellow",
}
_COLUMNS: dict[str, Callable[[StageStatus], str]] = {
    "run": lambda row: row.run,
    "stage": lambda row: row.stage,
    "job": lambda row: row.job or "",
    "state": lambda row: row.state,
    "reason": lambda row: _shortened(row.reason),
    "nodes": lambda row: row.nodes,
    "step": lambda row: _steps(row),
    "images/s": lambda row: "" if row.images_per_second is None else f"{row.images_per_second:,.0f}",
    "loss": lambda row: "" if row.loss is None else f"{row.loss:.4f}",
    "top-1": lambda row: "" if row.top1 is None else f"{row.top1:.2%}",
    "checkpoint": lambda row: (row.checkpoint or "").rpartition("/")[2],
    "age": lambda row: "" if row.checkpoint_age is None else duration(row.checkpoint_age),
    "restarts": lambda row: "" if row.restarts is None else f"{row.restarts:,}",
    "ETA": lambda row: "" if row.seconds_left is None else clock(row.seconds_left),
}
_ALWAYS_SHOWN = ("stage", "state", "step")
_SWEEP_COLUMNS = ("stage", "state", "reason", "step", "loss")
_NUMBERS = ("job", "step", "images/s", "loss", "top-1", "age", "restarts", "ETA")


def status(
    target: Annotated[
        Path | None, typer.Argument(metavar="[RECIPE|RUN]", help=RUN_HELP, show_default="all below ./runs")
    ] = None,
    watch: Annotated[bool, typer.Option("--watch", "-w", help="Update until everything has ended.")] = False,
    every: Annotated[float, typer.Option(min=0.1, metavar="SECONDS", help="Time between updates.")] = 5.0,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print JSON for programs; with --watch, one object per line.")
    ] = False,
) -> None:
    """Show job, state, progress, last checkpoint and time left of each stage; compare the runs of a sweep."""
    with exit_on_error("the runs are not affected"):
        runs = find_runs(target)
        if watch:
            _watch(target, runs, every, as_json)
        elif as_json:
            print_json(_as_json(runs, stage_statuses(runs)))
        elif runs:
            make_console().print(status_view(runs, stage_statuses(runs)))
        else:
            print("no runs yet")


def _watch(target: Path | None, runs: list[RunRef], every: float, as_json: bool) -> None:
    console = make_console()
    with Live(console=console, auto_refresh=False, vertical_overflow="visible") as live:
        while True:
            report = stage_statuses(runs)
            if as_json:
                print_json(_as_json(runs, report), indent=None)
            elif console.is_terminal:
                live.update(status_view(runs, report), refresh=True)
            else:
                console.print(time.strftime("%Y-%m-%d %H:%M:%S"))
                console.print(status_view(runs, report))
            if report.settled:
                return
            time.sleep(every)
            runs = find_runs(target)  # new ones may have started


def _as_json(runs: Sequence[RunRef], report: StatusReport) -> dict[str, Any]:
    settings = {run.name: dict(run.settings) for run in runs}
    stages = [{**asdict(row), "settings": settings[row.run]} for row in report.stages]
    return {"slurm": report.slurm, "stages": stages}


def status_view(runs: Sequence[RunRef], report: StatusReport) -> RenderableType:
    """Tables of stages and of sweeps, long reasons, and why Slurm could not be queried."""
    swept = [run for run in runs if run.settings]
    names = {run.name for run in swept}
    rows = [row for row in report.stages if row.run not in names]
    parts: list[RenderableType] = []
    if rows:
        parts.append(stage_table(rows))
    if swept:
        parts.append(sweep_table(swept, [row for row in report.stages if row.run in names]))
    several = len({row.run for row in report.stages}) > 1
    parts += _evaluations(report.stages, several=several)
    for row in report.stages:
        if len(row.reason) > _LONGEST_REASON or "\n" in row.reason:
            name = f"{row.run}, {row.stage}" if several else row.stage
            parts.append(styled_text((f"{name} {row.state}: ", _STYLES[row.state]), row.reason))
    parts += _without_nodes(report.stages, several=several)
    if report.slurm is not None:
        parts.append(
            styled_text((f"Slurm does not answer, so this is from the run folders alone: {report.slurm}", "yellow"))
        )
    return Group(*parts)


def _without_nodes(rows: Sequence[StageStatus], *, several: bool) -> list[RenderableType]:
    """A line for each faulty node with the stages that wait or run without it, and one for those that may use it."""
    stages: dict[tuple[str, str, str], list[str]] = {}
    for row in rows:
        for how, nodes in (("without", row.excluded_nodes), ("may run on", row.faulty_nodes)):
            for node in nodes:
                name = f"{row.run}, {row.stage}" if several else row.stage
                stages.setdefault((how, node.name, node.text), []).append(name)
    return [
        styled_text((f"{'; '.join(names)}: {how} {node}: ", "yellow"), text)
        for (how, node, text), names in stages.items()
    ]


def _evaluations(rows: Sequence[StageStatus], *, several: bool) -> list[RenderableType]:
    """A table of the reports of evaluations, if there are any, and those that cannot be read."""
    found = [(f"{row.run}, {row.stage}" if several else row.stage, one) for row in rows for one in row.evaluations]
    intact = [(stage, one) for stage, one in found if not one.problem]
    parts: list[RenderableType] = [Text(), evaluation_table(intact)] if intact else []
    return parts + [styled_text((f"{stage}: ", "yellow"), one.problem) for stage, one in found if one.problem]


def stage_table(rows: Sequence[StageStatus]) -> Table:
    """A row for each stage; columns that would be empty are left out."""
    cells = {heading: [cell(row) for row in rows] for heading, cell in _COLUMNS.items()}
    if len(set(cells["run"])) == 1:
        del cells["run"]
    cells = {heading: column for heading, column in cells.items() if any(column) or heading in _ALWAYS_SHOWN}
    table = make_table(*cells, right=_NUMBERS)
    for number, row in enumerate(rows):
        last_of_run = number + 1 < len(rows) and rows[number + 1].run != row.run
        table.add_row(
            *(_cell(heading, column[number], row.state) for heading, column in cells.items()), end_section=last_of_run
        )
    return table


def sweep_table(runs: Sequence[RunRef], rows: Sequence[StageStatus]) -> Table:
    """A row for each run: its settings, its current stage, and the top-1 of each stage."""
    keys = list(dict.fromkeys(key for run in runs for key in run.settings))
    evaluated = list(dict.fromkeys(row.stage for row in rows if row.top1 is not None))
    top1_headings = [f"top-1 {stage}" for stage in evaluated]
    table = make_table("run", *keys, *_SWEEP_COLUMNS, *top1_headings, right=(*keys, *_NUMBERS, *top1_headings))
    for run in runs:
        of_run = [row for row in rows if row.run == run.name]
        current = current_stage(of_run)
        state: State = current.state if current else "not started"
        top1 = {row.stage: row.top1 for row in of_run}
        table.add_row(
            run.name,
            *(run.settings.get(key, "-") for key in keys),
            *(_cell(heading, _COLUMNS[heading](current) if current else "", state) for heading in _SWEEP_COLUMNS),
            *("-" if top1.get(stage) is None else f"{top1[stage]:.2%}" for stage in evaluated),
        )
    return table


def current_stage(rows: Sequence[StageStatus]) -> StageStatus | None:
    """The first stage of a run that is running, else the first that is not done, else the last."""
    running = [row for row in rows if row.state == "running"]
    unfinished = [row for row in rows if row.state != "done"]
    return next(iter([*running, *unfinished, *rows[-1:]]), None)


def _cell(heading: str, text: str, state: State) -> Text:
    return styled_text((text or "-", _STYLES[state] if heading == "state" else ""))


def _steps(row: StageStatus) -> str:
    if row.step is None and row.steps is None:
        return ""
    return f"{row.step or 0:,}" + ("" if row.steps is None else f"/{row.steps:,}")


def _shortened(reason: str) -> str:
    first = reason.partition("\n")[0]
    return first if len(reason) <= _LONGEST_REASON else f"{first[: _LONGEST_REASON - 1].rstrip()}…"
