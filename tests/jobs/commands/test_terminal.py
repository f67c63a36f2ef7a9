"""Training at a terminal: the progress bar, Ctrl-C, and a terminal that closes."""

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
import threading
from pathlib import Path

import pytest

from tests.support.command import coatnet, environment, wait_until
from tests.support.recipes import events, write_recipe

pytestmark = pytest.mark.slow


STEPS = 3000


def start_at_terminal(inside: int, stderr: int, recipe: Path) -> subprocess.Popen[bytes]:
    """`coatnet train` as what a shell runs in the foreground of a terminal."""

    def take_terminal() -> None:
        fcntl.ioctl(inside, termios.TIOCSCTTY, 0)

    process = subprocess.Popen(
        [sys.executable, "-m", "jobs", "train", str(recipe), "pretrain", f"pretrain.steps={STEPS}"],
        env=environment() | {"TERM": "xterm-256color"}, stdin=inside, stdout=inside, stderr=stderr,
        start_new_session=True, preexec_fn=take_terminal,
    )  # fmt: skip
    os.close(inside)
    return process


def test_a_terminal_shows_a_progress_bar_and_control_c_saves_and_stops_with_one_line(
    shards: Path, tmp_path: Path
) -> None:
    recipe = write_recipe(tmp_path, shards)
    terminal, inside = pty.openpty()
    fcntl.ioctl(inside, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 133, 0, 0))
    process = start_at_terminal(inside, subprocess.PIPE, recipe)
    shown = bytearray()

    def follow() -> None:
        while True:
            try:
                shown.extend(os.read(terminal, 65536))
            except OSError:  # what Linux answers when the last process has closed its end
                return

    reader = threading.Thread(target=follow)
    reader.start()
    run = tmp_path / "runs/test/pretrain"
    log = run / "logs/rank-00000.log"
    # The bar is drawn a few times a second, so that it may skip any one step.
    wait_until(lambda: b"images/s  ETA" in shown and log.exists() and f"step 30/{STEPS}" in log.read_text(), process)
    os.write(terminal, b"\x03")
    assert process.wait(60) == 130
    reader.join(60)
    text = shown.decode()
    assert "━" in text
    assert "images/s  ETA" in text
    lines = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "\n", text).replace("\r", "\n").splitlines()
    assert any("epoch " in line and "lr " in line for line in lines)
    assert "Warning" not in text, "those of libraries are for the log"
    assert f"step 30/{STEPS}" not in text, "the plain lines belong to the log file when there is a bar"
    assert "SIGINT: saves after the current step and ends; a second signal ends it at once, without that" in text
    message = process.stderr.read().decode()  # type: ignore[union-attr]
    step = events(run)[-1]["step"]
    assert message == (
        f"error: stopped by SIGINT after step {step}, saved as step-{step:08d} in {run}/checkpoints; "
        "the same command continues from the last checkpoint\n"
    )
    assert (run / f"checkpoints/step-{step:08d}/manifest.json").exists()


def test_a_run_whose_terminal_nobody_reads_goes_on_and_saves_when_the_terminal_closes(
    shards: Path, tmp_path: Path
) -> None:
    recipe = write_recipe(tmp_path, shards)
    terminal, inside = pty.openpty()
    process = start_at_terminal(inside, inside, recipe)
    run = tmp_path / "runs/test/pretrain"
    log = run / "logs/rank-00000.log"
    wait_until(lambda: log.exists() and f"step 30/{STEPS}" in log.read_text(), process)
    os.close(terminal)  # the kernel sends SIGHUP, and writes to the terminal fail with EIO
    assert process.wait(60) == 75
    stop = events(run)[-1]
    assert (stop["event"], stop["reason"]) == ("stop", "SIGHUP")
    assert (run / "checkpoints" / stop["checkpoint"] / "manifest.json").exists()
    assert f"exit 75: stopped by SIGHUP after step {stop['step']}, saved as " in log.read_text()


def test_help_names_every_command() -> None:
    shown = coatnet("--help", fresh=True).stdout
    assert all(command in shown for command in ("run", "train", "demo", "shards"))
