"""`coatnet status --watch` and `coatnet logs -f` at a terminal, ended with Ctrl-C."""

import os
import pty
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from tests.jobs.runs import MadeRun
from tests.support.command import environment

pytestmark = pytest.mark.slow


class Terminal:
    """A command at a terminal of 200 columns."""

    def __init__(self, *arguments: str, folder: Path) -> None:
        self._screen, inside = pty.openpty()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "jobs", *arguments],
            cwd=folder, env=environment() | {"TERM": "xterm-256color", "COLUMNS": "200"},
            stdin=inside, stdout=inside, stderr=inside, start_new_session=True,
        )  # fmt: skip
        os.close(inside)
        self.shown = b""

    def wait_for(self, text: str, seconds: float = 60) -> None:
        """Wait until `text` has been shown."""
        os.set_blocking(self._screen, False)
        deadline = time.monotonic() + seconds
        while text.encode() not in self.shown:
            assert time.monotonic() < deadline, self.shown.decode()
            try:
                self.shown += os.read(self._screen, 65536)
            except OSError:  # nothing yet
                time.sleep(0.05)

    def control_c(self) -> int:
        """Press Ctrl-C; returns the exit code."""
        os.killpg(self.process.pid, signal.SIGINT)
        code = self.process.wait(30)
        with suppress(OSError):  # the end
            while more := os.read(self._screen, 65536):
                self.shown += more
        os.close(self._screen)
        return code


def test_the_table_is_drawn_again_in_its_place_until_control_c(tmp_path: Path) -> None:
    run = MadeRun(tmp_path)
    run.freeze()
    lock = run.stage("pretrain").lock()
    run.progress("pretrain", 11, 40)
    terminal = Terminal("status", "--watch", "--every", "0.2", folder=tmp_path)
    terminal.wait_for("11/40")
    run.progress("pretrain", 12, 40)
    terminal.wait_for("12/40")
    assert b"\x1b[1A" in terminal.shown, "the cursor goes up instead of filling the screen"
    assert terminal.control_c() == 130
    assert terminal.shown.endswith(b"stopped; the runs are not affected\r\n")
    assert b"Traceback" not in terminal.shown
    lock.close()


def test_a_log_is_followed_until_control_c(tmp_path: Path) -> None:
    run = MadeRun(tmp_path)
    run.freeze()
    lock = run.stage("pretrain").lock()
    run.log("pretrain", "first")
    terminal = Terminal("logs", "runs/small", "-f", folder=tmp_path)
    terminal.wait_for("first")
    run.log("pretrain", "second")
    terminal.wait_for("second")
    assert terminal.control_c() == 130
    assert terminal.shown.endswith(b"stopped; the run is not affected\r\n")
    lock.close()
