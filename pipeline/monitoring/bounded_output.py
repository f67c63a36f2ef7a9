"""Output for people that neither delays nor ends a run, whatever its reader does.

A reader may stop reading: a terminal after Ctrl-S, `less`, `tee` on a file system that hangs. Once the pipe is full,
a plain write waits. A reader may also go away, as `head` does.
"""

import atexit
import io
import os
import select
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable
from typing import Any

_MOST_WAITING = 2**20  # bytes
_EXIT_SECONDS = 5.0

_outputs: "weakref.WeakSet[BoundedOutput]" = weakref.WeakSet()


class BoundedOutput(io.RawIOBase):
    """A file whose writes return at once and never fail: a thread passes them on to a copy of `descriptor`.

    Up to a megabyte waits for a slow reader. What does not fit is dropped, and in its place comes a line that says how
    many lines that were. What cannot be written, because the disk is full or the reader is gone, is lost.

    Args:
        descriptor: of the file to write to.
        note: called with a message when lines begin to be dropped, and when writing begins to fail.
    """

    def __init__(self, descriptor: int, note: Callable[[str], None] = lambda message: None) -> None:
        super().__init__()
        self._descriptor = os.dup(descriptor)
        self._note = note
        self._process = os.getpid()
        self._changed = threading.Condition()
        self._waiting: deque[bytes] = deque()
        self._size = 0  # of what is waiting, in bytes
        self._dropped = 0  # lines since the last that was kept
        self._failing = False
        self._thread: threading.Thread | None = None
        _outputs.add(self)

    def writable(self) -> bool:
        return True

    def isatty(self) -> bool:
        return os.isatty(self._descriptor)

    def fileno(self) -> int:
        return self._descriptor

    def write(self, data: Any) -> int:
        """Returns the size of `data` in bytes, whether it is kept or dropped."""
        content = bytes(data)
        with self._changed:
            # Once lines are dropped, half of the room must be free, so that the output does not lose every other line.
            room = _MOST_WAITING // 2 if self._dropped else _MOST_WAITING
            fits = self._size + len(content) <= room
            begins_to_drop = not fits and not self._dropped
            if fits:
                self._tell_dropped()
                self._keep(content)
            else:
                self._dropped += content.count(b"\n")
        if begins_to_drop:
            self._note("nobody reads the console output; what does not fit into its buffer is in this log alone")
        return len(content)

    def finish(self, seconds: float) -> None:
        """Wait until all that is kept is written, for at most `seconds`."""
        if os.getpid() != self._process:  # a fork, without the thread
            return
        with self._changed:
            self._tell_dropped()
            self._changed.wait_for(lambda: not self._waiting, seconds)

    def _tell_dropped(self) -> None:
        if self._dropped:
            self._keep(b"(%d lines are missing here: nobody was reading)\n" % self._dropped)
            self._dropped = 0

    def _keep(self, content: bytes) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._pass_on, name="console output", daemon=True)
            self._thread.start()
        self._waiting.append(content)
        self._size += len(content)
        self._changed.notify_all()

    def _pass_on(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting)
                content = self._waiting[0]
            self._write_all(content)
            with self._changed:
                self._waiting.popleft()
                self._size -= len(content)
                self._changed.notify_all()

    def _write_all(self, content: bytes) -> None:
        rest = memoryview(content)
        try:
            while rest:
                try:
                    rest = rest[os.write(self._descriptor, rest) :]
                except BlockingIOError:  # another program has made the terminal non-blocking
                    select.select([], [self._descriptor], [])
        except OSError as error:
            if not self._failing:
                self._note(f"the console output cannot be written ({error.strerror}); this log has all of it")
            self._failing = True
        else:
            self._failing = False


def bounded_text(descriptor: int, note: Callable[[str], None] = lambda message: None) -> io.TextIOWrapper:
    """A `BoundedOutput` for text, which encodes as standard output does."""
    output = io.BufferedWriter(BoundedOutput(descriptor, note))
    return io.TextIOWrapper(output, sys.stdout.encoding, sys.stdout.errors, line_buffering=True)


@atexit.register
def finish_outputs() -> None:
    """Let all bounded outputs of this process be written, for some seconds at most; before `os._exit`."""
    deadline = time.monotonic() + _EXIT_SECONDS
    for output in list(_outputs):
        output.finish(max(0.0, deadline - time.monotonic()))
