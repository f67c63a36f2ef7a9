"""Tables of `coatnet status`: a row for each stage, or for each run of a sweep."""

from collections.abc import Callable, Sequence

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from jobs.run_discovery import RunRef
from jobs.scheduler.stage_status import StageStatus, State, StatusReport, clock, duration

_LONGEST_REASON = 44
"""Longer ones stand below the table."""
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
_LEFT = ("run", "stage", "state", "reason", "nodes", "checkpoint")
_ALWAYS = ("stage", "state", "step")
_COLUMNS: dict[str, Callable[[StageStatus], str]] = {
    "run": lambda row: row.run,
    "stage": lambda row: row.stage,
    "job": lambda row: row.job or "",
    "state": lambda row: row.state,
    "reason": lambda row: _short(row.reason),
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


def status_view(runs: Sequence[RunRef], report: StatusReport) -> RenderableType:
    """Everything that a person sees: tables, long reasons, and that Slurm could not be asked."""
    swept = [run for run in runs if run.settings]
    names = {run.name for run in swept}
    rows = [row for row in report.stages if row.run not in names]
    parts: list[RenderableType] = []
    if rows:
        parts.append(stage_table(rows))
    if swept:
        parts.append(sweep_table(swept, [row for row in report.stages if row.run in names]))
    several = len({row.run for row in report.stages}) > 1
    for row in report.stages:
        if len(row.reason) > _LONGEST_REASON or "\n" in row.reason:
            where = f"{row.run}, {row.stage}" if several else row.stage
            parts.append(Text.assemble((f"{where} {row.state}: ", _STYLES[row.state]), row.reason))
    if report.slurm is not None:
        parts.append(Text(f"Slurm does not answer, so this is what the folders say: {report.slurm}", "yellow"))
    return Group(*parts)


def stage_table(rows: Sequence[StageStatus]) -> Table:
    """One row for each stage; columns that would be empty are left out."""
    cells = {heading: [cell(row) for row in rows] for heading, cell in _COLUMNS.items()}
    if len(set(cells["run"])) == 1:
        del cells["run"]
    cells = {heading: column for heading, column in cells.items() if any(column) or heading in _ALWAYS}
    table = _table(list(cells))
    for number, row in enumerate(rows):
        last = number + 1 < len(rows) and rows[number + 1].run != row.run
        table.add_row(
            *(_cell(heading, column[number], row.state) for heading, column in cells.items()), end_section=last
        )
    return table


def sweep_table(runs: Sequence[RunRef], rows: Sequence[StageStatus]) -> Table:
    """One row for each run: what sets it apart, the stage that it is at, and the top-1 of each stage."""
    keys = list(dict.fromkeys(key for run in runs for key in run.settings))
    evaluated = list(dict.fromkeys(row.stage for row in rows if row.top1 is not None))
    accuracies = {stage: f"top-1 {stage}" for stage in evaluated}
    table = _table(["run", *keys, "stage", "state", "reason", "step", "loss", *accuracies.values()])
    for run in runs:
        of_run = [row for row in rows if row.run == run.name]
        at = current(of_run)
        top1 = {row.stage: row.top1 for row in of_run}
        table.add_row(
            run.name,
            *(run.settings.get(key, "-") for key in keys),
            *(_cell(name, _COLUMNS[name](at) if at else "", at.state if at else "not started") for name in _AT),
            *("-" if top1.get(stage) is None else f"{top1[stage]:.2%}" for stage in evaluated),
        )
    return table


_AT = ("stage", "state", "reason", "step", "loss")


def current(rows: Sequence[StageStatus]) -> StageStatus | None:
    """The stage that a run is at: one that runs, else the first that is not done, else the last."""
    running = [row for row in rows if row.state == "running"]
    left = [row for row in rows if row.state != "done"]
    return next(iter([*running, *left, *rows[-1:]]), None)


def _table(headings: Sequence[str]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 0, 0, 1))
    for heading in headings:
        table.add_column(heading, justify="left" if heading in _LEFT else "right", overflow="fold")
    return table


def _cell(heading: str, text: str, state: State) -> Text:
    return Text(text or "-", _STYLES[state] if heading == "state" else "")


def _steps(row: StageStatus) -> str:
    if row.step is None and row.steps is None:
        return ""
    return f"{row.step or 0:,}" + ("" if row.steps is None else f"/{row.steps:,}")


def _short(reason: str) -> str:
    first = reason.partition("\n")[0]
    return first if len(reason) <= _LONGEST_REASON else f"{first[: _LONGEST_REASON - 1].rstrip()}…"
