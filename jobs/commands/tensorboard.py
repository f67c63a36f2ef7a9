"""`coatnet tensorboard`: the curves of a run in TensorBoard, or as CSV."""

import csv
import getpass
import io
import logging
import os
import shlex
import socket
import sys
import threading
import webbrowser
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Annotated

import typer

from data.files.atomic_file import write_atomically
from data.text.counted import counted
from jobs.console import make_console, print_line, print_warning
from jobs.exit_codes import exit_on_error
from jobs.run_discovery import RunRef, find_runs
from pipeline.errors import ConfigError
from pipeline.monitoring.console import PrintableConsole

_LOOPBACK = "127.0.0.1"
_PORTS = range(6006, 6106)
_NOWHERE = "-"


def tensorboard(
    target: Annotated[
        Path | None,
        typer.Argument(
            metavar="[RECIPE|RUN]",
            help="A recipe file, a run folder (runs/NAME), the folder of one of its stages, or a folder of runs.",
            show_default="./runs",
        ),
    ] = None,
    port: Annotated[
        int | None, typer.Option(min=1, max=65535, help="The port to serve at.", show_default="6006 or the next free")
    ] = None,
    open_browser: Annotated[bool, typer.Option("--open", help="Open it in this machine's browser.")] = False,
    csv_file: Annotated[
        Path | None,
        typer.Option(
            "--csv", metavar="FILE", help="Instead, write all points of all curves to FILE, or to - (stdout)."
        ),
    ] = None,
) -> None:
    """Show the curves of a run in TensorBoard on this machine until Ctrl-C, or write them as CSV."""
    with exit_on_error("the runs are not affected"):
        runs = find_runs(target)
        from pipeline.monitoring.curves import has_curves  # numpy and TensorBoard take a second

        if not any(has_curves(_folder(run)) for run in runs):
            shown = ", ".join(os.path.relpath(run.path) for run in runs[:4]) or os.path.relpath(target or Path("runs"))
            raise ConfigError(f"{shown}: no curves yet; they begin with the first step of a run")
        if csv_file is not None:
            _write_csv(runs, csv_file)
        else:
            _serve(runs, port, open_browser)


def _folder(run: RunRef) -> Path:
    return run.path / run.only if run.only else run.path


def _write_csv(runs: Sequence[RunRef], destination: Path) -> None:
    from pipeline.monitoring.curves import COLUMNS, has_curves, write_csv
    from pipeline.monitoring.event_reader import read_events, read_stage_events
    from pipeline.runs.evaluation_report import TENSORBOARD, report_folders

    text, count, notes = io.StringIO(), 0, PrintableConsole(stderr=True)
    csv.writer(text, lineterminator="\n").writerow(COLUMNS)
    for run in runs:
        for stage in run.stages():
            folder = run.folder(stage)
            logs = {stage: read_stage_events(folder)}
            for report in report_folders(folder.path):
                logs[f"{stage}/{report.relative_to(folder.path)}"] = read_events(report / TENSORBOARD)
            for replay in sorted(path for path in folder.replays.glob("*") if has_curves(path)):
                logs[f"{stage}/{replay.relative_to(folder.path)}"] = read_events(replay)
            for name, recorded in logs.items():
                count += write_csv(text, run.name, name, recorded.scalars)
                for problem in recorded.problems:
                    print_warning(notes, f"{run.name}/{name}: {problem}")
    if str(destination) == _NOWHERE:
        sys.stdout.write(text.getvalue())
        return
    try:
        write_atomically(destination, text.getvalue())
    except OSError as error:
        raise ConfigError(f"--csv {destination}: {error.strerror}") from None
    print_line(make_console(), f"{destination}: {counted(count, 'point')}")


def _serve(runs: Sequence[RunRef], port: int | None, open_browser: bool) -> None:
    from tensorboard import program

    chosen, shown = port or _free_port(), _log_folder(runs)
    server = program.TensorBoard()
    # The slower loader needs no second process, and says nothing of its own.
    server.configure(argv=["tensorboard", *shown, "--host", _LOOPBACK, "--port", str(chosen), "--load_fast=false"])
    logging.getLogger("tensorboard").setLevel(logging.ERROR)  # it warns about every restart of a run
    try:
        server.launch()
    except program.TensorBoardServerException as error:
        raise ConfigError(f"--port {chosen}: {error.msg}; leave --port out to take a free one") from None
    url, console = f"http://{_LOOPBACK}:{chosen}/#custom_scalars", make_console()
    print_line(console, "TensorBoard is at ", (url, "bold"))
    login = f"{getpass.getuser()}@{socket.gethostname()}"
    print_line(console, f"From another computer, first: ssh -N -L {chosen}:{_LOOPBACK}:{chosen} {shlex.quote(login)}")
    print_line(console, "It shows what this machine can read, and has no password; Ctrl-C ends it.")
    console.file.flush()
    if open_browser and not webbrowser.open(url):
        print_line(console, "--open: this machine has no browser; open the address yourself")
    with suppress(KeyboardInterrupt):
        threading.Event().wait()
    print_line(console, "TensorBoard has ended")


def _log_folder(runs: Sequence[RunRef]) -> list[str]:
    """The option with what it shows. Names of runs and stages are those of folders below."""
    if len(runs) == 1:
        return ["--logdir", str(_folder(runs[0]))]
    if any(run.settings for run in runs):  # a sweep, among other runs in one folder; its names have no commas or colons
        return ["--logdir_spec", ",".join(f"{run.name}:{run.path}" for run in runs)]
    return ["--logdir", str(runs[0].path.parent)]


def _free_port() -> int:
    for port in (*_PORTS, 0):
        with socket.socket() as tried, suppress(OSError):
            tried.bind((_LOOPBACK, port))
            return int(tried.getsockname()[1])
    raise ConfigError("there is no free port on this machine")
