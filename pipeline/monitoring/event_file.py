"""A TensorBoard event file whose write failures cannot end the run.

TensorBoard's own writer uses a thread that dies at the first failed write, and later calls fail with it. This one
keeps what it could not write and continues there, in the middle of a record if need be, once there is room again.
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
_MOST_PENDING = 64 * 2**20  # bytes: weeks of scalars, or some histograms


class EventFile:
    """The events of one start of a run, in a file of its own.

    Args:
        folder: the log folder of TensorBoard, created if need be; it also holds the event files of earlier starts.
        purge_step: TensorBoard drops everything that earlier starts wrote at this step and later, of every kind, so
            that no curve goes back in time.
        notify: called with a message when writing begins to fail, and when it works again.
    """

    def __init__(self, folder: Path, purge_step: int, notify: Callable[[str], None]) -> None:
        with suppress(OSError):  # the first flush reports it
            folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / f"events.out.tfevents.{_stamp(folder):010d}.{socket.gethostname()}.{os.getpid()}.0"
        self._notify = notify
        self._file: io.FileIO | None = None
        self._pending = bytearray()
        self._failing = False
        self._dropped = 0
        self._append(Event(wall_time=time.time(), file_version="brain.Event:2"))
        self._append(Event(wall_time=time.time(), step=purge_step, session_log=SessionLog(status=SessionLog.START)))

    def add(self, summary: Summary, step: int) -> None:
        """Add `summary` at `step`; the next `flush` writes it to the file."""
        if len(self._pending) > _MOST_PENDING:
            self._dropped += 1
            return
        self._append(Event(wall_time=time.time(), step=step, summary=summary))

    def flush(self) -> None:
        """Write what has been added, as far as the disk has room."""
        try:
            if self._file is None:
                self._file = io.FileIO(self._path, "a")
            while self._pending:
                del self._pending[: self._file.write(self._pending)]
        except OSError as error:
            self._file = None  # a remounted share needs a new handle
            if not self._failing:
                self._notify(
                    f"TensorBoard's {self._path} cannot be written ({error.strerror}); the run continues without it"
                )
            self._failing = True
            return
        if self._failing:
            lost = f"; {self._dropped:,} entries are lost" if self._dropped else ""
            self._notify(f"TensorBoard's {self._path} is written again{lost}")
        self._failing, self._dropped = False, 0

    def close(self) -> None:
        """Write what is pending, and close the file."""
        self.flush()
        if self._file is not None:
            self._file.close()
            self._file = None

    def _append(self, event: Event) -> None:
        record = io.BytesIO()
        RecordWriter(record).write(event.SerializeToString())
        self._pending += record.getvalue()


def _stamp(folder: Path) -> int:
    """The time, or one after all files in `folder`: TensorBoard orders files by name, and clocks of nodes differ."""
    try:
        matches = [_NAME.match(name) for name in os.listdir(folder)]
    except OSError:
        matches = []
    return max([int(time.time()), *(1 + int(match[1]) for match in matches if match)])
