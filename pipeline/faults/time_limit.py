"""When a start must be over, as its recipe and Slurm say."""

import subprocess
import time
from collections.abc import Mapping
from dataclasses import dataclass

STARTED = "COATNET_STARTED"
"""Environment variable with the time at which the command that launched this rank began, in seconds since the epoch."""

_LEAVING_SECONDS = 30.0
_ANSWER_SECONDS = 10


@dataclass(frozen=True, slots=True)
class TimeLimit:
    """The moment at which a start is ended from outside, in seconds since the epoch."""

    end: float

    def near(self, needed_seconds: float) -> bool:
        """True when no more than `needed_seconds` are left."""
        return time.time() + needed_seconds >= self.end


@dataclass(slots=True)
class Margin:
    """Time that a run needs to save and leave, learned from it: two steps, a save, and half a minute for the rest."""

    longest_step: float = 0.0
    longest_save: float = 0.0

    def step_took(self, seconds: float) -> None:
        """A step is done."""
        self.longest_step = max(self.longest_step, seconds)

    def save_took(self, seconds: float) -> None:
        """A checkpoint is whole, so many seconds after its save began."""
        self.longest_save = max(self.longest_save, seconds)

    @property
    def seconds(self) -> float:
        return 2 * self.longest_step + self.longest_save + _LEAVING_SECONDS


def time_limit(limit_seconds: float | None, started: float, environment: Mapping[str, str]) -> TimeLimit | None:
    """The earlier of what the recipe and what Slurm allow, or None where neither says anything.

    Args:
        limit_seconds: `resources.time_limit`.
        started: when this process began, in seconds since the epoch; a launcher's beginning counts before it.
        environment: the variables of this process.
    """
    ends = []
    if limit_seconds is not None:
        ends.append(float(environment.get(STARTED, started)) + limit_seconds)
    slurm = _slurm_end(environment)
    if slurm is not None:
        ends.append(slurm)
    return TimeLimit(min(ends)) if ends else None


def _slurm_end(environment: Mapping[str, str]) -> float | None:
    """When Slurm ends the job that this process belongs to, in seconds since the epoch."""
    try:
        return float(environment["SLURM_JOB_END_TIME"])
    except (KeyError, ValueError):
        pass  # older versions do not set it
    job = environment.get("SLURM_JOB_ID")
    if job is None:
        return None
    if "SLURM_ARRAY_TASK_ID" in environment:
        # One task of an array has the number of the array, which stands for all of them.
        job = f"{environment.get('SLURM_ARRAY_JOB_ID', job)}_{environment['SLURM_ARRAY_TASK_ID']}"
    try:
        told = subprocess.run(
            ["squeue", "--noheader", f"--jobs={job}", "--format=%e"],
            capture_output=True,
            text=True,
            timeout=_ANSWER_SECONDS,
            env={**environment, "SLURM_TIME_FORMAT": "standard"},
        )
        return time.mktime(time.strptime(told.stdout.strip(), "%Y-%m-%dT%H:%M:%S"))
    except (OSError, subprocess.SubprocessError, ValueError, OverflowError):
        return None  # no such command, no answer, or no end: NONE or N/A
