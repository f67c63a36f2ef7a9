"""A command that starts ranks, in an environment with variables of other ranks or of a Slurm job that is over."""

import os

import pytest

from jobs.inherited_environment import discard_foreign_variables


def test_variables_of_a_rank_and_of_another_job_are_named_and_removed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in {"RANK": "0", "WORLD_SIZE": "4", "SLURM_JOB_ID": "7", "SLURM_JOB_END_TIME": "1000500",
                        "SLURMD_NODENAME": "gpu-7", "SLURM_CONF": "/etc/slurm.conf", "PATH": "/nowhere"}.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    before = dict(os.environ)
    discard_foreign_variables()
    assert before.keys() - os.environ.keys() == {
        "RANK", "WORLD_SIZE", "SLURM_JOB_ID", "SLURM_JOB_END_TIME", "SLURMD_NODENAME",
    }  # fmt: skip
    assert capsys.readouterr().err.splitlines() == [
        "warning: ignored in the environment: RANK=0, WORLD_SIZE=4; this command starts all ranks of a stage itself",
        "warning: ignored in the environment: SLURM_JOB_END_TIME=1000500, SLURM_JOB_ID=7 and 1 more; "
        "this process is not in Slurm job 7",
    ]


def test_variables_of_the_job_that_the_command_runs_in_are_kept(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in {"SLURM_JOB_ID": "7", "SLURM_TASK_PID": str(os.getpid())}.items():
        monkeypatch.setenv(name, value)
    discard_foreign_variables()
    assert os.environ["SLURM_JOB_ID"] == "7"
    assert capsys.readouterr().err == ""
