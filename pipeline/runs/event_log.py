"""The event log of a stage: what happened to it, in order, over all its starts.

`events.jsonl` has one JSON object on a line, with `time`, `event` and the facts of that event.
"""

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from pathlib import Path
from typing import Any

from data.files.json_records import parse_json
from data.files.regular_file import open_regular
from pipeline.errors import RunFailed
from pipeline.runs.json_lines import append_json_line, note_skipped

log = logging.getLogger(__name__)

STARTS_WITHOUT_PROGRESS = 3


class Event(StrEnum):
    """The kinds of entries."""

    BEGIN = "begin"
    """All ranks of a start have joined."""
    START = "start"
    """Training begins at step 0."""
    RESUME = "resume"
    """Training continues from a checkpoint."""
    CHANGE = "change"
    """A resume computes with something else than the start that saved its checkpoint."""
    EXTEND = "extend"
    """Settings of the stage were changed by `--extend`: which, and from which step on."""
    BRANCH = "branch"
    """The run is a branch that has left another one: which, and by which settings, from which step on."""
    WEIGHTS = "weights"
    """A start takes its weights from the checkpoint of another stage: which, and what of them is resized or new."""
    SAVE = "save"
    SAVE_FAILED = "save_failed"
    REMOVAL_FAILED = "removal_failed"
    """Of an old checkpoint."""
    CHECKPOINT_DAMAGED = "checkpoint_damaged"
    EVALUATION = "evaluation"
    SAMPLE_SKIPPED = "sample_skipped"
    NOT_FINITE = "not_finite"
    ROLL_BACK = "roll_back"
    MACHINE_FAULTY = "machine_faulty"
    """Two ranks computed the same micro-batch with different results: the step was not applied, and the start ended.
    The facts: `step`, from 1; `kinds` of values: loss, gradient, statistics; `nodes` to go on without, none if it is
    not clear which are wrong; `devices` of the ranks that are or may be wrong, each with its `rank`, `node`, `device`,
    `uuid` and `values`; `last_passed`, the last step of the start whose check was passed, or null."""
    STOP = "stop"
    """A start ended by a signal or its time limit."""
    GAVE_UP = "gave_up"
    """A start was refused, since the ones before it made no progress."""
    FINISH = "finish"
    """The stage is done."""


_PROGRESS = (Event.SAVE, Event.FINISH, Event.GAVE_UP)
# Reasons to stop that say nothing about the run: a preemption, or a person. Starts that they end do not count, since an
# evaluation has nothing to save; those whose save failed do. A time limit, of which a scheduler warns with the other
# signals, would end every start of a stage that needs longer.
_REQUESTS = ("SIGTERM", "SIGHUP", "SIGINT")


@dataclass(frozen=True, slots=True)
class RunEvent:
    """One entry."""

    time: str
    """ISO 8601, with the zone of the machine that wrote it."""
    event: Event
    facts: Mapping[str, Any]
    """What belongs to the event, by name."""

    @property
    def seconds(self) -> float:
        """When it was recorded, in seconds since the epoch."""
        return datetime.fromisoformat(self.time).timestamp()

    @property
    def step(self) -> int:
        """Steps taken when it happened; -1 for events that have no step."""
        step = self.facts.get("step")
        return step if isinstance(step, int) else -1

    @property
    def top1(self) -> float | None:
        """Of an evaluation, 0 to 1."""
        top1 = self.facts.get("top1")
        return float(top1) if isinstance(top1, int | float) and 0 <= top1 <= 1 else None

    @classmethod
    def parse(cls, line: str) -> "RunEvent | None":
        """The entry on a line of the file; None for a line that was cut short or is no entry."""
        try:
            facts = parse_json(dict[str, Any], line)
            entry = cls(facts.pop("time"), Event(facts.pop("event")), facts)
            _ = entry.seconds
        except (ValueError, KeyError, TypeError, OverflowError):
            return None
        return entry


@dataclass(frozen=True, slots=True)
class EventLog:
    """The event log in the file at `path`; any rank may write."""

    path: Path

    def record(self, event: Event, **facts: Any) -> None:
        """Add an entry. On a full disk the entry is lost and the run goes on."""
        entry = {"time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "event": event.value, **facts}
        try:
            append_json_line(self.path, entry)
        except OSError as error:
            log.warning("not recorded in the event log (%s): %s", error.strerror, entry)

    def entries(self) -> list[RunEvent]:
        """All entries that can be read, oldest first; others are skipped with a warning."""
        lines: list[str] = []
        if self.path.exists():
            with open_regular(self.path) as file:
                lines = file.read().decode(errors="replace").split("\n")
        parsed = [(number, RunEvent.parse(line)) for number, line in enumerate(lines, 1) if line.strip()]
        if skipped := tuple(number for number, entry in parsed if entry is None):
            note_skipped(self.path, skipped)
        return [entry for _, entry in parsed if entry is not None]

    def of(self, event: Event) -> list[RunEvent]:
        """The entries of one kind, oldest first."""
        return [entry for entry in self.entries() if entry.event is event]

    def evaluated(self, step: int) -> bool:
        """Whether an evaluation after `step` steps is recorded that no later start from an earlier step has undone."""
        for entry in reversed(self.entries()):
            if entry.event is Event.EVALUATION and entry.step == step:
                return True
            if entry.event in (Event.START, Event.RESUME) and entry.step < step:
                return False
        return False

    def begin(self, ranks: int, node: str = "", pid: int | None = None) -> None:
        """Record a start of the stage on `ranks` ranks, whose leader is process `pid` of `node`.

        Raises:
            RunFailed: the last starts all ended without progress; the next call is let through again.
        """
        fruitless, on_request = 0, False
        for entry in reversed(self.entries()):
            if entry.event in _PROGRESS:
                break
            if entry.event is Event.STOP:
                save_failed = entry.facts.get("checkpoint", "") is None
                on_request = on_request or (entry.facts.get("reason") in _REQUESTS and not save_failed)
            elif entry.event is Event.BEGIN:
                fruitless, on_request = fruitless + (not on_request), False
        if fruitless >= STARTS_WITHOUT_PROGRESS:
            self.record(Event.GAVE_UP, starts=fruitless)
            raise RunFailed(
                f"{self.path.parent}: {fruitless} starts in a row ended without a new checkpoint; the logs and "
                "events.jsonl in this folder show why. If they ran out of time, lower checkpoint.every_steps or, for "
                f"an evaluation, raise the time limit. The same command makes {STARTS_WITHOUT_PROGRESS} more attempts"
            )
        self.record(Event.BEGIN, ranks=ranks, node=node, pid=pid)
