"""How a run ends, as exceptions."""

from data.errors import EXIT_CONFIG, EXIT_FAILED, EXIT_INTERRUPTED, EXIT_MACHINE_FAULTY, EXIT_TRY_AGAIN, CoatnetError

CAUSE_FILE = "COATNET_CAUSE_FILE"
"""Environment variable with the file in which the ranks of a job report how it ends, for a program that waits for them:
the first rank that fails by itself writes its exit code on a line and its message below it."""
FAULTY_NODES_FILE = "COATNET_FAULTY_NODES_FILE"
"""Environment variable with the file in which the ranks of a job name the nodes that compute wrong values, one on a
line: those of `MachineFaulty`."""
BEGUN_FILE = "COATNET_BEGUN_FILE"
"""Environment variable with a file that appears when a start is in the event log, where the next ones count it, or when
a build of shards, which has no event log, has read or written something that the next start keeps."""


CONTINUES = "the same command continues from the last checkpoint"
"""What the same command does when it is given again, where there is a checkpoint."""
CONTINUES_IF_SAVED = f"{CONTINUES}, if there is one"
"""The same, for messages of those who do not know what is saved."""
STARTS_OVER = "the same command starts over"


class ConfigError(CoatnetError):
    """The recipe or what it points to is wrong; the message names the thing, what is wrong and the fix."""

    exit_code = EXIT_CONFIG


class SeveralErrors(ConfigError):
    """More than one thing is wrong: the message has the first and how many more there are, `problems` has all."""

    def __init__(self, message: str, problems: list[str]) -> None:
        super().__init__(message)
        self.problems = problems


class RunFailed(CoatnetError):
    """The run cannot go on and would fail the same way again."""

    exit_code = EXIT_FAILED


class DiskFull(CoatnetError):
    """A file system without room for what a start writes first; there may be room later."""

    exit_code = EXIT_TRY_AGAIN
    retryable = True


class RunInUse(CoatnetError):
    """Another node has the lock of the run folder: it runs the stage, or went down and still counts as running it."""

    exit_code = EXIT_TRY_AGAIN
    retryable = True


class CheckpointRemoved(CoatnetError):
    """A run that trains has removed a checkpoint while another command read it; there is a newer one."""

    exit_code = EXIT_TRY_AGAIN
    retryable = True


class LostRank(CoatnetError):
    """Another rank is gone, and with it what both were computing; the reason is in that rank's log."""

    exit_code = EXIT_TRY_AGAIN
    retryable = True
    is_consequence = True


class DeviceFailed(CoatnetError):
    """The GPU of this rank no longer works; another one, or the same one later, may."""

    exit_code = EXIT_TRY_AGAIN
    retryable = True


class NetworkFailed(CoatnetError):
    """This rank could not communicate with the others, which may all be there; it may be able to later."""

    exit_code = EXIT_TRY_AGAIN
    retryable = True


class MachineFaulty(CoatnetError):
    """A machine computes wrong values, as another one has found; nothing of what it computed has been applied.

    Args:
        message: names the rank, its machine and device, and the value.
        nodes: names of the machines to go on without, as the scheduler knows them; empty if it is not clear which.
    """

    exit_code = EXIT_MACHINE_FAULTY

    def __init__(self, message: str, nodes: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.nodes = nodes


class PortTaken(CoatnetError):
    """The port at which the ranks of a job meet is in use; it may be free later, or on another machine."""

    exit_code = EXIT_TRY_AGAIN
    retryable = True


class Preempted(CoatnetError):
    """The run was asked to stop and did so after `step` steps.

    Args:
        reason: one of `preemption.REASONS`.
        step: steps taken.
        checkpoint: name of the newest complete one; None if there is none.
        place: folder or URL of the run's checkpoints.
        unsaved: why it is not that of `step`; None if it is.
    """

    retryable = True

    def __init__(self, reason: str, step: int, checkpoint: str | None, place: str, unsaved: str | None = None) -> None:
        newest = f"the newest checkpoint is {checkpoint}" if checkpoint else "there is no checkpoint"
        saved = f"saved as {checkpoint} in {place}" if unsaved is None else f"which {unsaved}; {newest} in {place}"
        super().__init__(f"stopped by {reason} after step {step:,}, {saved}")
        self.reason, self.step, self.checkpoint = reason, step, checkpoint
        self.exit_code = stop_exit_code(reason)
        self.if_repeated = CONTINUES if checkpoint else None


def stop_exit_code(reason: str) -> int:
    """The exit code of a run stopped for `reason`, one of `preemption.REASONS`: a person's Ctrl-C is not repeated."""
    return EXIT_INTERRUPTED if reason == "SIGINT" else EXIT_TRY_AGAIN
