"""Asking a run to stop: SIGTERM, SIGUSR1 and SIGUSR2, or a time limit that comes near.

Any rank may be asked. The loop puts `StopRequests.flags` into the exchange of each step, so that all ranks learn of it
at the same step boundary, save and leave. Outside the loop nothing is lost by ending at once, which `StopSignals` does.
"""

import logging
import signal
import socket
import threading
import time
from collections.abc import Callable, Sequence
from types import FrameType, TracebackType
from typing import Any, NoReturn, Self

from data.errors import EXIT_TRY_AGAIN
from pipeline.faults.time_limit import Margin, TimeLimit

log = logging.getLogger(__name__)

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
TIME_LIMIT = "the time limit"
REASONS = (*(stop.name for stop in STOP_SIGNALS), TIME_LIMIT)
"""Why a run is asked to stop, in the order of `StopRequests.flags`."""

# One request to stop may arrive several times: a scheduler sends CONT and TERM together, to launcher and ranks alike;
# a launcher passes on what it gets; `kill` reaches a whole process group.
_SAME_REQUEST_SECONDS = 5.0

End = Callable[[int, str], NoReturn]
"""Ends this process at once, from any thread, with an exit code and a message."""


class StopSignals:
    """Hears the signals that ask a process to stop, from `with` on; entered in the main thread.

    The main thread may sit in a collective or an import and not come to a Python handler for long. So only the C part
    of the handler is used: it wakes a thread (signal.set_wakeup_fd), which does what is to be done.

    A signal ends the process with `end` at once, unless it is given to somebody else.

    Attributes:
        started: when this process began, seconds since the epoch.
        last_checkpoint: the newest checkpoint known to be whole, for the message.
    """

    def __init__(self, end: End) -> None:
        self.end = end
        self.started = time.time()
        self.last_checkpoint: str | None = None
        self.first: str | None = None
        """Name of the first signal heard."""
        self._take: Callable[[signal.Signals], None] = self._end_at_once
        self._before: dict[signal.Signals, Any] = {}

    def give_to(self, take: Callable[[signal.Signals], None] | None) -> None:
        """Have `take` called, in the listening thread, for each signal from now on; None ends the process again."""
        self._take = take or self._end_at_once

    def end_if_heard(self) -> None:
        """End this process if a signal has come, whoever it was given to."""
        if self.first is not None:
            self._end_at_once(signal.Signals[self.first])

    def __enter__(self) -> Self:
        # Neither end is inherited by processes that are started.
        self._receiver, self._sender = socket.socketpair()
        self._sender.setblocking(False)
        self._wakeup_before = signal.set_wakeup_fd(self._sender.fileno(), warn_on_full_buffer=False)
        for stop in STOP_SIGNALS:
            self._before[stop] = signal.signal(stop, _woken)
            signal.siginterrupt(stop, False)  # native code need not be ready for EINTR
        threading.Thread(target=self._listen, name="stop signals", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for stop, before in self._before.items():
            signal.signal(stop, before)
        signal.set_wakeup_fd(self._wakeup_before)
        self._sender.close()

    def _listen(self) -> None:
        with self._receiver:
            while heard := self._receiver.recv(64):
                for number in heard:
                    if number in STOP_SIGNALS:
                        received = signal.Signals(number)
                        self.first = self.first or received.name
                        self._take(received)

    def _end_at_once(self, received: signal.Signals) -> None:
        whole = f"{self.last_checkpoint} is whole; " if self.last_checkpoint else ""
        self.end(
            EXIT_TRY_AGAIN, f"stopped by {received.name}; {whole}the same command continues from the last checkpoint"
        )


class StopRequests:
    """What asks the loop of this rank to stop, from `with` on.

    A first signal is remembered for the loop. A second one that is not the same request, or the time after the first,
    ends the process with what is whole; that needs nothing from the training thread, which may hang.

    Args:
        signals: of this process.
        grace_seconds: after the first signal, in which the run must be saved.
        time_limit: of this start, on the rank that minds it.
    """

    def __init__(self, signals: StopSignals, grace_seconds: float, time_limit: TimeLimit | None = None) -> None:
        self.margin = Margin()
        self._signals = signals
        self._grace_seconds = grace_seconds
        self._time_limit = time_limit
        self._first: tuple[str, float] | None = None

    @property
    def wanted(self) -> str | None:
        """Why this rank wants to stop, one of `REASONS`."""
        if self._first is not None:
            return self._first[0]
        if self._time_limit is not None and self._time_limit.near(self.margin.seconds):
            return TIME_LIMIT
        return None

    @property
    def signalled(self) -> bool:
        """Whether a signal came to this rank."""
        return self._first is not None

    @property
    def flags(self) -> list[float]:
        """1 at the reason for which this rank wants to stop and 0 at all others, to be summed over the ranks."""
        wanted = self.wanted
        return [float(reason == wanted) for reason in REASONS]

    def saved(self, checkpoint: str) -> None:
        """`checkpoint` is whole: what a process that ends at once will name."""
        self._signals.last_checkpoint = checkpoint

    def __enter__(self) -> Self:
        self._signals.give_to(self._heard)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        # A process that leaves with an exception is about to end; until then a second signal and the deadline hold.
        if kind is None:
            self._signals.give_to(None)
            self._signals.end_if_heard()

    def _heard(self, received: signal.Signals) -> None:
        now = time.monotonic()
        if self._first is None:
            self._first = (received.name, now)
            message = f"its save was not whole after checkpoint.grace_seconds ({self._grace_seconds:g})"
            deadline = threading.Timer(self._grace_seconds, self._end, [message])
            deadline.daemon = True
            deadline.start()
            log.warning("%s: this start is to end at the next step", received.name)
        elif now - self._first[1] > _SAME_REQUEST_SECONDS:
            self._end(f"a second signal, {received.name}, ended it at once")

    def _end(self, why: str) -> None:
        assert self._first is not None
        whole = self._signals.last_checkpoint
        what = (
            f"{whole} is whole, and the same command continues from it"
            if whole
            else "nothing was saved before, so it begins anew"
        )
        self._signals.end(EXIT_TRY_AGAIN, f"stopped by {self._first[0]}; {why}; {what}")


def agreed_reason(flags: Sequence[float]) -> str | None:
    """The reason to stop in `flags` that were summed over the ranks, or None."""
    return next((reason for reason, flag in zip(REASONS, flags, strict=True) if flag), None)


def _woken(_number: int, _frame: FrameType | None) -> None:
    """The Python part of the handler: without one, there is no C part."""
