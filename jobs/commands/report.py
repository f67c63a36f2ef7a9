"""`coatnet report`: a run as one HTML file."""

from pathlib import Path
from typing import Annotated

import typer

from jobs.commands.arguments import RunPath
from jobs.console import make_console, print_line, print_warning
from jobs.exit_codes import exit_on_error


def report(
    run: RunPath,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="The file to write.", show_default="report.html in the run folder"),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a file that is not an earlier report.")
    ] = False,
) -> None:
    """Write a run as one HTML file: recipe, machine, curves, what happened, evaluations."""
    with exit_on_error():
        from jobs.report.write import write_report
        from jobs.run_discovery import find_run

        found = find_run(run)
        written = write_report(found, out or found.path / "report.html", overwrite=overwrite)
        console = make_console()
        for what in written.missing:
            print_warning(console, f"not in the report: {what}")
        print_line(console, f"{written.path}: {written.stages}, {written.kilobytes:,} kB; open it in a browser")
