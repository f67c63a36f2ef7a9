"""A TensorBoard event file whose writing cannot end the run.

TensorBoard's own writer works in a thread that dies with the first failed write and takes later calls with it. This one
keeps what could not be written and goes on there, in the middle of a record if need be, when there is room again.
"""

import io
import os
import re
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter

_NAME = re.compile(r"^events\.out\.tfevents\.(\d+)\.")
# Weeks of scalars, or some histograms.
_MOST_PENDING = 64 * 2**20


class EventFile:
    """The events of one start of a run, in a file of its own.

    Args:
        folder: where TensorBoard looks, made if need be; event files of earlier starts lie beside this one.
        purge_step: TensorBoard drops all that earlier starts wrote at this step and later, of every kind, so that no
            curve goes back in time.
        tell: called with a line for people when writing begins to fail, and when it goes on.
    """

    def __init__(self, folder: Path, purge_step: int, tell: Callable[[str], None]) -> None:
        with suppress(OSError):  # told by the first flush
            folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / f"events.out.tfevents.{_stamp(folder):010d}.{socket.gethostname()}.{os.getpid()}.0"
        self._tell = tell
        self._file: io.FileIO | None = None
        self._pending = bytearray()
        self._failing = False
        self._dropped = 0
        self._append(Event(wall_time=time.time(), file_version="brain.Event:2"))
        self.purge(purge_step)

    def purge(self, step: int) -> None:
        """Let TensorBoard drop all that was written at `step` and later."""
        self._append(Event(wall_time=time.time(), step=step, session_log=SessionLog(status=SessionLog.START)))

    def add(self, summary: Summary, step: int) -> None:
        """Add `summary` as of `step`; it reaches the file with the next `flush`."""
        if len(self._pending) > _MOST_PENDING:
            self._dropped += 1
            return
        self._append(Event(wall_time=time.time(), step=step, summary=summary))

    def flush(self) -> None:
        """Write what has been added, as far as the disk takes it."""
        try:
            if self._file is None:
                self._file = io.FileIO(self._path, "a")
            while self._pending:
                del self._pending[: self._file.write(self._pending)]
        except OSError as error:
            self._file = None  # a share that was mounted anew needs a new handle
            if not self._failing:
                self._tell(f"TensorBoard's {self._path} cannot be written ({error.strerror}); the run goes on without")
            self._failing = True
            return
        if self._failing:
            lost = f"; {self._dropped:,} entries are lost" if self._dropped else ""
            self._tell(f"TensorBoard's {self._path} is written again{lost}")
        self._failing, self._dropped = False, 0

    def close(self) -> None:
        """Write what is left, and close the file."""
        self.flush()
        if self._file is not None:
            self._file.close()
            self._file = None

    def _append(self, event: Event) -> None:
        record = io.BytesIO()
        RecordWriter(record).write(event.SerializeToString())
        self._pending += record.getvalue()


def _stamp(folder: Path) -> int:
    """The time, or later than any file there is: TensorBoard reads files by name, and clocks of nodes differ."""
    try:
        matches = [_NAME.match(name) for name in os.listdir(folder)]
    except OSError:
        matches = []
    return max([int(time.time()), *(1 + int(match[1]) for match in matches if match)])
