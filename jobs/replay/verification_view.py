"""A verification on the screen."""

from pathlib import Path

from rich.console import Console

from jobs.console import make_table, print_line, print_warning
from jobs.replay.view import COLOURS, short
from pipeline.monitoring.console import styled_text
from pipeline.replay.logged_steps import TAGS
from pipeline.replay.verification import REPORT, VerificationReport

_RESULTS = {"equal": "equal to the bit", "rounding": "within rounding", "different": "different", None: ""}


def show_verification(report: VerificationReport, out: Path, console: Console) -> None:
    """Print the steps, the checkpoints, and what does not hold."""
    columns = ("step", "loss", "logged", "gradient norm", "logged", "learning rate", "logged", "")
    table = make_table(*columns, right=columns[:-1], title=f"{report.stage} of {report.run}")
    for one in report.steps:
        pairs = [(getattr(one.replayed, name), getattr(one.logged, name)) for name in TAGS]
        table.add_row(
            f"{one.step:,}",
            *(short(value) for pair in pairs for value in pair),
            styled_text((_RESULTS[one.agreement], COLOURS.get(one.agreement or "", ""))),
        )
    console.print(table)
    console.print()
    if report.why_not_bits:
        print_line(console, f"values may differ by rounding: {'; '.join(report.why_not_bits)}")
    print_line(console, f"steps: {report.verdict}")
    for state in report.states:
        print_line(console, f"{state.location.rpartition('/')[2]}: {state.text}")
    for problem in report.problems:
        print_line(console, ("does not hold: ", "red"), problem)
    for remark in report.remarks:
        print_warning(console, remark)
    if report.holds:
        print_line(console, ("the log holds", "green"), ": what was recomputed is what the run has logged and saved")
    print_line(console, f"{out / REPORT}")
