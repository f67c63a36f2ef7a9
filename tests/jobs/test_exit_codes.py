"""How errors become exit codes and messages."""

import errno
import os
import subprocess
import sys
from pathlib import Path
from typing import NoReturn

import pytest

from data.errors import StorageDown
from jobs import exit_codes
from jobs.exit_codes import OUTCOME_FILE, STARTS_OVER, exit_on_error
from pipeline.errors import CAUSE_FILE, FAULTY_NODES_FILE
from tests.support.command import environment

PASSING = [errno.ESTALE, errno.EIO, errno.ETIMEDOUT, errno.ENOTCONN]


class Ended(BaseException):
    """In place of the end of this process."""


@pytest.mark.parametrize("is_rank", [True, False])
@pytest.mark.parametrize("number", PASSING)
def test_a_file_system_that_fails_for_a_while_is_worth_another_try(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], number: int, is_rank: bool
) -> None:
    def end(code: int, message: str, is_consequence: bool) -> NoReturn:
        assert code == 75
        assert not is_consequence
        assert message == f"events.jsonl: {os.strerror(number)}: a file system or its server fails; {STARTS_OVER}"
        raise Ended

    monkeypatch.setattr(exit_codes, "end_process", end)
    if is_rank:
        monkeypatch.setenv(OUTCOME_FILE, "unused")
    with pytest.raises(Ended if is_rank else SystemExit) as ended, exit_on_error(STARTS_OVER):
        raise OSError(number, os.strerror(number), "events.jsonl")
    if not is_rank:
        assert ended.value.args == (75,)
        assert f"error: events.jsonl: {os.strerror(number)}: " in capsys.readouterr().err


def test_a_file_that_is_missing_or_refused_is_not(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="78"), exit_on_error():
        open("/nowhere/shards.txt")  # noqa: SIM115
    assert capsys.readouterr().err == "error: /nowhere/shards.txt: No such file or directory\n"


def test_a_full_disk_is_told_without_a_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="78"), exit_on_error(), open("/dev/full", "wb", buffering=0) as full:
        full.write(b"\n")
    assert capsys.readouterr().err == "error: No space left on device\n"


def test_an_error_that_knows_what_the_same_command_does_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    error = StorageDown("s3://bucket does not answer")
    error.if_repeated = "the same command waits"
    with pytest.raises(SystemExit, match="75"), exit_on_error():
        raise error
    assert capsys.readouterr().err == "error: s3://bucket does not answer; the same command waits\n"


def test_a_rank_that_cannot_leave_its_outcome_prints_it_and_keeps_its_exit_code(tmp_path: Path) -> None:
    missing = tmp_path / "removed" / "0.json"
    program = "from jobs.exit_codes import end_process; end_process(78, 'shard x is damaged')"
    ended = subprocess.run(
        [sys.executable, "-c", program],
        env=environment() | {OUTCOME_FILE: str(missing)}, capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    assert ended.returncode == 78
    assert ended.stderr == f"error: shard x is damaged ({missing}: No such file or directory)\n"


def test_a_rank_that_finds_a_faulty_machine_names_its_nodes_for_the_job_beside_the_cause(tmp_path: Path) -> None:
    program = (
        "from jobs.exit_codes import exit_on_error\nfrom pipeline.errors import MachineFaulty\n"
        "with exit_on_error(): raise MachineFaulty('rank 1 differs', {nodes})"
    )
    cause, faulty = tmp_path / "cause", tmp_path / "faulty"
    variables = {"RANK": "0", CAUSE_FILE: str(cause), FAULTY_NODES_FILE: str(faulty)}
    for nodes, named in (((), None), (("node2", "node5"), "node2\nnode5\n")):
        cause.unlink(missing_ok=True)
        ended = subprocess.run(
            [sys.executable, "-c", program.format(nodes=nodes)], env=environment() | variables, check=False, timeout=60
        )
        assert ended.returncode == 71
        assert cause.read_text() == "71\nrank 1 differs\n"
        assert (faulty.read_text() if faulty.exists() else None) == named
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cause", "faulty"]
