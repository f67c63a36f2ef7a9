"""The `coatnet` command as a user runs it, in a process group of its own."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil

ENVIRONMENT = {
    key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "COATNET_OUTCOME_FILE")
} | {"COLUMNS": "120", "TERM": "dumb"}


def coatnet(*arguments: str | Path, folder: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run to the end, with `environment` variables set; output and errors as text."""
    return subprocess.run(
        [sys.executable, "-m", "jobs", *map(str, arguments)],
        cwd=folder,
        env=ENVIRONMENT | {"PYTHONPATH": str(Path(__file__).parents[1])} | environment,
        capture_output=True,
        text=True,
        timeout=600,
    )


def start(*arguments: str | Path) -> subprocess.Popen[bytes]:
    """Start in the background."""
    return subprocess.Popen(
        [sys.executable, "-m", "jobs", *map(str, arguments)],
        env=ENVIRONMENT,
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
