"""The output of a rank over a full disk: /dev/full refuses every write with ENOSPC."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.monitoring.output import LossyFile
from tests.support.command import environment
from tests.support.pipes import full_pipe

TALK = """
import logging, sys
from pathlib import Path
from pipeline.monitoring.output import redirect_output
from pipeline.runs.run_folder import RunFolder
console = redirect_output(RunFolder(Path(sys.argv[1])), int(sys.argv[2]))
for number in range(3):
    logging.info("message %d", number)
    print("a library prints")
    console.print("for the user")
"""


def talk(folder: Path, rank: int, program: str = TALK, **streams: int) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", program, str(folder), str(rank)]
    captured = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | streams
    return subprocess.run(command, env=environment(), text=True, timeout=300, **captured)  # type: ignore[call-overload,no-any-return]


def test_a_lossy_file_reports_a_failure_once_until_a_write_succeeds(tmp_path: Path) -> None:
    failures: list[str] = []
    with open("/dev/full", "wb", buffering=0) as full, open(tmp_path / "file", "wb", buffering=0) as good:
        file = LossyFile(full.fileno(), failures.append)
        assert [file.write(b"12345"), file.write(b"678")] == [5, 3]
        assert failures == ["No space left on device"]
        kept = os.dup(full.fileno())
        os.dup2(good.fileno(), full.fileno())
        file.write(b"written")
        os.dup2(kept, full.fileno())
        file.write(b"lost")
        os.close(kept)
    assert failures == ["No space left on device"] * 2
    assert (tmp_path / "file").read_bytes() == b"written"


@pytest.mark.slow
def test_messages_and_prints_go_to_the_log_of_the_rank_and_console_output_to_stdout(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    done = talk(tmp_path, 3)
    assert (done.returncode, done.stdout, done.stderr) == (0, "for the user\n" * 3, "")
    log = (tmp_path / "logs/rank-00003.log").read_text()
    assert log.count("a library prints\n") == 3
    assert all(f"INFO message {number}\n" in log for number in range(3))
    assert f"rank 3 on {os.uname().nodename}, process " in log


@pytest.mark.slow
def test_a_log_that_cannot_be_written_is_reported_once_and_ends_nothing(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    path = tmp_path / "logs/rank-00000.log"
    path.symlink_to("/dev/full")
    done = talk(tmp_path, 0)
    warning = f"{path} cannot be written (No space left on device); the run continues without it\n"
    assert (done.returncode, done.stdout, done.stderr) == (0, warning + "for the user\n" * 3, "")


@pytest.mark.slow
def test_a_closed_stdout_ends_nothing(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    reading, writing = os.pipe()
    os.close(reading)
    done = talk(tmp_path, 0, stdout=writing)
    os.close(writing)
    assert (done.returncode, done.stderr) == (0, "")
    log = (tmp_path / "logs/rank-00000.log").read_text()
    assert "INFO message 2\n" in log
    assert log.count("the console output cannot be written (Broken pipe)") == 1


@pytest.mark.slow
def test_a_stdout_that_nobody_reads_delays_neither_the_run_nor_its_end(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    small = (
        "from pipeline.monitoring import bounded_output\n"
        "bounded_output._MOST_WAITING, bounded_output._EXIT_SECONDS = 1000, 0.1\n"
    )
    with full_pipe() as (_, writer):
        done = talk(tmp_path, 0, small + TALK.replace("range(3)", "range(500)"), stdout=writer.fileno())
    assert (done.returncode, done.stderr) == (0, "")
    log = (tmp_path / "logs/rank-00000.log").read_text()
    assert log.count(" INFO message ") == log.count("a library prints\n") == 500
    assert log.count("nobody reads the console output") == 1
