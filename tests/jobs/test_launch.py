"""Ranks as processes: which of several failures is reported, and how long the others get to end."""

import json
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import psutil
import pytest

from jobs.exit_codes import Outcome
from jobs.launch import RankGroup, _kill, _outcome, _start, _wait
from pipeline.faults.preemption import ReceivedSignals
from pipeline.host import this_host
from pipeline.runs.run_folder import RunFolder
from tests.support.command import environment

GROUP = RankGroup(2, 1, RunFolder(Path("runs")).log_file)
LOST = Outcome(75, "rank 0 lost another rank", is_consequence=True)
BROKEN = Outcome(1, "ValueError: no")


@pytest.mark.parametrize(
    ("codes", "written", "code", "message"),
    [
        ([75, -9], {0: LOST}, 137, "rank 1 was killed by SIGKILL, by a person or for lack of memory; the same"),
        ([75, 78], {0: LOST, 1: Outcome(78, "shard x is damaged")}, 78, "shard x is damaged"),
        ([None, 75, 70], {1: LOST, 2: Outcome(70, "the loss is nan")}, 70, "the loss is nan"),
        ([78, 71], {0: Outcome(78, "shard x is damaged"), 1: Outcome(71, "node2 is faulty")}, 71, "node2 is faulty"),
        ([75, 75], {0: LOST, 1: Outcome(75, "stopped by SIGTERM after step 3")}, 75, "stopped by SIGTERM after step 3"),
        ([75, -10], {0: LOST}, 75, "stopped by SIGUSR1; the same command continues"),
        ([75, -1], {0: LOST}, 75, "stopped by SIGHUP; the same command continues"),
        ([75, -2], {0: LOST}, 130, "stopped by SIGINT; the same command continues"),
        ([-15, -9], {}, 137, "rank 1 was killed by SIGKILL"),
        ([0, None, None], {}, 75, "killed rank 1, 2, which did not stop in time; the same command"),
        ([130, 130], {0: Outcome(130, "stopped"), 1: Outcome(130, "stopped")}, 130, "stopped"),
        ([75, 1], {0: LOST, 1: BROKEN}, 1, "rank 1 failed: ValueError: no (log: runs/logs/rank-00001.log)"),
        ([75, 3], {0: LOST}, 3, "rank 1 exited with 3 (log: runs/logs/rank-00001.log)"),
        ([75, None], {0: LOST}, 75, "rank 0 failed: rank 0 lost another rank (log: runs/logs/rank-00000.log)"),
        ([None, 3], {}, 3, "rank 1 exited with 3 (log: runs/logs/rank-00001.log)"),
    ],
)  # fmt: skip
def test_the_cause_is_reported_rather_than_its_consequences(
    codes: list[int | None], written: dict[int, Outcome], code: int, message: str, tmp_path: Path
) -> None:
    for rank, outcome in written.items():
        (tmp_path / f"{rank}.json").write_text(json.dumps(asdict(outcome)))
    outcome = _outcome(codes, tmp_path, GROUP, ReceivedSignals(), "the same command continues")
    assert outcome.code == code
    assert message in outcome.message


def test_a_kill_for_lack_of_memory_is_told_from_one_by_a_person_and_has_advice(tmp_path: Path) -> None:
    outcome = _outcome([75, -9], tmp_path, GROUP, ReceivedSignals(), "the same command continues", lambda: "Use less")
    assert outcome == Outcome(
        137,
        f"rank 1 was killed by the kernel because the memory is full ({this_host().text}); the same command continues. "
        "Use less",
    )


def test_a_rank_that_could_not_report_its_outcome_is_quoted_from_its_log(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.logs.mkdir()
    folder.log_file(1).write_text("error: of an earlier start\nerror: /data/x: No space left on device\nINFO more\n")
    group = RankGroup(2, 1, folder.log_file)
    outcome = _outcome([None, 1], tmp_path, group, ReceivedSignals(), "the same command continues")
    assert outcome.message == (f"rank 1 exited with 1: /data/x: No space left on device (log: {folder.log_file(1)})")


def test_ranks_know_which_they_are_and_that_all_are_on_this_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "OMP_NUM_THREADS")
    program = f"import os; print(*(os.environ[name] for name in {names}), file=open(os.environ['RANK'], 'w'))"
    monkeypatch.setattr("jobs.launch.python_module", lambda *command: [sys.executable, "-c", program])
    monkeypatch.chdir(tmp_path)
    processes: list[subprocess.Popen[bytes]] = []
    _start(processes, [], RankGroup(2, 3, lambda rank: tmp_path / f"{rank}.log"), tmp_path, {})
    assert [process.wait() for process in processes] == [0, 0]
    assert [(tmp_path / rank).read_text() for rank in "01"] == ["0 0 2 2 3\n", "1 1 2 2 3\n"]


