"""What `coatnet evaluate` prints: a progress bar, and the report in tables."""

import json
import os
from collections.abc import Sequence
from contextlib import nullcontext

from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as ProgressBar
from rich.table import Table
from rich.text import Text

from data.files.json_records import to_json
from jobs.console import make_console, make_table, print_line
from pipeline.evaluation.model_evaluation import EvaluationRequest, Progress, evaluate_here
from pipeline.monitoring.console import styled_text
from pipeline.monitoring.output import redirect_output
from pipeline.runs.evaluation_report import EvaluationReport
from pipeline.runs.evaluation_summary import summary_rows
from pipeline.runs.run_folder import RunFolder

_ALL_CLASSES = 20
"""Up to as many are all in the table, of more the worst ones."""
_ROWS = 10


def evaluate_and_print(request: EvaluationRequest, *, as_json: bool) -> None:
    """Evaluate as one process or rank, and print the report on the leader: as JSON, or in tables."""
    rank = int(os.environ.get("RANK", 0))
    if "RANK" in os.environ:
        logs = RunFolder(request.folder)
        logs.logs.mkdir(parents=True, exist_ok=True)
        console = redirect_output(logs, rank)
    else:
        console = make_console()
    shows = rank == 0 and not as_json
    bar = ProgressBar(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
        disable=not (shows and console.is_terminal),
        transient=True,
    )
    task = bar.add_task("images", total=None)

    def say(line: str) -> None:
        if shows:
            print_line(console, line)

    progress = Progress(say, lambda total: bar.update(task, total=total), lambda count: bar.update(task, advance=count))
    with bar if shows else nullcontext():
        report = evaluate_here(request, progress)
    if report is None:
        return
    if as_json:
        document = {"folder": str(request.folder), **to_json(report)}
        print_line(console, json.dumps(document, indent=1).replace("\x7f", "\\u007f"))
        return
    for part in report_tables(report):
        console.print(part)
    console.print()
    print_line(console, f"{request.folder}: {', '.join(['evaluation.json', *report.files.values()])}")
    for what, why in report.left_out.items():
        print_line(console, f"no {what}: {why}")


def report_tables(report: EvaluationReport) -> list[Table | Text]:
    """The figures over all classes, the worst classes, the most confused pairs, and samples that do not count."""
    overview = make_table("", "")
    overview.show_header = False
    for name, value in summary_rows(report):
        overview.add_row(*map(styled_text, (name, value)))
    parts: list[Table | Text] = [overview, Text(), _class_table(report)]
    if report.confused:
        pairs = make_table(
            "class", "taken for", "samples", "of the class", right=("samples", "of the class"), title="most confused"
        )
        for pair in report.confused[:_ROWS]:
            cells = pair.true, pair.predicted, f"{pair.samples:,}", f"{pair.share:.1%}"
            pairs.add_row(*map(styled_text, cells))
        parts += [Text(), pairs]
    if report.unusable:
        broken = make_table(
            "shard", "sample", "reason", title=f"samples that cannot be used: {report.figures.skipped:,}"
        )
        for one in report.unusable[:_ROWS]:
            broken.add_row(*map(styled_text, (one.shard, one.key, one.reason)))
        parts += [Text(), broken]
    if report.not_finite:
        text = (
            f"{report.not_finite:,} samples have logits that are not finite; the loss may be NaN, and calibration and "
            "mistakes leave them out"
        )
        parts.append(styled_text(("warning: ", "yellow"), text))
    return parts


def _class_table(report: EvaluationReport) -> Table:
    present = {name: row for name, row in report.classes.items() if row.samples}
    shown = list(present)
    title = "classes"
    if len(present) > _ALL_CLASSES:
        shown = sorted(present, key=lambda name: (present[name].top1 or 0.0, -present[name].samples))[:_ROWS]
        title = f"the {len(shown)} worst of {len(present):,} classes"
    average = report.average_precision is not None
    headings = ["class", "samples", report.best_name, "top-5", "precision", *(["average precision"] if average else [])]
    table = make_table(*headings, right=headings[1:], title=title)
    for name in shown:
        row = present[name]
        shares: Sequence[float | None] = [
            row.top1,
            row.top5,
            row.precision,
            *([row.average_precision] if average else []),
        ]
        label = f"{name} {row.display_name}" if row.display_name and row.display_name != name else name
        cells = f"{row.samples:,}", *("-" if share is None else f"{share:.1%}" for share in shares)
        table.add_row(*map(styled_text, (label, *cells)))
    return table
