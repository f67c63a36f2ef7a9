"""Noticing a rank that hangs, from outside the training thread, and ending the run with a message that names it.

A hang shows on all ranks: those that are well wait for the one that is not. So the first watchdog that runs out of
patience raises an alarm that all hear; every rank writes the stacks of its threads to its log, and together they find
out who is behind; see `hang.py`.
"""

import faulthandler
import logging
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Literal, NamedTuple, Self

from data.errors import EXIT_TRY_AGAIN
from pipeline.distributed import KeyValueStore, connect_store
from pipeline.faults.hang_report import GATHER_SECONDS, RankPosition, alarm, announce, describe_hang, gather_hang_report
from pipeline.faults.preemption import End
from pipeline.recipe.sections import WatchdogSettings

log = logging.getLogger(__name__)

SectionName = Literal["setup", "step", "save", "evaluation", "all-reduce", "reading", "writing"]
Phase = Literal["reading", "computing", "exchanging"]

_POLL_SECONDS = 1.0
_SUSPENDED_SECONDS = 5.0
"""A look at the clock that comes so late was suspended with its process: by Ctrl-Z, or by Slurm for another job."""


class _Section(NamedTuple):
    name: str
    began: float
    """Monotonic, moved on by sections inside."""
    turn: int
    """Sections entered and left before."""


class Watchdog:
    """Ends this process, from `with` on, when it or another rank gets no further.

    Time is counted in sections. The first is `setup`, until another is entered; between two there is one called `loop`.
    The limit of a section is `least_seconds`, or `factor` times the longest one of its kind in this start. The first of
    its kind also compiles and warms up: its limit is at least `setup_seconds`.

    Args:
        settings: the limits.
        rank, world_size: of this process.
        log_file: where the stacks go.
        end: ends this process with an exit code and a message.
    """

    def __init__(self, settings: WatchdogSettings, rank: int, world_size: int, log_file: Path, end: End) -> None:
        self._settings = settings
        self._rank, self._world_size = rank, world_size
        self._log_path = log_file
        self._end = end
        self._node = os.environ.get("SLURMD_NODENAME") or socket.gethostname()
        self._longest: dict[str, float] = {}
        self._depth = 0
        self._section = _Section("setup", time.monotonic(), 0)
        self._at: tuple[str, int, int] = ("", 0, 0)
        self._store: KeyValueStore | None = None
        self._closed = threading.Event()
        self._alarm = threading.Event()

    def joined(self) -> None:
        """The process group is there: from now on an alarm of any rank is one of all."""
        if self._world_size > 1:
            threading.Thread(target=self._listen, name="alarms", daemon=True).start()

    @contextmanager
    def section(self, name: SectionName) -> Iterator[None]:
        """Inside is a section, the same on all ranks; a section inside another does not count for that one."""
        outer, entered = self._section, time.monotonic()
        self._enter(name, entered)
        self._depth += 1
        yield  # an exception ends the run, which may hang over that, too
        self._depth -= 1
        now = time.monotonic()
        seconds = now - self._section.began
        if seconds <= self._limit(name):  # else it was suspended
            self._longest[name] = max(seconds, self._longest.get(name, 0.0))
        if self._depth:
            self._enter(outer.name, outer.began + now - entered)
        else:
            self._enter("loop", now)

    def at(self, phase: Phase, step: int, micro_batch: int) -> None:
        """This rank is `phase` (reading, computing, exchanging) its own micro-batch `micro_batch` of `step`, from 0."""
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
        self._section = _Section(name, began, self._section.turn + 1)

    def _limit(self, name: str) -> float:
        """Seconds that a section may take."""
        settings, longest = self._settings, self._longest.get(name)
        if longest is None:
            return max(settings.setup_seconds, settings.least_seconds)
        return max(settings.least_seconds, settings.factor * longest)

    def _watch(self) -> None:
        suspended: list[tuple[float, float]] = []  # until when, seconds
        last = time.monotonic()
        while not self._closed.is_set():
            # A thread that keeps the interpreter to itself keeps it from this one, too. Then the stacks are written
            # without it, and the other ranks do the rest.
            faulthandler.dump_traceback_later(self._settings.least_seconds, file=self._log_file)
            alarmed = self._alarm.wait(_POLL_SECONDS)
            section, now = self._section, time.monotonic()
            if now - last > _SUSPENDED_SECONDS:
                suspended.append((now, now - last))
            last = now
            seconds = now - section.began - sum(lost for until, lost in suspended if until > section.began)
            limit = self._limit(section.name)
            if alarmed or seconds > limit:
                reason = f"rank {self._rank} has been in section {section.name} for {seconds:,.0f} s"
                self._hang(f"{reason}; the limit is {limit:,.0f} s")
        faulthandler.cancel_dump_traceback_later()

    def _listen(self) -> None:
        try:
            self._store = store = connect_store("watchdog")
            announce(store, self._rank, self._node)
            while not self._closed.wait(_POLL_SECONDS):
                if alarm(store) is not None:
                    self._alarm.set()
                    return
        except RuntimeError as error:
            # The leader is gone. If it was not its time, the training thread notices.
            log.info("no more alarms of other ranks: %s", error)

    def _hang(self, reason: str) -> None:
        """Write down and find out what is wrong, and end this process."""
        section, (phase, step, micro_batch) = self._section, self._at
        report = RankPosition(self._node, section.name, section.turn, step, micro_batch, phase)
        self._log_file.write(f"hang: {reason}; the stacks of all threads of rank {self._rank}:\n".encode())
        faulthandler.dump_traceback(self._log_file)
        found: list[str] = []

        def ask() -> None:
            store = self._store or connect_store("watchdog")
            found.append(gather_hang_report(store, self._rank, self._world_size, report, reason))

        if self._world_size == 1:
            found.append(f"{describe_hang({0: report}, {}, 1)} ({reason})")
        else:
            asking = threading.Thread(target=ask, daemon=True)
            asking.start()
            asking.join(GATHER_SECONDS)
        if self._closed.is_set():
            return
        what = (
            found[0] if found else f"rank 0 does not answer; rank {self._rank} on {self._node} is {report} ({reason})"
        )
        self._end(
            EXIT_TRY_AGAIN,
            f"hang: {what}. The stacks of every rank's threads are in {self._log_path.parent}. The same command "
            "continues from the last checkpoint; if nothing hangs, raise the limits of watchdog",
        )