IGNORES_SIGTERM = "import signal, time; signal.signal(15, signal.SIG_IGN); print(flush=True); time.sleep(600)"


@pytest.mark.parametrize("signalled", [True, False])
def test_ranks_that_do_not_end_are_waited_for_and_then_killed(signalled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jobs.launch._LEAVE_SECONDS", 0.5)
    programs = (
        [IGNORES_SIGTERM, IGNORES_SIGTERM] if signalled else [IGNORES_SIGTERM, "print(flush=True); raise SystemExit(3)"]
    )
    processes = [subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE) for program in programs]
    try:
        for process in processes:
            assert process.stdout
            process.stdout.readline()
        began, received = time.monotonic(), ReceivedSignals()
        if signalled:
            received.add(signal.SIGTERM)
        codes = _wait(processes, received, 1.0)
        assert codes == ([None, None] if signalled else [None, 3])
        assert time.monotonic() - began >= (1.0 if signalled else 0.5)
    finally:
        _kill(processes, 0)
    assert [process.returncode for process in processes] == [-9, -9 if signalled else 3]


@pytest.mark.parametrize(
    ("first", "then", "seconds", "ends"),
    [
        (signal.SIGTERM, signal.SIGTERM, 4, False),
        (signal.SIGTERM, signal.SIGTERM, 6, True),
        (signal.SIGHUP, signal.SIGHUP, 4, False),
        (signal.SIGUSR2, signal.SIGTERM, 60, True),
        (signal.SIGINT, signal.SIGINT, 0.1, False),
        (signal.SIGINT, signal.SIGINT, 1, True),
        (signal.SIGTERM, signal.SIGINT, 1, True),
    ],
)
def test_a_repeated_request_is_not_a_second_one_and_a_second_control_c_is(
    first: signal.Signals, then: signal.Signals, seconds: float, ends: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 1000.0
    monkeypatch.setattr("pipeline.faults.preemption.time.monotonic", lambda: now)
    received = ReceivedSignals()
    assert received.add(first)
    now += seconds
    assert not received.add(then)
    assert (received.first, received.second) == (first, then if ends else None)


def test_a_second_signal_is_the_outcome_whatever_the_ranks_that_end_meanwhile_say(tmp_path: Path) -> None:
    received = ReceivedSignals()
    received.add(signal.SIGINT)
    received.second = signal.SIGINT
    (tmp_path / "1.json").write_text(json.dumps(asdict(LOST)))
    outcome = _outcome([None, 75], tmp_path, GROUP, received, "the same command starts over")
    message = "stopped by SIGINT; a second signal, SIGINT, ended it at once; the same command starts over"
    assert outcome == Outcome(130, message)


SUSPENDS = """
import subprocess, sys
from jobs.launch import _suspended_together
rank = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], process_group=0)
with _suspended_together([rank]):
    print(rank.pid, flush=True)
    rank.wait()
"""


def test_control_z_suspends_the_ranks_too_and_they_continue_with_the_launcher() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", SUSPENDS], stdout=subprocess.PIPE, env=environment(), process_group=0
    ) as launcher:
        assert launcher.stdout
        both = [psutil.Process(launcher.pid), psutil.Process(int(launcher.stdout.readline()))]

        def wait_for(suspended: bool) -> None:
            deadline = time.monotonic() + 60
            while [one.status() == psutil.STATUS_STOPPED for one in both] != [suspended] * 2:
                assert time.monotonic() < deadline
                time.sleep(0.005)

        for _ in range(2):
            launcher.send_signal(signal.SIGTSTP)
            wait_for(suspended=True)
            launcher.send_signal(signal.SIGCONT)
            wait_for(suspended=False)
        for one in both:
            one.kill()
