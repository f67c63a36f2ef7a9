"""Where a rank's output goes: messages to its log, progress to the console. No failed write ends the run."""

import io
import logging
import os
import socket
import sys
from collections.abc import Callable
from typing import Any

from rich.console import Console

from pipeline.errors import CAUSE_FILE
from pipeline.run_folder import RunFolder


class LossyFile(io.FileIO):
    """A file whose writes never fail: what a full disk or a closed terminal does not accept is lost.

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
    console = Console(file=_text(LossyFile(os.dup(1))), highlight=False)
    path = folder.log_file(rank)

    def warn(reason: str) -> None:
        if rank == 0:
            console.print(f"{path} cannot be written ({reason}); the run continues without it", soft_wrap=True)

    with open(path, "ab") as log_file:
        os.dup2(log_file.fileno(), 1)
        if CAUSE_FILE in os.environ:  # the cause of a failure is reported there, not on stderr
            os.dup2(log_file.fileno(), 2)
    sys.stdout = _text(LossyFile(1, warn))
    logging.basicConfig(
        stream=sys.stdout, level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", force=True
    )
    logging.getLogger(__name__).info("rank %d on %s, process %d", rank, socket.gethostname(), os.getpid())
    return console


def _text(file: LossyFile) -> io.TextIOWrapper:
    # What the locale cannot encode is treated as on the standard output that this replaces.
    return io.TextIOWrapper(io.BufferedWriter(file), line_buffering=True, errors=sys.stdout.errors)
