"""How a run ends, as exceptions and as exit codes (sysexits.h)."""

EXIT_DONE = 0
EXIT_FAILED = 70
"""EX_SOFTWARE: the run failed and would fail again; do not requeue."""
EXIT_TRY_AGAIN = 75
"""EX_TEMPFAIL: the run was asked to stop, or ended for a reason that passes; the same command continues it: requeue."""
EXIT_CONFIG = 78
"""EX_CONFIG: the recipe, the data or a folder is wrong; do not requeue."""

CAUSE_FILE = "COATNET_CAUSE_FILE"
"""Environment variable with the file in which the ranks of a job tell how it ends, for a program that waits for them:
the first rank to end writes its code on a line and its message below it, ranks that end only because it did nothing."""
BEGUN_FILE = "COATNET_BEGUN_FILE"
"""Environment variable with a file that appears when a start is in the event log, where the next ones count it."""


class ConfigError(ValueError):
    """The recipe or what it points to is wrong; the message names the thing, what is wrong and the fix."""


class SeveralErrors(ConfigError):
    """More than one thing is wrong: the message tells of the first and how many more there are, `problems` has all."""

    def __init__(self, message: str, problems: list[str]) -> None:
        super().__init__(message)
        self.problems = problems


class RunFailed(RuntimeError):
    """The run cannot go on and would fail the same way again."""


class LostRank(RuntimeError):
    """Another rank is gone, and with it what both were computing: why is in that rank's log, not here."""


class DeviceFailed(RuntimeError):
    """The GPU of this rank does not work any more; another one, or the same after a while, may."""


class Preempted(Exception):
    """The run was asked to stop and did so after `step` steps, saved as `checkpoint`; the same command continues it.

    `reason` is one of `stopping.REASONS`; `checkpoint` is None if it could not be saved.
    """

    def __init__(self, reason: str, step: int, checkpoint: str | None) -> None:
        saved = f"saved as {checkpoint}" if checkpoint else "which could not be saved"
        where = "" if checkpoint else " from the last checkpoint"
        super().__init__(f"stopped by {reason} after step {step:,}, {saved}; the same command continues{where}")
        self.reason, self.step, self.checkpoint = reason, step, checkpoint
