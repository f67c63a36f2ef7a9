"""When Slurm ends a job, from its environment variables or from squeue, and the name of the node."""

import os
import socket
import time
from pathlib import Path

import pytest

from jobs.launch import launch_time
from jobs.scheduler.job_end import is_in_job, job_end_time, node_name

JOB = {"SLURM_JOB_ID": "7", "SLURM_TASK_PID": str(os.getppid())}


@pytest.mark.parametrize(
    ("environment", "end"),
    [
        ({}, None),
        (JOB | {"SLURM_JOB_END_TIME": "1000500"}, 1_000_500.0),
        (JOB | {"SLURM_JOB_END_TIME": "NONE"}, None),
        ({"SLURM_JOB_END_TIME": "1000500"}, None),
        (JOB | {"SLURM_JOB_END_TIME": "1000500", "SLURM_TASK_PID": "0"}, None),
        (JOB | {"SLURM_JOB_END_TIME": "1000500", "SLURM_TASK_PID": "0", "COATNET_CAUSE_FILE": "x"}, 1_000_500.0),
    ],
    ids=["no job", "end time", "none", "end time without a job", "not in the job", "started by launch.sh"],
)
def test_the_variable_with_the_end_time_is_used_in_the_job(environment: dict[str, str], end: float | None) -> None:
    assert job_end_time(environment | {"PATH": "/nowhere"}) == end


@pytest.mark.parametrize(
    ("answer", "end"),
    [
        ("echo 2026-11-22T08:00:05", "2026-11-22T08:00:05"),
        ("echo NONE", None),
        ("echo N/A", None),
        ("true", None),
        ("echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1", None),
    ],
)
def test_squeue_is_asked_if_the_variable_is_not_set(answer: str, end: str | None, tmp_path: Path) -> None:
    path = with_squeue(tmp_path, answer)
    found = job_end_time(JOB | {"PATH": path, "SLURM_TIME_FORMAT": "relative"})
    assert (None if found is None else time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(found))) == end
    assert (tmp_path / "asked").read_text() == "standard --noheader --jobs=7 --format=%e\n"
    job_end_time(JOB | {"PATH": path, "SLURM_ARRAY_JOB_ID": "5", "SLURM_ARRAY_TASK_ID": "3"})
    assert "--jobs=5_3" in (tmp_path / "asked").read_text()


@pytest.mark.parametrize(
    ("answer", "running"),
    [
        ("echo 2026-11-22T08:00:05", True),
        ("echo NONE", True),
        ("true", False),
        ("echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1", False),
    ],
)
def test_a_process_that_was_not_started_by_the_job_is_in_it_if_that_runs_on_this_machine(
    answer: str, running: bool, tmp_path: Path
) -> None:
    path = with_squeue(tmp_path, answer)
    assert is_in_job({"SLURM_JOB_ID": "7", "PATH": path}) == running
    here = socket.gethostname().partition(".")[0]
    assert (tmp_path / "asked").read_text() == f"standard --noheader --jobs=7 --nodelist={here} --format=%e\n"


def with_squeue(folder: Path, answer: str) -> str:
    """A PATH with a stand-in for squeue, which needs a cluster, that records its options and gives one of its answers."""
    program = folder / "squeue"
    program.write_text(f"#!/bin/sh\necho $SLURM_TIME_FORMAT $* > {folder}/asked\n{answer}\n")
    program.chmod(0o755)
    return f"{folder}:{os.environ['PATH']}"


def test_a_node_without_squeue_has_no_end_time(tmp_path: Path) -> None:
    assert job_end_time(JOB | {"PATH": str(tmp_path)}) is None


def test_the_node_is_named_as_slurm_names_it_or_by_its_host_name() -> None:
    assert node_name({"SLURMD_NODENAME": "gpu-7"}) == "gpu-7"
    assert node_name({"SLURMD_NODENAME": ""}) == node_name({}) == socket.gethostname()


def test_the_start_of_the_launcher_counts_for_its_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COATNET_STARTED", raising=False)
    assert launch_time(1000.0) == 1000.0
    monkeypatch.setenv("COATNET_STARTED", "980.5")
    assert launch_time(1000.0) == 980.5
