"""Detects a rank that hangs, from outside its training thread, and ends the run with a message that names the rank.

A hang shows on all ranks: the healthy ones wait for the one that hangs. So the first watchdog whose limit is exceeded
raises an alarm that reaches all ranks. Every rank writes the stacks of its threads to its log, and together they find
out which one is behind; see `hang_report.py`.
"""

import faulthandler
import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Literal, NamedTuple, Self

from data.errors import EXIT_TRY_AGAIN
from pipeline.errors import CONTINUES_IF_SAVED
from pipeline.faults.hang_report import (
    GATHER_SECONDS,
    RankPosition,
    alarm_reason,
    announce_node,
    describe_hang,
    gather_hang_report,
)
from pipeline.faults.preemption import EndProcess
from pipeline.ranks.distributed import KeyValueStore, connect_store
from pipeline.ranks.flight_recorder import PREFIX, save_flight_record
from pipeline.recipe.sections import WatchdogSettings

log = logging.getLogger(__name__)

SectionName = Literal[
    "setup", "step", "cross-check", "report", "histograms", "save", "evaluation", "verification", "inspection",
    "all-reduce", "burn-in", "reading", "writing",
]  # fmt: skip
Phase = Literal["reading", "computing", "exchanging"]

_POLL_SECONDS = 1.0
_SUSPENDED_SECONDS = 5.0
"""If a poll comes this late, the whole process was suspended: by Ctrl-Z, or by a scheduler in favour of another job."""


class _TimedSection(NamedTuple):
    name: str
    began: float
    """On the monotonic clock, moved forward by the duration of inner sections."""
    transitions: int
    """Sections entered and left before."""


class Watchdog:
    """From `with` on, ends this process if it or another rank makes no progress.

    Time is measured per section. The first section is `setup`, until another is entered; the time between two sections
    is a section called `loop`. The limit of a section is `least_seconds`, or `factor` times the longest section of the
    same name in this start. The first section of a name also compiles and warms up: its limit is at least
    `setup_seconds`.

    Args:
        settings: the limits.
        rank, world_size: of this process.
        node: name of this machine.
        log_file: receives the stacks.
        end: ends this process with an exit code and a message.
    """

    def __init__(
        self, settings: WatchdogSettings, rank: int, world_size: int, node: str, log_file: Path, end: EndProcess
    ) -> None:
        self._settings = settings
        self._rank, self._world_size, self._node = rank, world_size, node
        self._log_path = log_file
        self._end = end
        self._longest: dict[str, float] = {}
        self._depth = 0
        self._section = _TimedSection("setup", time.monotonic(), 0)
        self._at: tuple[str, int, int] = ("", 0, 0)
        self._store: KeyValueStore | None = None
        self._closed = threading.Event()
        self._alarm = threading.Event()

    def listen(self) -> None:
        """Start to listen for alarms of the other ranks; to be called once the process group exists."""
        if self._world_size > 1:
            threading.Thread(target=self._listen, name="alarms", daemon=True).start()

    @contextmanager
    def section(self, name: SectionName) -> Iterator[None]:
        """The body is one section, the same on all ranks; its time does not count towards an enclosing section."""
        outer, entered = self._section, time.monotonic()
        self._enter(name, entered)
        self._depth += 1
        yield  # no `finally`: an exception ends the run, and ending it may hang as well
        self._depth -= 1
        now = time.monotonic()
        seconds = now - self._section.began
        if seconds <= self._limit(name):  # otherwise the process was suspended
            self._longest[name] = max(seconds, self._longest.get(name, 0.0))
        if self._depth:
            self._enter(outer.name, outer.began + now - entered)
        else:
            self._enter("loop", now)

    def at(self, phase: Phase, step: int, micro_batch: int) -> None:
        """Record that this rank is in `phase` of its own micro-batch `micro_batch` of `step`, both from 0."""
        self._at = (phase, step, micro_batch)

    def __enter__(self) -> Self:
        self._log_file = open(self._log_path, "ab", buffering=0)
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is None:
            self._closed.set()

    def _enter(self, name: str, began: float) -> None:
        self._at = ("", self._at[1], 0)
        self._section = _TimedSection(name, began, self._section.transitions + 1)

    def _limit(self, name: str) -> float:
        """Seconds that a section may take."""
        settings, longest = self._settings, self._longest.get(name)
        if longest is None:
            return max(settings.setup_seconds, settings.least_seconds)
        return max(settings.least_seconds, settings.factor * longest)

    def _watch(self) -> None:
        suspensions: list[tuple[float, float]] = []  # end, seconds
        last = time.monotonic()
        while not self._closed.is_set():
            # A thread that never releases the interpreter lock stops this thread, too. Then faulthandler writes the
            # stacks without the lock, and the other ranks do the rest.
            faulthandler.dump_traceback_later(self._settings.least_seconds, file=self._log_file)
            alarmed = self._alarm.wait(_POLL_SECONDS)
            section, now = self._section, time.monotonic()
            if now - last > _SUSPENDED_SECONDS:
                suspensions.append((now, now - last))
            last = now
            seconds = now - section.began - sum(lost for end, lost in suspensions if end > section.began)
            limit = self._limit(section.name)
            if alarmed or seconds > limit:
                reason = f"rank {self._rank} has been in section {section.name} for {seconds:,.0f} s"
                self._report_hang(f"{reason}; the limit is {limit:,.0f} s")
        faulthandler.cancel_dump_traceback_later()

    def _listen(self) -> None:
        try:
            self._store = store = connect_store("watchdog")
            announce_node(store, self._rank, self._node)
            while not self._closed.wait(_POLL_SECONDS):
                if alarm_reason(store) is not None:
                    self._alarm.set()
                    return
        except RuntimeError as error:
            # The leader is gone. If that was unexpected, the training thread notices it.
            log.info("no longer listening for alarms of other ranks: %s", error)

    def _report_hang(self, reason: str) -> None:
        """Write the stacks, find out with the other ranks which one hangs, and end this process."""
        section, (phase, step, micro_batch) = self._section, self._at
        position = RankPosition(self._node, section.name, section.transitions, step, micro_batch, phase)
        self._log_file.write(f"hang: {reason}; the stacks of all threads of rank {self._rank}:\n".encode())
        faulthandler.dump_traceback(self._log_file)
        record = save_flight_record(self._log_path.parent, self._rank)
        found: list[str] = []

        def gather() -> None:
            store = self._store or connect_store("watchdog")
            found.append(gather_hang_report(store, self._rank, self._world_size, position, reason))

        if self._world_size == 1:
            found.append(f"{describe_hang({0: position}, {}, 1)} ({reason})")
        else:
            gathering = threading.Thread(target=gather, daemon=True)
            gathering.start()
            gathering.join(GATHER_SECONDS)
        if self._closed.is_set():
            return
        what = (
            found[0] if found else f"rank 0 does not answer; rank {self._rank} on {self._node} is {position} ({reason})"
        )
        recorded = f", and what NCCL was exchanging in its {PREFIX}* (torchfrtrace reads them)" if record else ""
        self._end(
            EXIT_TRY_AGAIN,
            f"hang: {what}. The stacks of every rank's threads are in {self._log_path.parent}{recorded}; if nothing "
            f"hangs, raise the limits of watchdog; {CONTINUES_IF_SAVED}",
        )
