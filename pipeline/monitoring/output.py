"""Where a rank's output goes: messages to its log, progress to the console. No write ends or delays the run."""

import io
import logging
import os
import socket
import sys
from collections.abc import Callable
from typing import Any

from rich.console import Console

from data.text.printable import PrintableFormatter, printable_stream
from pipeline.errors import CAUSE_FILE
from pipeline.monitoring.bounded_output import bounded_text
from pipeline.monitoring.console import PrintableConsole, styled_text
from pipeline.monitoring.library_warnings import quiet_library_warnings
from pipeline.runs.run_folder import RunFolder


class LossyFile(io.FileIO):
    """A file whose writes never fail: what a full disk does not accept is lost.

    `failed` is called with the reason of the first failed write, and again only after a write has succeeded.
    """

    def __init__(self, descriptor: int, failed: Callable[[str], None] = lambda reason: None) -> None:
        super().__init__(descriptor, "w", closefd=False)
        self._failed = failed
        self._failing = False

    def write(self, data: Any) -> int:
        """Returns the size of `data` in bytes, whether written or lost."""
        try:
            written = super().write(data)
        except OSError as error:
            if not self._failing:
                self._failing = True
                self._failed(error.strerror or str(error))
            return memoryview(data).nbytes
        self._failing = False
        return memoryview(data).nbytes if written is None else written


def redirect_output(folder: RunFolder, rank: int) -> Console:
    """Send log messages and what libraries print to this rank's log; returns a console on the old standard output."""
    log = logging.getLogger(__name__)
    console = PrintableConsole(file=bounded_text(1, log.warning))
    path = folder.log_file(rank)

    def warn(reason: str) -> None:
        if rank == 0:
            console.print(
                styled_text(f"{path} cannot be written ({reason}); the run continues without it"), soft_wrap=True
            )

    with open(path, "ab") as log_file:
        os.dup2(log_file.fileno(), 1)
        if CAUSE_FILE in os.environ:  # the cause of a failure is reported there, not on stderr
            os.dup2(log_file.fileno(), 2)
    # What the locale cannot encode is treated as on the standard output that this replaces.
    log_stream = io.BufferedWriter(LossyFile(1, warn))
    sys.stdout = printable_stream(io.TextIOWrapper(log_stream, line_buffering=True, errors=sys.stdout.errors))
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(PrintableFormatter())
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
    quiet_library_warnings()
    log.info("rank %d on %s, process %d", rank, socket.gethostname(), os.getpid())
    return console
