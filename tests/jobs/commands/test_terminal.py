"""Training at a terminal: the progress bar, and Ctrl-C."""

import os
import pty
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from tests.support.command import coatnet, environment, wait_until
from tests.support.recipes import write_recipe

pytestmark = pytest.mark.slow


def test_a_terminal_shows_a_progress_bar_and_control_c_stops_with_one_line(shards: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, shards)
    terminal, inside = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "jobs", "train", str(recipe), "pretrain", "pretrain.steps=3000"],
        env=environment() | {"TERM": "xterm-256color"}, stdin=inside, stdout=inside, stderr=subprocess.PIPE,
        start_new_session=True,
    )  # fmt: skip
    os.close(inside)
    shown = bytearray()

    def follow() -> None:
        while True:
            try:
                shown.extend(os.read(terminal, 65536))
            except OSError:  # what Linux answers when the last process has closed its end
                return

    reader = threading.Thread(target=follow)
    reader.start()
    log = tmp_path / "runs/test/pretrain/logs/rank-00000.log"
    # The bar is drawn a few times a second, so that it may skip any one step.
    wait_until(lambda: b"images/s  ETA" in shown and log.exists() and "step 30/3000" in log.read_text(), process)
    os.killpg(process.pid, signal.SIGINT)  # what the terminal does
    assert process.wait(60) == 130
    reader.join(60)
    text = shown.decode()
    assert "━" in text
    assert "images/s  ETA" in text
    assert "step 30/3000" not in text, "the plain lines belong to the log file when there is a bar"
    message = process.stderr.read().decode()  # type: ignore[union-attr]
    assert message == "error: stopped; the same command continues from the last checkpoint, if there is one\n"


def test_help_names_every_command() -> None:
    shown = coatnet("--help", fresh=True).stdout
    assert all(command in shown for command in ("run", "train", "demo", "shards"))
