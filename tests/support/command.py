"""The `coatnet` command as a user runs it, in a process group of its own.

Commands are forks of a process that has done the imports (`tests/support/prefork.py`); `fresh=True` starts a new interpreter.
"""

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import IO

import psutil

from tests.support.paths import ROOT
from tests.support.prefork import Forked, PreforkServer

Process = Forked | subprocess.Popen[bytes]


def environment() -> dict[str, str]:
    """The current environment, without the variables that make a process a rank, and without GPUs.

    Tests start two ranks on any machine, and compare their results with those of CPUs.
    """
    kept = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "COATNET_OUTCOME_FILE")}
    return kept | {
        "CUDA_VISIBLE_DEVICES": "",
        "HIP_VISIBLE_DEVICES": "",
        "COLUMNS": "120",
        "TERM": "dumb",
        "PYTHONPATH": str(ROOT),
    }


@cache
def _server() -> PreforkServer:
    return PreforkServer(environment())


def coatnet(
    *arguments: str | Path, folder: Path | None = None, fresh: bool = False, **variables: str
) -> subprocess.CompletedProcess[str]:
    """Run to the end, with `variables` added to the environment; output and errors as text."""
    with tempfile.NamedTemporaryFile("ab") as output, tempfile.NamedTemporaryFile("ab") as errors:
        process = _start(arguments, folder, fresh, environment() | variables, output, errors)
        try:
            code = process.wait(600)
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            raise
        texts = (Path(file.name).read_bytes().decode() for file in (output, errors))
        return subprocess.CompletedProcess(arguments, code, *texts)


def start(*arguments: str | Path, fresh: bool = False, output: IO[bytes] | None = None, **variables: str) -> Process:
    """Start in the background, with `variables` added to the environment; what it prints goes to `output`, or nowhere."""
    with tempfile.NamedTemporaryFile("ab") as errors, open(os.devnull, "ab") as devnull:
        process = _start(arguments, None, fresh, environment() | variables, output or devnull, errors)
        process.stderr = open(errors.name, "rb")  # noqa: SIM115 (read when the process has ended)
    return process


def start_program(program: str | Path, *arguments: str | Path, output: IO[bytes], **variables: str) -> Forked:
    """`python FILE ARGUMENTS` or `python -m MODULE ARGUMENTS` in the background, as a fork too."""
    texts = list(map(str, arguments))
    return _server().start(texts, ROOT, environment() | variables, output, output, str(program))


def _start(
    arguments: tuple[str | Path, ...],
    folder: Path | None,
    fresh: bool,
    variables: dict[str, str],
    output: IO[bytes],
    errors: IO[bytes],
) -> Process:
    texts = list(map(str, arguments))
    if not fresh:
        return _server().start(texts, folder or Path.cwd(), variables, output, errors)
    return subprocess.Popen(
        [sys.executable, "-m", "jobs", *texts],
        cwd=folder,
        env=variables,
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=errors,
        start_new_session=True,
    )


def ranks(process: Process) -> list[psutil.Process]:
    """The rank processes of a launcher, in order; none after it has ended."""
    try:
        children = psutil.Process(process.pid).children()
        return sorted(children, key=lambda rank: (rank.create_time(), rank.pid))
    except psutil.NoSuchProcess:
        return []


def wait_until(condition: Callable[[], bool], process: Process, seconds: float = 300) -> None:
    """Poll `condition` until it holds; fails if `process` ends before."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, f"ended early with {process.returncode}: {process.stderr.read()!r}"  # type: ignore[union-attr]
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.002)


def kill(process: Process, who: str) -> None:
    """Send SIGKILL to `everyone`, to the `launcher` alone or to `rank 1` alone; returns when launcher and ranks have ended."""
    started = ranks(process)
    if who == "everyone":
        os.killpg(process.pid, signal.SIGKILL)
    elif who == "launcher":
        process.kill()
    else:
        started[int(who.removeprefix("rank "))].kill()
    process.wait(60)
    _, alive = psutil.wait_procs(started, 60)
    assert not alive, "ranks outlived their launcher"


def ended(process: Process, seconds: float = 300) -> str:
    """Wait until a command has ended and left no rank behind, else kill it; returns its standard error."""
    started = ranks(process)
    try:
        process.wait(seconds)
        assert not psutil.wait_procs(started, 60)[1], "ranks outlived their launcher"
    except BaseException:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    assert process.stderr is not None
    return process.stderr.read().decode()


def rank(process: Process, number: int) -> psutil.Process:
    """The process of one rank of a running command."""
    return ranks(process)[number]


def handles(pid: int, number: signal.Signals) -> bool:
    """Whether a process has a handler for a signal."""
    status = Path(f"/proc/{pid}/status").read_text()
    caught = next(line for line in status.splitlines() if line.startswith("SigCgt"))
    return bool(int(caught.split()[1], 16) >> (number - 1) & 1)
