"""The watchdog of one process: limits learned from the run, and hangs of every kind detected outside the thread."""

import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from data.errors import EXIT_TRY_AGAIN
from pipeline.faults.watchdog import Watchdog
from pipeline.recipe.sections import WatchdogSettings
from tests.support.command import environment, wait_until

SETTINGS = WatchdogSettings(setup_seconds=60.0, least_seconds=5.0, factor=3.0)

PROCESS = """
import ctypes, os, sys
from pathlib import Path
from pipeline.faults import watchdog
from pipeline.recipe.sections import WatchdogSettings

def end(code, message):
    print(message, flush=True)
    os._exit(code)

def stuck(library):
    lock = ctypes.create_string_buffer(64)
    for _ in range(2):
        library.pthread_mutex_lock(lock)

with watchdog.Watchdog(WatchdogSettings(setup_seconds=600.0, least_seconds=3.0, factor=2.0), 0, 1, "node", Path(sys.argv[1]), end) as dog:
    for step in range(3):
        with dog.section("step"):
            dog.at("computing", step, 0)
    with dog.section("step"):
        dog.at("computing", 3, 0)
        print("ready", flush=True)
        sys.stdin.readline()
    with dog.section("step"):
        dog.at("computing", 4, 0)
        print("ready", flush=True)
        stuck(LIBRARY)
"""


def process(log: Path, library: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-c", PROCESS.replace("LIBRARY", library), str(log)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment(),
    )  # fmt: skip


@pytest.mark.slow
def test_a_suspended_process_is_no_hang_and_one_stuck_in_native_code_is(tmp_path: Path) -> None:
    log = tmp_path / "log"
    running = process(log, "ctypes.CDLL(None)")
    assert running.stdin
    assert running.stdout
    assert running.stdout.readline() == b"ready\n"
    running.send_signal(signal.SIGSTOP)
    time.sleep(8)  # longer than the limit
    running.send_signal(signal.SIGCONT)
    time.sleep(1.5)
    running.stdin.write(b"\n")
    running.stdin.flush()
    assert running.stdout.readline() == b"ready\n"
    message = running.communicate(timeout=60)[0].decode()
    assert running.returncode == EXIT_TRY_AGAIN
    assert message.startswith(
        "hang: this rank is in section step, computing micro-batch 0 of step 5 (rank 0 has been in section"
    )
    assert "the limit is 3 s). The stacks of every rank's threads are in " in message
    assert "in stuck" in log.read_text()


@pytest.mark.slow
def test_the_stack_of_a_thread_that_holds_the_interpreter_lock_is_written(tmp_path: Path) -> None:
    log = tmp_path / "log"
    running = process(log, "ctypes.PyDLL(None)")
    assert running.stdin
    running.stdin.write(b"\n")
    running.stdin.flush()
    try:
        wait_until(lambda: log.exists() and "in stuck" in log.read_text(), running)
    finally:
        running.kill()
        running.communicate()


@contextmanager
def watched(
    log: Path, settings: WatchdogSettings = SETTINGS
) -> Iterator[tuple[Watchdog, list[tuple[int, str]], threading.Event]]:
    """A watchdog in this process, with the exit codes and messages that it would end it with."""
    ends: list[tuple[int, str]] = []
    ended, over = threading.Event(), threading.Event()

    def end(code: int, message: str) -> None:
        ends.append((code, message))
        ended.set()
        over.wait()

    with Watchdog(settings, 0, 1, "node", log, end) as watchdog:  # type: ignore[arg-type]
        yield watchdog, ends, ended
    over.set()


def test_limits_are_those_of_setup_until_a_section_has_ended_and_are_then_learned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0
    monkeypatch.setattr("pipeline.faults.watchdog.time.monotonic", lambda: now)
    watchdog = Watchdog(SETTINGS, 0, 1, "node", tmp_path / "log", lambda code, message: pytest.fail(message))

    def limits() -> list[float]:
        return [watchdog._limit(name) for name in ("setup", "step", "save", "evaluation")]

    assert limits() == [60, 60, 60, 60]
    with watchdog.section("step"):
        now += 1.5
        with watchdog.section("save"):
            now += 4
        now += 0.5
    assert limits() == [60, 6, 12, 60]
    with watchdog.section("step"):
        now += 1.0
    assert limits() == [60, 6, 12, 60]
    with watchdog.section("step"):
        now += 3600  # over the limit and still alive, so it was suspended
    assert limits() == [60, 6, 12, 60]
    with watchdog.section("step"):
        now += 5.0
    assert limits() == [60, 15, 12, 60]


def test_a_hang_before_the_first_step_and_one_between_steps_are_named(tmp_path: Path) -> None:
    with watched(tmp_path / "log", SETTINGS.model_copy(update={"setup_seconds": 0.5})) as (_, ends, ended):
        assert ended.wait(60)
    assert ends[0][0] == EXIT_TRY_AGAIN
    assert ends[0][1].startswith("hang: this rank is in section setup (rank 0 has been in section setup for ")
    short = SETTINGS.model_copy(update={"setup_seconds": 0.5, "least_seconds": 0.5})
    with watched(tmp_path / "log", short) as (watchdog, ends, ended):
        with watchdog.section("step"):
            pass
        assert ended.wait(60)
    assert ends[0][1].startswith("hang: this rank is in section loop (")


def test_a_run_that_makes_progress_is_left_alone_however_long_it_takes(tmp_path: Path) -> None:
    settings = SETTINGS.model_copy(update={"setup_seconds": 4.0, "least_seconds": 4.0})
    with watched(tmp_path / "log", settings) as (watchdog, ends, ended):
        until = time.monotonic() + 6
        while time.monotonic() < until:
            with watchdog.section("step"):
                ended.wait(0.1)
    assert ends == []
