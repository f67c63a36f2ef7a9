"""When this start must have ended, and how much time a run needs to save and exit before that."""

import time
from dataclasses import dataclass

_EXIT_SECONDS = 30.0
_LEAST_EXIT_SECONDS = 10.0
_WARM_UP_STEPS = 2  # the first steps of a start compile and warm up; some shapes first occur in the second


@dataclass(frozen=True, slots=True)
class TimeLimit:
    """The moment at which a start is ended from outside, in seconds since the epoch."""

    end: float

    def near(self, needed_seconds: float) -> bool:
        """True when no more than `needed_seconds` are left."""
        return time.time() + needed_seconds >= self.end


@dataclass(slots=True)
class Margin:
    """Time that a run needs to save and exit, learned as it runs: two steps, one save, and half a minute to exit."""

    longest_step: float = 0.0
    """Without the first steps of the start."""
    longest_save: float = 0.0
    _steps: int = 0

    def step_took(self, seconds: float) -> None:
        """Record the duration of a step; to be called for every step of a start."""
        self._steps += 1
        if self._steps > _WARM_UP_STEPS:
            self.longest_step = max(self.longest_step, seconds)

    def save_took(self, seconds: float) -> None:
        """Record the time that writing a checkpoint took, until it was complete.

        Without the copy to host memory, which at first allocates the memory, and without the wait for an earlier save.
        """
        self.longest_save = max(self.longest_save, seconds)

    @property
    def another_save(self) -> float:
        """Seconds that one more save and a hasty exit need."""
        return self.longest_save + _LEAST_EXIT_SECONDS

    @property
    def seconds(self) -> float:
        return 2 * self.longest_step + self.longest_save + _EXIT_SECONDS


def time_limit(limit_seconds: float | None, started: float, job_end: float | None) -> TimeLimit | None:
    """The earlier of the limits set by the recipe and by the scheduler; None if neither sets one.

    Args:
        limit_seconds: `resources.time_limit`, counted from `started`.
        started: when this start of the stage began, in seconds since the epoch.
        job_end: when the scheduler ends the job, in seconds since the epoch.
    """
    ends = [] if limit_seconds is None else [started + limit_seconds]
    if job_end is not None:
        ends.append(job_end)
    return TimeLimit(min(ends)) if ends else None
