"""A replay on the screen: what was recomputed beside what was logged, and what is inside the step of interest."""

import statistics
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from data.text.counted import counted
from jobs.console import make_table, print_line, print_warning
from pipeline.monitoring.console import styled_text
from pipeline.replay.report import CauseRow, Number, ReplayReport, SampleRow, StepRow

_MOST_STEPS = 40
_MOST_SAMPLES = 8
_STANDS_OUT = 10.0
"""A sample is named whose gradient is so many times the median."""
COLOURS = {"equal": "green", "rounding": "", "different": "red"}


def show_replay(report: ReplayReport, out: Path, console: Console) -> None:
    """Print the steps, the inside of the first step of interest, and where the rest is."""
    print_line(console, (f"{report.stage} of {report.run}", "bold"))
    console.print(_steps(report))
    interest = next((row for row in report.steps if row.step == report.first), None)
    for row in report.steps:
        _show_not_finite(row, console)
    if interest is not None and interest.samples:
        console.print()
        which = f"the highest and the lowest losses, of {len(interest.samples):,} samples"
        all_shown = len(interest.samples) <= 2 * _MOST_SAMPLES
        print_line(console, (f"step {interest.step:,}: {'samples by loss' if all_shown else which}", "bold"))
        console.print(_samples(interest.samples))
        _show_largest_gradient(interest.samples, console)
    if interest is not None and interest.blocks:
        console.print()
        print_line(console, (f"step {interest.step:,}: norms of each block", "bold"))
        console.print(_blocks(interest))
    console.print()
    for remark in report.remarks:
        print_warning(console, remark)
    if report.holds:
        print_line(console, report.verdict)
    else:
        print_warning(console, f"the log is not what was recomputed: {report.verdict}")
    pictures = [row.picture for row in report.steps if row.picture]
    print_line(console, f"{out}: {', '.join(['replay.json', *pictures[:3]])}{', ...' if len(pictures) > 3 else ''}")


def _steps(report: ReplayReport) -> Table:
    columns = ("step", "loss", "logged", "gradient norm", "logged", "learning rate", "logged", "")
    table = make_table(*columns, right=columns[:-1])
    rows = _some(report.steps)
    for before, row in zip((None, *rows), rows, strict=False):
        if before is not None and before.step + 1 < row.step:
            table.add_row("...")
        logged = row.logged
        table.add_row(
            f"{row.step:,}",
            short(row.loss),
            short(logged.loss if logged else None),
            short(row.gradient_norm),
            short(logged.gradient_norm if logged else None),
            short(row.learning_rate),
            short(logged.learning_rate if logged else None),
            styled_text((_remark(row), COLOURS.get(row.agreement or "", ""))),
        )
    return table


def _some(rows: Sequence[StepRow]) -> list[StepRow]:
    """All rows, or the first and the last of many."""
    if len(rows) <= _MOST_STEPS:
        return list(rows)
    half = _MOST_STEPS // 2
    return [*rows[:half], *rows[-half:]]


def _remark(row: StepRow) -> str:
    parts = {"equal": "equal to the bit", "rounding": "within rounding", "different": "different", None: ""}
    found = ["branch" if row.branch else parts[row.agreement], "not applied" if row.applied is False else ""]
    found.append(f"{counted(len(row.skipped), 'sample')} replaced" if row.skipped else "")
    return ", ".join(filter(None, found))


def _show_not_finite(row: StepRow, console: Console) -> None:
    for found in row.not_finite:
        of = "" if found.elements is None else f", {found.elements:,} of {found.of:,} elements"
        samples = f", samples {', '.join(found.samples[:_MOST_SAMPLES])}" if found.samples else ""
        print_line(
            console,
            ("not finite: ", "red"),
            f"step {row.step:,}, micro-batch {found.micro_batch}: first the {found.kind} of {found.name}{of}{samples}",
        )
    for cause in row.causes:
        where = f"step {row.step:,}, micro-batch {cause.micro_batch}"
        print_line(console, ("cause: ", "red"), f"{where}: {_cause(cause)} ({counted(cause.trials, 'trial')})")


def _cause(cause: CauseRow) -> str:
    if not cause.samples:
        return cause.explanation
    names, first = ", ".join(cause.samples), f", first the {cause.module}" if cause.module else ""
    if len(cause.samples) == 1:
        return f"{names} alone makes it not finite{first}"
    return f"{names} together, none of which can be left out, make it not finite{first}"


def _show_largest_gradient(samples: Sequence[SampleRow], console: Console) -> None:
    """Of a sample that stands out: its loss may be one of many."""
    known = [(_sortable(one.gradient), one) for one in samples if one.gradient is not None]
    if known:
        largest, sample = max(known, key=lambda found: found[0])
        median = statistics.median(value for value, _ in known)
        if _STANDS_OUT * median < largest < float("inf"):
            times = f"{largest / median:,.3g} times the median" if median else "the others have none"
            print_line(console, f"the largest gradient at the stem is that of {sample.name}: {times}")


def _samples(samples: Sequence[SampleRow]) -> Table:
    is_mixed = any(one.mixed_with for one in samples)
    has_gradients = any(one.gradient is not None for one in samples)
    columns = ["loss", *(["gradient"] if has_gradients else [])]
    columns += ["sample", "labels", "prediction", "probability", "of the label"]
    table = make_table(
        *columns, *(["mixed with"] if is_mixed else []), right=("loss", "gradient", "probability", "of the label")
    )
    order = sorted(samples, key=lambda one: (-_sortable(one.loss), one.position))
    left_out = len(order) > 2 * _MOST_SAMPLES
    for one in order[:_MOST_SAMPLES] if left_out else order:
        table.add_row(*_sample(one, has_gradients, is_mixed))
    if left_out:
        table.add_row("...")
        for one in order[-_MOST_SAMPLES:]:
            table.add_row(*_sample(one, has_gradients, is_mixed))
    return table


def _sample(one: SampleRow, has_gradients: bool, is_mixed: bool) -> list[str]:
    texts = (one.name, ", ".join(one.labels), one.prediction)
    mixed = "-" if one.mixed_with is None or one.weight is None else f"{1 - one.weight:.0%} {one.mixed_with}"
    return [
        short(one.loss),
        *([short(one.gradient)] if has_gradients else []),
        *(str(styled_text(text)) for text in texts),
        _share(one.probability),
        _share(one.label_probability),
        *([mixed] if is_mixed else []),
    ]


def _blocks(row: StepRow) -> Table:
    columns = {
        "weight": [block.weight for block in row.blocks],
        "gradient": [block.gradient for block in row.blocks],
        "update": [block.update for block in row.blocks],
        "output": [block.output for block in row.blocks],
        "gradient of the output": [block.output_gradient for block in row.blocks],
    }
    known = {name: values for name, values in columns.items() if any(value is not None for value in values)}
    table = make_table("block", *known, right=tuple(known))
    for block, *values in zip(row.blocks, *known.values(), strict=True):
        table.add_row(block.name, *map(short, values))
    return table


def _sortable(loss: Number) -> float:
    value = float(loss)
    return value if abs(value) < float("inf") else float("inf")


def short(value: Number | None) -> str:
    return "-" if value is None else value if isinstance(value, str) else f"{value:.6g}"


def _share(value: Number) -> str:
    return value if isinstance(value, str) else f"{value:.1%}"
