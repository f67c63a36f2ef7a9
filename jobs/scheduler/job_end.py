"""What a process in a Slurm job finds out about that job: whether it is its own, when Slurm ends it, and its node."""

import os
import re
import socket
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path

from jobs.scheduler.environment import scheduler_environment
from pipeline.errors import CAUSE_FILE

_ANSWER_SECONDS = 10


def node_name(environment: Mapping[str, str]) -> str:
    """The name by which the scheduler knows this machine; its host name outside a job."""
    return environment.get("SLURMD_NODENAME") or socket.gethostname()


def is_in_job(environment: Mapping[str, str]) -> bool:
    """Whether this process belongs to the job that Slurm's variables describe.

    A shell keeps them when its job is over (tmux, screen), and passes them on to other machines. What proves the job is
    `slurm/launch.sh`, a process of the job among the parents of this one, or its control group; a container may hide
    these, and then Slurm has to say that the job is running on this machine.
    """
    job = environment.get("SLURM_JOB_ID")
    if not job:
        return False
    if CAUSE_FILE in environment or environment.get("SLURM_TASK_PID") in _own_and_parents():
        return True
    groups = _read(Path("/proc/self/cgroup"))
    return bool(re.search(rf"/job_{job}(/|$)", groups, re.MULTILINE)) or bool(
        _squeue(environment, f"--nodelist={socket.gethostname().partition('.')[0]}")
    )


def job_end_time(environment: Mapping[str, str]) -> float | None:
    """When Slurm ends the job that this process belongs to, in seconds since the epoch.

    None outside a job, for a job without a time limit, and if squeue does not answer.
    """
    if not is_in_job(environment):
        return None
    try:
        return float(environment["SLURM_JOB_END_TIME"])
    except (KeyError, ValueError):
        pass  # older versions do not set it
    try:
        return time.mktime(time.strptime(_squeue(environment), "%Y-%m-%dT%H:%M:%S"))
    except (ValueError, OverflowError):
        return None  # no such command, no answer, or no end (NONE or N/A)


def _squeue(environment: Mapping[str, str], *options: str) -> str:
    """The end of the job as squeue prints it; empty if it does not know a job that is waiting or running."""
    job = environment["SLURM_JOB_ID"]
    if "SLURM_ARRAY_TASK_ID" in environment:
        # One task of an array has the ID of the array, which stands for all of its tasks.
        job = f"{environment.get('SLURM_ARRAY_JOB_ID', job)}_{environment['SLURM_ARRAY_TASK_ID']}"
    try:
        squeue = subprocess.run(
            ["squeue", "--noheader", f"--jobs={job}", *options, "--format=%e"],
            capture_output=True,
            text=True,
            timeout=_ANSWER_SECONDS,
            env=scheduler_environment(environment) | {"SLURM_TIME_FORMAT": "standard"},
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return squeue.stdout.strip()


def _own_and_parents() -> list[str]:
    """The process ids of this process and of those above it."""
    found, pid = [], os.getpid()
    while pid > 0:
        found.append(str(pid))
        status = re.search(r"^PPid:\s*(\d+)", _read(Path(f"/proc/{pid}/status")), re.MULTILINE)
        pid = int(status[1]) if status else 0
    return found


def _read(file: Path) -> str:
    try:
        return file.read_text(errors="replace")
    except OSError:
        return ""
