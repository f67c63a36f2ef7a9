"""`coatnet logs`: what a job or a rank has written, and what it is writing."""

import codecs
import os
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import IO, Annotated

import typer

from data.text.printable import one_line, printable
from jobs.commands.arguments import RunPath
from jobs.exit_codes import exit_on_error
from jobs.run_discovery import RunRef, check_stages, find_run
from jobs.scheduler import slurm
from jobs.scheduler.stage_status import StageStatus, stage_statuses
from pipeline.errors import ConfigError

_POLL_SECONDS = 0.5
_STATUS_SECONDS = 10.0
"""While nothing new is written, time between checks whether the stage has ended."""


def logs(
    target: RunPath,
    stage: Annotated[
        str | None,
        typer.Argument(metavar="[STAGE]", help="Whose log.", show_default="the stage that wrote last"),
    ] = None,
    follow: Annotated[
        bool, typer.Option("-f", "--follow", help="Keep printing until the job ends, or Ctrl-C.")
    ] = False,
    lines: Annotated[int, typer.Option("-n", "--lines", min=0, help="How many of the last lines to print.")] = 100,
    rank: Annotated[int | None, typer.Option(min=0, help="Print the log of this rank instead of the job's.")] = None,
) -> None:
    """Print the end of a job's log, or of rank 0's for a run without Slurm."""
    with exit_on_error("the run is not affected"):
        run = find_run(target)
        if stage is not None:
            check_stages([run], [stage])
        try:
            _show(run, stage, rank, lines, follow)
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # `coatnet logs RUN | head`


def _show(run: RunRef, stage: str | None, rank: int | None, lines: int, follow: bool) -> None:
    chosen = stage or _last_writer(run, rank)
    if chosen is None or (not _files(run, chosen, rank) and not (follow and _may_write(run, chosen))):
        what = "log" if rank is None else f"log of rank {rank}"
        why = f"stage {chosen} is {_state(run, chosen)}" if chosen else "nothing has started"
        raise ConfigError(f"{run.path}: no {what} yet: {why}; `coatnet status` shows all stages")
    printer = _LogPrinter(lambda: _files(run, chosen, rank), lines)
    printer.print_end()
    if not follow:
        return
    checked, may_write = time.monotonic(), _may_write(run, chosen)
    while True:
        printed = printer.print_new()
        if not printed and not may_write:
            return
        time.sleep(_POLL_SECONDS)
        if not printed and time.monotonic() - checked > _STATUS_SECONDS:
            # The loop goes round once more after the end, for the last lines.
            checked, may_write = time.monotonic(), _may_write(run, chosen)


def _may_write(run: RunRef, stage: str) -> bool:
    """Whether a process or job of the stage may still be alive."""
    status = _status(run, stage)
    if status.state in ("running", "waiting", "unknown"):
        return True
    try:  # a stage is done before its job is
        return status.job is not None and slurm.jobs([status.job])[status.job].lives
    except (ConfigError, slurm.SchedulerDown):
        return False


def _state(run: RunRef, stage: str) -> str:
    status = _status(run, stage)
    return f"{status.state} ({status.reason})" if status.reason else status.state


def _status(run: RunRef, stage: str) -> StageStatus:
    return stage_statuses([replace(run, only=stage)]).stages[0]


def _files(run: RunRef, stage: str, rank: int | None) -> list[Path]:
    """The log of `rank`, if given; else the logs of the stage's jobs, or of rank 0 if there were none."""
    of_rank = run.folder(stage).log_file(rank or 0)
    of_jobs = run.submissions.logs(stage) if rank is None else []
    return of_jobs or ([of_rank] if of_rank.exists() else [])


def _last_writer(run: RunRef, rank: int | None) -> str | None:
    """The stage whose log is newest."""
    written = {
        stage: max(file.stat().st_mtime for file in files)
        for stage in run.stages()
        if (files := _files(run, stage, rank))
    }
    return max(written, key=lambda stage: written[stage], default=None)


class _LogPrinter:
    """Prints files and what is added to them, as `tail` does: with names if there are several."""

    def __init__(self, files: Callable[[], list[Path]], lines: int) -> None:
        self._files = files
        self._lines = lines
        self._positions: dict[Path, int] = {}
        self._decoders: dict[Path, codecs.IncrementalDecoder] = {}
        self._last: Path | None = None

    def print_end(self) -> None:
        """Print the last lines of each file."""
        for path in self._files():
            with open(path, "rb") as file:
                content = _last_lines(file, self._lines)
                self._positions[path] = file.tell()
            self._print(path, content)

    def print_new(self) -> bool:
        """Print what was written since the last call; returns whether there was anything."""
        printed = False
        for path in self._files():
            position = self._positions.get(path, 0)
            size = path.stat().st_size
            if size == position:
                continue
            with open(path, "rb") as file:
                file.seek(position if size > position else 0)  # a shorter file was written anew
                content = file.read()
                self._positions[path] = file.tell()
            self._print(path, content)
            printed = True
        return printed

    def _print(self, path: Path, content: bytes) -> None:
        if path != self._last and (self._last is not None or len(self._files()) > 1):
            separator = "\n" if self._last is not None else ""
            sys.stdout.write(f"{separator}==> {one_line(path.name)} <==\n")
        self._last = path
        decoder = self._decoders.setdefault(path, codecs.getincrementaldecoder("utf-8")("surrogateescape"))
        sys.stdout.write(printable(decoder.decode(content)))
        sys.stdout.flush()


def _last_lines(file: IO[bytes], lines: int) -> bytes:
    """The last lines, read from the end: the log of a month may be large."""
    size = file.seek(0, os.SEEK_END)
    bytes_ = 64 * 1024
    while True:
        file.seek(max(0, size - bytes_))
        content = file.read()
        if bytes_ >= size or content.count(b"\n") > lines:
            return b"".join(content.splitlines(keepends=True)[-lines:]) if lines else b""
        bytes_ *= 4
