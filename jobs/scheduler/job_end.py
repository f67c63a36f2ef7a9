"""What a process in a Slurm job finds out about that job: when Slurm ends it, and the node it runs on."""

import socket
import subprocess
import time
from collections.abc import Mapping

_ANSWER_SECONDS = 10


def node_name(environment: Mapping[str, str]) -> str:
    """The name by which the scheduler knows this machine; its host name outside a job."""
    return environment.get("SLURMD_NODENAME") or socket.gethostname()


def job_end_time(environment: Mapping[str, str]) -> float | None:
    """When Slurm ends the job that this process belongs to, in seconds since the epoch.

    None outside a job, for a job without a time limit, and if squeue does not answer.
    """
    try:
        return float(environment["SLURM_JOB_END_TIME"])
    except (KeyError, ValueError):
        pass  # older versions do not set it
    job = environment.get("SLURM_JOB_ID")
    if job is None:
        return None
    if "SLURM_ARRAY_TASK_ID" in environment:
        # One task of an array has the ID of the array, which stands for all of its tasks.
        job = f"{environment.get('SLURM_ARRAY_JOB_ID', job)}_{environment['SLURM_ARRAY_TASK_ID']}"
    try:
        squeue = subprocess.run(
            ["squeue", "--noheader", f"--jobs={job}", "--format=%e"],
            capture_output=True,
            text=True,
            timeout=_ANSWER_SECONDS,
            env={**environment, "SLURM_TIME_FORMAT": "standard"},
        )
        return time.mktime(time.strptime(squeue.stdout.strip(), "%Y-%m-%dT%H:%M:%S"))
    except (OSError, subprocess.SubprocessError, ValueError, OverflowError):
        return None  # no such command, no answer, or no end (NONE or N/A)
