"""The `coatnet` command as a user runs it, in a process group of its own."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil


def environment() -> dict[str, str]:
    """The present variables, without those that make a process a rank."""
    kept = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "COATNET_OUTCOME_FILE")}
    return kept | {"COLUMNS": "120", "TERM": "dumb", "PYTHONPATH": str(Path(__file__).parents[1])}


def coatnet(*arguments: str | Path, folder: Path | None = None, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run to the end, with `variables` set; output and errors as text."""
    return subprocess.run(
        [sys.executable, "-m", "jobs", *map(str, arguments)],
        cwd=folder,
        env=environment() | variables,
        capture_output=True,
        text=True,
        timeout=600,
    )


def start(*arguments: str | Path) -> subprocess.Popen[bytes]:
    """Start in the background."""
    return subprocess.Popen(
        [sys.executable, "-m", "jobs", *map(str, arguments)],
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )


def wait_until(condition: Callable[[], bool], process: subprocess.Popen[bytes], seconds: float = 120) -> None:
    """Poll `condition` until it holds; fails when `process` ends first."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, f"ended early with {process.returncode}: {process.stderr.read()!r}"  # type: ignore[union-attr]
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.002)


def kill(process: subprocess.Popen[bytes], who: str) -> None:
    """SIGKILL to `everyone`, the `launcher` alone or `rank 1` alone; returns when all of them are gone."""
    ranks = psutil.Process(process.pid).children()
    if who == "everyone":
        os.killpg(process.pid, signal.SIGKILL)
    elif who == "launcher":
        process.kill()
    else:
        next(rank for rank in ranks if rank.environ()["RANK"] == "1").kill()
    process.wait(60)
    _, alive = psutil.wait_procs(ranks, 60)
    assert not alive, "ranks outlived their launcher"
