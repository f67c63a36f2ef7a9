"""Stopping a run early: on SIGTERM, SIGHUP, SIGINT, SIGUSR1 or SIGUSR2, or when a time limit comes near.

Any rank may receive the request. The training loop adds `StopRequests.flags` to the exchange of each step, so that all
ranks learn of it at the same step boundary, save and exit. Outside the loop, ending at once loses nothing, and that is
what `StopSignals` does.
"""

import logging
import signal
import socket
import threading
import time
from collections.abc import Callable, Sequence
from types import FrameType, TracebackType
from typing import Any, NoReturn, Self

from pipeline.errors import CONTINUES_IF_SAVED, stop_exit_code
from pipeline.faults.time_limit import Margin, TimeLimit

log = logging.getLogger(__name__)

STOP_SIGNALS = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)
TIME_LIMIT = "the time limit"
REASONS = (*(stop.name for stop in STOP_SIGNALS), TIME_LIMIT)
"""Why a run is stopped early, in the order of `StopRequests.flags`."""

# `nohup` and shells without job control start programs with these ignored, and mean it.
_MAY_STAY_IGNORED = (signal.SIGHUP, signal.SIGINT)

# One request may arrive several times: a scheduler sends CONT and TERM together, and to launcher and ranks alike; a
# launcher forwards what it receives; `kill` reaches a whole process group; when a terminal closes, both the kernel and
# the shell send SIGHUP. A launcher gets one SIGINT for one Ctrl-C, unless a wrapper such as `uv run` forwards it.
_SAME_REQUEST_SECONDS = 5.0
_SAME_KEY_SECONDS = 0.5
_NOTE_SECONDS = 2.0

EndProcess = Callable[[int, str], NoReturn]
"""Ends this process at once, from any thread, with an exit code and a message."""


class StopSignals:
    """Receives the stop signals of this process, from `with` on; must be entered in the main thread.

    The main thread may be in a collective or an import and not run a Python handler for a long time. So only the C part
    of the handler is used: it wakes a thread (signal.set_wakeup_fd), which acts on the signal.

    A signal ends the process with `end` at once, unless a handler is set. SIGHUP and SIGINT stay ignored in a process
    that was started with them ignored.

    Attributes:
        started: when this process began, in seconds since the epoch.
        last_checkpoint: the newest checkpoint known to be complete, for the message.
        if_repeated: says what the same command does when it is given again, for the message.
    """

    def __init__(self, end: EndProcess, if_repeated: str = "the same command continues") -> None:
        self.end = end
        self.if_repeated: Callable[[], str] = lambda: if_repeated
        self.started = time.time()
        self.last_checkpoint: str | None = None
        self.first: str | None = None
        """Name of the first signal received."""
        self._handler: Callable[[signal.Signals], None] = self._end_at_once
        self._before: dict[signal.Signals, Any] = {}

    def set_handler(self, handler: Callable[[signal.Signals], None] | None) -> None:
        """Call `handler`, in the listening thread, for each signal from now on; None restores ending the process."""
        self._handler = handler or self._end_at_once

    def exit_if_signalled(self) -> None:
        """End this process if it has received a signal, even one that a handler has seen."""
        if self.first is not None:
            self._end_at_once(signal.Signals[self.first])

    def __enter__(self) -> Self:
        # Child processes inherit neither end.
        self._receiver, self._sender = socket.socketpair()
        self._sender.setblocking(False)
        self._wakeup_before = signal.set_wakeup_fd(self._sender.fileno(), warn_on_full_buffer=False)
        for stop in STOP_SIGNALS:
            if stop in _MAY_STAY_IGNORED and signal.getsignal(stop) is signal.SIG_IGN:
                continue
            self._before[stop] = signal.signal(stop, _do_nothing)
            signal.siginterrupt(stop, False)  # native code need not be ready for EINTR
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)  # a launcher starts its ranks with them blocked
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
            while numbers := self._receiver.recv(64):
                for number in numbers:
                    if number in STOP_SIGNALS:
                        received = signal.Signals(number)
                        self.first = self.first or received.name
                        self._handler(received)

    def _end_at_once(self, received: signal.Signals) -> None:
        complete = f"{self.last_checkpoint} is complete; " if self.last_checkpoint else ""
        self.end(stop_exit_code(received.name), f"stopped by {received.name}; {complete}{self.if_repeated()}")


