"""When Slurm ends a job, from its environment variables or from squeue, and the name of the node."""

import os
import socket
import time
from pathlib import Path

import pytest

from jobs.launch import launch_time
from jobs.scheduler.job_end import job_end_time, node_name

JOB = {"SLURM_JOB_ID": "7"}


@pytest.mark.parametrize(
    ("environment", "end"),
    [
        ({}, None),
        ({"SLURM_JOB_END_TIME": "1000500"}, 1_000_500.0),
        (JOB | {"SLURM_JOB_END_TIME": "1000500"}, 1_000_500.0),
        ({"SLURM_JOB_END_TIME": "NONE"}, None),
    ],
    ids=["no job", "end time", "job with an end time", "none"],
)
def test_the_variable_with_the_end_time_is_used(environment: dict[str, str], end: float | None) -> None:
    assert job_end_time(environment) == end


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
    """A stand-in for squeue, which needs a cluster, with the answers that it gives."""
    program = tmp_path / "squeue"
    program.write_text(f"#!/bin/sh\necho $SLURM_TIME_FORMAT $* > {tmp_path}/asked\n{answer}\n")
    program.chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    found = job_end_time(JOB | {"PATH": path, "SLURM_TIME_FORMAT": "relative"})
    assert (None if found is None else time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(found))) == end
    assert (tmp_path / "asked").read_text() == "standard --noheader --jobs=7 --format=%e\n"
    job_end_time(JOB | {"PATH": path, "SLURM_ARRAY_JOB_ID": "5", "SLURM_ARRAY_TASK_ID": "3"})
    assert "--jobs=5_3" in (tmp_path / "asked").read_text()


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
