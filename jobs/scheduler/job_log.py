"""What the log of a Slurm job tells of its end: `slurm/launch.sh` writes a line when it starts and when it ends."""

import os
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

Kind = Literal["started", "done", "requeued", "stopped", "cancelled", "failed"]

_TAIL_BYTES = 256 * 1024
_LINE = re.compile(r"^(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d) job (\d+)(?:_\d+)?: (.*)$")
_NOT_OURS = re.compile(r"^(slurmstepd|srun|slurmd)\b")
_ERROR = re.compile(r"^error: (.*)$")
_KINDS: tuple[tuple[str, Kind], ...] = (
    (r"start \d+ on (?P<nodes>\S+),.*", "started"),
    (r"done", "done"),
    (r"requeued: (?P<why>.*)", "requeued"),
    (r"could not be requeued.*", "stopped"),
    # Preempted jobs come back by themselves, so that what Slurm has ended was cancelled.
    (r"ended as (CANCELLED|COMPLETING)[^:]*: (?P<why>.*)", "cancelled"),
    (r"ended as [^:]*: (?P<why>.*)", "stopped"),
    (r"failed with exit code \d+, not requeued: (?P<why>.*)", "failed"),
    (r"failed: (?P<why>.*)", "failed"),
)
_WORST_FIRST: tuple[Kind, ...] = ("failed", "cancelled", "stopped", "requeued", "started", "done")


@dataclass(frozen=True, slots=True)
class JobOutcome:
    """The last that a job said of itself."""

    kind: Kind
    why: str = ""
    time: float = 0.0
    """When, in seconds since the epoch."""
    nodes: str = ""
    """Where its last start was, in Slurm's short form; empty if that is not in the end of the log."""


def tail(path: Path, bytes_: int = _TAIL_BYTES) -> list[str]:
    """The last lines of a file, the first of them whole; none if it cannot be read."""
    try:
        with open(path, "rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - bytes_))
            lines = file.read().decode(errors="replace").splitlines()
    except OSError:
        return []
    return lines[1:] if size > bytes_ else lines


def job_outcome(logs: Sequence[Path], job: str) -> JobOutcome | None:
    """What the job of that number said last; of the tasks of an array, the one with the worst end.

    None if it has not started.
    """
    found = [words for log in logs if (words := _of_one(log, job)) is not None]
    return min(found, key=lambda words: _WORST_FIRST.index(words.kind), default=None)


def _of_one(log: Path, job: str) -> JobOutcome | None:
    words: JobOutcome | None = None
    error = ""
    explains = False
    lines = tail(log)
    for line in lines:
        if match := _LINE.match(line):
            explains = False
            if match[2] == job:
                words = _said(match[3], match[1], words)
                explains = words is not None and words.kind in ("failed", "cancelled", "stopped")
                error = "" if words is not None and words.kind == "started" else error
        elif match := _ERROR.match(line):
            error, explains = match[1], False
        elif explains and words is not None and not _NOT_OURS.match(line):
            words = replace(words, why=f"{words.why}\n{line}".rstrip())  # a reason of several lines
    if words is None:
        # It ran, and has said so much since that its beginning is far above.
        whole = not lines or log.stat().st_size <= _TAIL_BYTES
        return None if whole or any(map(_LINE.match, lines)) else JobOutcome("started", error, log.stat().st_mtime)
    return replace(words, why=error) if error and (not words.why or words.why.startswith("srun ended")) else words


def _said(text: str, when: str, before: JobOutcome | None) -> JobOutcome | None:
    for pattern, kind in _KINDS:
        if match := re.fullmatch(pattern, text):
            said = match.groupdict()
            # That it could not be requeued follows the reason why it was to be.
            why = said.get("why", before.why if before and kind == "stopped" else "")
            nodes = said.get("nodes") or (before.nodes if before else "")
            return JobOutcome(kind, why, time.mktime(time.strptime(when, "%Y-%m-%d %H:%M:%S")), nodes)
    return before