class StopRequests:
    """Requests to stop the training loop of this rank, from `with` on.

    The first signal is kept for the loop. A second one that is not the same request, or the end of the grace period
    after the first, ends the process; this does not depend on the training thread, which may hang.

    Args:
        signals: of this process.
        grace_seconds: time after the first signal in which the run must be saved.
        time_limit: of this start, on the one rank that enforces it.
        on_request: called with the name of the first signal, in the listening thread.
        on_second: called with that name before a second signal ends the process, which waits for it a moment at most.
    """

    def __init__(
        self,
        signals: StopSignals,
        grace_seconds: float,
        time_limit: TimeLimit | None = None,
        on_request: Callable[[str], None] = lambda reason: None,
        on_second: Callable[[str], None] = lambda reason: None,
    ) -> None:
        self.margin = Margin()
        self._signals = signals
        self._grace_seconds = grace_seconds
        self._time_limit = time_limit
        self._on_request, self._on_second = on_request, on_second
        self._first: tuple[str, float] | None = None

    @property
    def reason(self) -> str | None:
        """Why this rank should stop, one of `REASONS`; None if nothing asks it to."""
        if self._first is not None:
            return self._first[0]
        if self._time_limit is not None and self._time_limit.near(self.margin.seconds):
            return TIME_LIMIT
        return None

    @property
    def signalled(self) -> bool:
        """Whether this rank has received a signal."""
        return self._first is not None

    @property
    def time_for_a_save(self) -> bool:
        """Whether one more save can be complete before this start is ended, as far as this rank knows."""
        needed = self.margin.another_save
        if self._first is not None and time.monotonic() + needed >= self._first[1] + self._grace_seconds:
            return False
        return self._time_limit is None or not self._time_limit.near(needed)

    @property
    def flags(self) -> list[float]:
        """1 at this rank's reason to stop and 0 at all others, to be summed over the ranks."""
        own = self.reason
        return [float(reason == own) for reason in REASONS]

    def saved(self, checkpoint: str) -> None:
        """Record that `checkpoint` is complete; a process that ends at once names it."""
        self._signals.last_checkpoint = checkpoint

    def __enter__(self) -> Self:
        self._signals.set_handler(self._received)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        # After an exception the process is about to end; until then a second signal and the deadline still apply.
        if kind is None:
            self._signals.set_handler(None)
            self._signals.exit_if_signalled()

    def _received(self, received: signal.Signals) -> None:
        now = time.monotonic()
        if self._first is None:
            self._first = (received.name, now)
            message = f"its save was not complete after checkpoint.grace_seconds ({self._grace_seconds:g})"
            deadline = threading.Timer(self._grace_seconds, self._end, [message])
            deadline.daemon = True
            deadline.start()
            log.warning("%s: this start ends after the current step", received.name)
            self._on_request(received.name)
        elif now - self._first[1] > _SAME_REQUEST_SECONDS:
            # Also for SIGINT: torchrun, for one, passes on the Ctrl-C that its ranks get themselves.
            # A thread, since storage that does not respond may be why somebody lost patience.
            noting = threading.Thread(target=self._on_second, args=[self._first[0]], daemon=True)
            noting.start()
            noting.join(_NOTE_SECONDS)
            self._end(f"a second signal, {received.name}, ended it at once")

    def _end(self, why: str) -> None:
        assert self._first is not None
        complete = self._signals.last_checkpoint
        what = (
            f"{complete} is complete, and the same command continues from it"
            if complete
            # Only the leader learns at once that a checkpoint is complete.
            else f"no checkpoint is known to be complete; {CONTINUES_IF_SAVED}"
        )
        reason = self._first[0]
        self._signals.end(stop_exit_code(reason), f"stopped by {reason}; {why}; {what}")


class ReceivedSignals:
    """The stop signals that a launcher has received, told apart from repetitions of one request."""

    def __init__(self) -> None:
        self._first: tuple[signal.Signals, float] | None = None
        self.second: signal.Signals | None = None
        """One that means more than the first: end at once."""

    @property
    def first(self) -> signal.Signals | None:
        """The request to stop."""
        return self._first[0] if self._first else None

    @property
    def seconds(self) -> float:
        """Time since the first signal; 0 before it."""
        return time.monotonic() - self._first[1] if self._first else 0.0

    def add(self, received: signal.Signals) -> bool:
        """Take in a signal that has just arrived; returns whether it is the first."""
        if self._first is None:
            self._first = (received, time.monotonic())
            return True
        same = _SAME_KEY_SECONDS if received == signal.SIGINT else _SAME_REQUEST_SECONDS
        if self.seconds > same:
            self.second = self.second or received
        return False


def agreed_reason(flags: Sequence[float]) -> str | None:
    """The reason to stop by `flags` summed over the ranks; None if no rank has one."""
    return next((reason for reason, flag in zip(REASONS, flags, strict=True) if flag), None)


def _do_nothing(_number: int, _frame: FrameType | None) -> None:
    """The Python part of the handler: without one, Python does not install the C part."""
