"""Measurements in processes of their own: what crashes, hangs or fills the GPU's memory loses itself alone."""

import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from data.files.child_process import own_packages_first, python_module
from data.files.json_records import parse_json, to_json
from pipeline.gpu_benchmark.record import Unmeasured
from pipeline.gpu_benchmark.subject import MeasuredStage
from pipeline.ranks.rendezvous import LAUNCHER, STORE_FOLDER

Record = TypeVar("Record")

FAILED = "error: "
"""How the last line of a process begins that has no result."""
_TAIL = 6000  # bytes of what it printed
_LEAST_SECONDS = 5.0
"""With less time left, nothing is begun."""
_TICK = 0.5
_STACKS_SECONDS = 2.0


@dataclass(frozen=True, slots=True)
class WorkerRequest:
    """What one process measures."""

    measurement: str
    """A key of `worker.MEASUREMENTS`."""
    subject: MeasuredStage
    folder: str
    """Where it may write; it is removed afterwards."""
    parent: int
    """The process that waits for it."""


class Processes:
    """Starts measurements, one at a time, until the time is over.

    Args:
        scratch: a folder for their files.
        seconds: for all of them.
        show: called again and again with what runs at present.
    """

    def __init__(self, scratch: Path, seconds: float, show: Callable[[str], None] = lambda text: None) -> None:
        self._scratch, self._show = scratch, show
        self._began = time.monotonic()
        self._seconds = seconds
        self._count = 0

    @property
    def left(self) -> float:
        """Seconds until the end."""
        return self._began + self._seconds - time.monotonic()

    def measure(
        self, name: str, kind: type[Record], measurement: str, subject: MeasuredStage, most_seconds: float
    ) -> Record | Unmeasured:
        """The result of a measurement called `name` to people, or why there is none.

        It is killed after `most_seconds`, which is a failure, or when the time for all is over, which is not.
        """
        left = self.left
        if left < _LEAST_SECONDS:
            return Unmeasured(name, "no time was left", failed=False)
        self._count += 1
        folder = self._scratch / f"{self._count:02d}"
        for part in ("store", "files", "compiler"):
            (folder / part).mkdir(parents=True, mode=0o700)
        request = WorkerRequest(measurement, subject, str(folder / "files"), os.getpid())
        (folder / "request.json").write_text(json.dumps(to_json(request)))
        limit = min(most_seconds, left)
        try:
            code = self._run(name, folder, limit)
            output = _end_of(folder / "output")
            result = (folder / "result.json").read_bytes() if code == 0 else b""
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        if code is None and most_seconds > left:
            return Unmeasured(name, f"the time was over after {limit:.0f} s of it", failed=False)
        if code is None:
            return Unmeasured(name, f"did not end within {limit:.0f} s, and was killed", failed=True, output=output)
        if code == 0:
            return parse_json(kind, result)
        return Unmeasured(name, _reason(code, output), failed=True, output=output)

    def _run(self, name: str, folder: Path, limit: float) -> int | None:
        """The exit code of the process; None if it was killed after `limit` seconds."""
        command = python_module(
            "pipeline.gpu_benchmark.worker", str(folder / "request.json"), str(folder / "result.json")
        )
        with open(folder / "output", "ab") as output:
            process = subprocess.Popen(
                command,
                env=_environment(folder),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                process_group=0,
            )
        began = time.monotonic()
        try:
            while (spent := time.monotonic() - began) < limit:
                self._show(f"{name}: {spent:.0f} s; {max(0.0, self.left):.0f} s left for all")
                with suppress(subprocess.TimeoutExpired):
                    return process.wait(min(_TICK, limit - spent))
            if process.poll() is None:
                process.send_signal(signal.SIGABRT)  # it prints the stacks of its threads
                with suppress(subprocess.TimeoutExpired):
                    process.wait(_STACKS_SECONDS)
                return None
            return process.returncode
        finally:
            if process.poll() is None:
                with suppress(ProcessLookupError):  # with the compilers that it has started
                    os.killpg(process.pid, signal.SIGKILL)
                process.kill()
                process.wait()


def _environment(folder: Path) -> dict[str, str]:
    """That of the one rank of a group. What it compiles is kept apart, as two machines do: a kernel that one run has
    chosen must not be found by the next, whose choice is compared with it."""
    rank = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", LAUNCHER: str(os.getpid())}
    caches = {
        "TORCHINDUCTOR_CACHE_DIR": str(folder / "compiler" / "inductor"),
        "TRITON_CACHE_DIR": str(folder / "compiler" / "triton"),
    }
    return os.environ | own_packages_first() | rank | caches | {STORE_FOLDER: str(folder / "store")}


def _end_of(file: Path) -> str:
    with open(file, "rb") as opened:
        opened.seek(max(0, file.stat().st_size - _TAIL))
        return opened.read().decode(errors="replace")


def _reason(code: int, output: str) -> str:
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    said = next((line.removeprefix(FAILED) for line in reversed(lines) if line.startswith(FAILED)), None)
    if said is not None:
        return said
    how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with {code}"
    return f"its process {how}{': ' if lines else ', and printed nothing'}{lines[-1] if lines else ''}"
