"""`coatnet logs`: what a job, or a rank, has written; and what it writes."""

import codecs
import os
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import IO, TYPE_CHECKING, Annotated

import typer

from jobs.commands.status import RUN_HELP
from jobs.exit_codes import exit_on_error
from pipeline.errors import ConfigError

if TYPE_CHECKING:
    from jobs.run_discovery import RunRef
    from jobs.scheduler.stage_status import StageStatus

_POLL_SECONDS = 0.5
_LOOK_SECONDS = 10.0
"""How often is asked, while nothing new comes, whether anything still can."""


def logs(
    target: Annotated[Path, typer.Argument(metavar="RECIPE|RUN", help=RUN_HELP)],
    stage: Annotated[
        str | None, typer.Argument(metavar="[STAGE]", help="By default the one that has written last.")
    ] = None,
    follow: Annotated[bool, typer.Option("-f", "--follow", help="Go on until the job is over, or Ctrl-C.")] = False,
    lines: Annotated[int, typer.Option("-n", "--lines", min=0, help="How many of the last lines.")] = 100,
    rank: Annotated[int | None, typer.Option(min=0, help="The log of this rank, instead of the job's.")] = None,
) -> None:
    """Print the end of a job's log; of a run without Slurm, of rank 0's."""
    with exit_on_error("the run goes on"):
        from jobs.run_discovery import check_stages, run_at

        run = run_at(target)
        if stage is not None:
            check_stages([run], [stage])
        try:
            _show(run, stage, rank, lines, follow)
        except KeyboardInterrupt:
            return  # how one leaves it
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # `coatnet logs RUN | head`


def _show(run: "RunRef", stage: str | None, rank: int | None, lines: int, follow: bool) -> None:
    chosen = stage or _newest(run, rank)

    if chosen is None or (not _files(run, chosen, rank) and not (follow and _may_write(run, chosen))):
        what = "log" if rank is None else f"log of rank {rank}"
        which = f"stage {chosen} is {_words(run, chosen)}" if chosen else "nothing has started"
        raise ConfigError(f"{run.path}: no {what} yet: {which}; `coatnet status` shows all stages")
    printer = _Printer(lambda: _files(run, chosen, rank), lines)
    printer.print_end()
    if not follow:
        return
    looked = time.monotonic()
    lives = _may_write(run, chosen)
    while True:
        news = printer.print_news()
        if not news and not lives:
            return
        time.sleep(_POLL_SECONDS)
        if not news and time.monotonic() - looked > _LOOK_SECONDS:
            looked, lives = time.monotonic(), _may_write(run, chosen)  # what it wrote last is printed before the end


def _may_write(run: "RunRef", stage: str) -> bool:
    """Whether a process or a job of the stage lives, or may."""
    from jobs.scheduler import slurm

    status = _status(run, stage)
    if status.state in ("running", "waiting", "unknown"):
        return True
    try:  # a stage is done before its job is
        return status.job is not None and slurm.jobs([status.job])[status.job].lives
    except (ConfigError, slurm.SchedulerDown):
        return False


def _words(run: "RunRef", stage: str) -> str:
    status = _status(run, stage)
    return f"{status.state} ({status.reason})" if status.reason else status.state


def _status(run: "RunRef", stage: str) -> "StageStatus":
    from jobs.scheduler.stage_status import look

    return look([replace(run, only=stage)]).stages[0]


def _files(run: "RunRef", stage: str, rank: int | None) -> list[Path]:
    """The logs of a stage's jobs or, if it had none, of rank 0; those of a rank that was asked for."""
    of_rank = run.folder(stage).log_file(rank or 0)
    of_jobs = run.submissions.logs(stage) if rank is None else []
    return of_jobs or ([of_rank] if of_rank.exists() else [])


def _newest(run: "RunRef", rank: int | None) -> str | None:
    """The stage that wrote last."""
    written = {
        stage: max(file.stat().st_mtime for file in files)
        for stage in run.stages()
        if (files := _files(run, stage, rank))
    }
    return max(written, key=lambda stage: written[stage], default=None)


class _Printer:
    """Prints what files hold and get, each under its name where there are several, as `tail` does."""

    def __init__(self, files: Callable[[], list[Path]], lines: int) -> None:
        self._files = files
        self._lines = lines
        self._positions: dict[Path, int] = {}
        self._decoders: dict[Path, codecs.IncrementalDecoder] = {}
        self._last: Path | None = None

    def print_end(self) -> None:
        """The last lines of each."""
        for path in self._files():
            with open(path, "rb") as file:
                content = _last_lines(file, self._lines)
                self._positions[path] = file.tell()
            self._print(path, content)

    def print_news(self) -> bool:
        """What has come since; whether there was any."""
        news = False
        for path in self._files():
            position = self._positions.get(path, 0)
            size = path.stat().st_size
            if size == position:
                continue
            with open(path, "rb") as file:
                file.seek(position if size > position else 0)  # one that became shorter was written anew
                content = file.read()
                self._positions[path] = file.tell()
            self._print(path, content)
            news = True
        return news

    def _print(self, path: Path, content: bytes) -> None:
        if path != self._last and (self._last is not None or len(self._files()) > 1):
            separator = "\n" if self._last is not None else ""
            sys.stdout.write(f"{separator}==> {path.name} <==\n")
        self._last = path
        decoder = self._decoders.setdefault(path, codecs.getincrementaldecoder("utf-8")("replace"))
        sys.stdout.write(decoder.decode(content))
        sys.stdout.flush()


def _last_lines(file: IO[bytes], lines: int) -> bytes:
    """Read from the end: the log of a month may be large."""
    size = file.seek(0, os.SEEK_END)
    bytes_ = 64 * 1024
    while True:
        file.seek(max(0, size - bytes_))
        content = file.read()
        if bytes_ >= size or content.count(b"\n") > lines:
            return b"".join(content.splitlines(keepends=True)[-lines:]) if lines else b""
        bytes_ *= 4
