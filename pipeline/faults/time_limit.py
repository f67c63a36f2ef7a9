"""When this start must have ended, and how much time a run needs to save and exit before that."""

import time
from dataclasses import dataclass

_EXIT_SECONDS = 30.0


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
    longest_save: float = 0.0

    def step_took(self, seconds: float) -> None:
        """Record the duration of a step."""
        self.longest_step = max(self.longest_step, seconds)

    def save_took(self, seconds: float) -> None:
        """Record the time from the start of a save until its checkpoint was complete."""
        self.longest_save = max(self.longest_save, seconds)

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
