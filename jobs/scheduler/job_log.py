"""How a Slurm job ended, from its log: `slurm/launch.sh` writes a line at each start and each end."""

import os
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

Kind = Literal["started", "done", "requeued", "stopped", "cancelled", "failed"]

_TAIL_BYTES = 256 * 1024
_NEXT_LINE = "  "  # what the lines of a message begin with after the first, see `data.text.printable.printable_message`
_LINE = re.compile(r"^(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d) job (\d+)(?:_\d+)?: (.*)$", re.ASCII)
_ERROR = re.compile(r"^error: (.*)$")
_KINDS: tuple[tuple[str, Kind], ...] = (
    (r"start \d+ on (?P<nodes>\S+),.*", "started"),
    (r"done", "done"),
    (r"requeued: (?P<why>.*)", "requeued"),
    (r"could not be requeued.*", "stopped"),
    # Slurm requeues preempted jobs, so a job that Slurm ended was cancelled.
    (r"ended as (CANCELLED|COMPLETING)[^:]*: (?P<why>.*)", "cancelled"),
    (r"ended as [^:]*: (?P<why>.*)", "stopped"),
    (r"failed with exit code \d+, not requeued: (?P<why>.*)", "failed"),
    (r"failed: (?P<why>.*)", "failed"),
)
_WORST_FIRST: tuple[Kind, ...] = ("failed", "cancelled", "stopped", "requeued", "started", "done")


@dataclass(frozen=True, slots=True)
class JobOutcome:
    """The last start or end of a job, as its log has it."""

    kind: Kind
    why: str = ""
    time: float = 0.0
    """When, in seconds since the epoch."""
    nodes: str = ""
    """The nodes of its last start, in Slurm's short form; empty if the log read does not reach back to it."""


def tail(path: Path, bytes_: int = _TAIL_BYTES) -> list[str]:
    """The last complete lines of a file; none if it cannot be read."""
    try:
        with open(path, "rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - bytes_))
            lines = file.read().decode(errors="replace").splitlines()
    except OSError:
        return []
    return lines[1:] if size > bytes_ else lines


def job_outcome(logs: Sequence[Path], job: str) -> JobOutcome | None:
    """The outcome of the job with that number; of an array, that of the task with the worst one.

    None if it has not started.
    """
    outcomes = [outcome for log in logs if (outcome := _outcome_in(log, job)) is not None]
    return min(outcomes, key=lambda outcome: _WORST_FIRST.index(outcome.kind), default=None)


def _outcome_in(log: Path, job: str) -> JobOutcome | None:
    outcome: JobOutcome | None = None
    error = ""
    reason_continues = False
    lines = tail(log)
    for line in lines:
        if match := _LINE.match(line):
            reason_continues = False
            if match[2] == job:
                outcome = _parsed(match[3], match[1], outcome)
                reason_continues = outcome is not None and outcome.kind in ("failed", "cancelled", "stopped")
                error = "" if outcome is not None and outcome.kind == "started" else error
        elif match := _ERROR.match(line):
            error, reason_continues = match[1], False
        elif reason_continues and outcome is not None and line.startswith(_NEXT_LINE):
            outcome = replace(outcome, why=f"{outcome.why}\n{line.removeprefix(_NEXT_LINE)}".rstrip())
    if outcome is None:
        # It has printed so much since its start that the line of the start is out of reach.
        is_whole = not lines or log.stat().st_size <= _TAIL_BYTES
        return None if is_whole or any(map(_LINE.match, lines)) else JobOutcome("started", error, log.stat().st_mtime)
    unexplained = not outcome.why or outcome.why.startswith("srun ended")
    return replace(outcome, why=error) if error and unexplained else outcome


def _parsed(text: str, when: str, before: JobOutcome | None) -> JobOutcome | None:
    """The outcome after a line of launch.sh with this text."""
    for pattern, kind in _KINDS:
        if match := re.fullmatch(pattern, text):
            groups = match.groupdict()
            # The line that it could not be requeued follows the one with the reason.
            why = groups.get("why", before.why if before and kind == "stopped" else "")
            nodes = groups.get("nodes") or (before.nodes if before else "")
            try:
                seconds = time.mktime(time.strptime(when, "%Y-%m-%d %H:%M:%S"))
            except (ValueError, OverflowError):  # no such day
                return before
            return JobOutcome(kind, why, seconds, nodes)
    return before
