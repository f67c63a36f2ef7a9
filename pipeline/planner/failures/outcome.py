"""What one failure costs a run: what is lost, where it goes on, and how long until it is there again.

As the program behaves (`pipeline/checkpoints/saver.py`, `pipeline/faults/watchdog.py`, `slurm/launch.sh`): a save
counts once its leader has published it, with the files of all ranks. A rank that lost another one gives the save in
flight ten seconds, and ends with exit code 75; the job is requeued and continues from the newest checkpoint. Where the
training thread of a rank hangs, the threads that save go on meanwhile. What an unfinished save leaves behind is removed
by the next start. A signal to stop makes all ranks save first.
"""

from dataclasses import dataclass, replace

from data.errors import EXIT_TRY_AGAIN
from pipeline.errors import ConfigError
from pipeline.planner.failures.run_timing import Ending, RunTiming

NOT_COUNTED = (
    "time in the queue beyond the requeue delay: a spare node is free",
    "evaluations, and steps that are slower after a start",
    "failures of the storage, on which all ranks depend",
    "errors of the network by which NCCL may notice a dead node before Slurm and the watchdog do",
    "a save that is published after all, since the ranks of the node that failed had written their part",
)
"""What no figure of a failure contains, for people."""


@dataclass(frozen=True, slots=True)
class SaveInFlight:
    """A save that had not been published when the failure came."""

    step: int
    seconds_left: float
    """That it would have taken."""
    saved_in_time: bool
    """Whether it counts all the same: it ends before the ranks do."""


@dataclass(frozen=True, slots=True)
class FailureOutcome:
    """What one failure costs."""

    ending: Ending
    step: int
    """Steps taken when it came."""
    ranks: range
    """The ranks that fail."""
    exit_code: int | None
    """Of the other ranks; None if Slurm ends the job, which it requeues itself."""
    in_flight: SaveInFlight | None
    continues_from: int
    """Steps that the next start has."""
    lost_steps: int
    lost_samples: int
    """Samples that are trained on again: the run sees each of them once."""
    notice_seconds: float
    """Until all ranks have ended; for a signal, until the state is saved."""
    requeue_seconds: float
    start_seconds: float
    redone_seconds: float
    """Of the steps that are taken again, with their saves."""

    @property
    def seconds(self) -> float:
        """From the failure until the run is at that step again."""
        return self.notice_seconds + self.requeue_seconds + self.start_seconds + self.redone_seconds


def node_failure(
    run: RunTiming, node: int, step: int, *, in_flight: bool | None = None, ending: Ending = Ending.NODE
) -> FailureOutcome:
    """Node `node`, counted from 0, dies after `step` steps of an undisturbed run.

    Args:
        run: its timing.
        node: number of the node.
        step: steps taken.
        in_flight: whether the newest save was in flight; by default as its write time says.
        ending: how the others see it: `NODE`, or `RANK` if its connections close, as after a crash of its processes.

    Raises:
        ConfigError: there is no such node or step.
    """
    if not 0 <= node < run.nodes:
        raise ConfigError(f"node {node}: the run has {run.nodes}, numbered from 0 to {run.nodes - 1}; name one of them")
    first = node * run.ranks_per_node
    return _failure(run, range(first, first + run.ranks_per_node), step, in_flight, ending)


def rank_failure(
    run: RunTiming, rank: int, step: int, *, in_flight: bool | None = None, ending: Ending = Ending.RANK
) -> FailureOutcome:
    """Rank `rank` ends after `step` steps, or with `HANG` stops making progress; the others end with it.

    Raises:
        ConfigError: there is no such rank or step.
    """
    ranks = run.nodes * run.ranks_per_node
    if not 0 <= rank < ranks:
        raise ConfigError(f"rank {rank}: the run has {ranks}, numbered from 0 to {ranks - 1}; name one of them")
    return _failure(run, range(rank, rank + 1), step, in_flight, ending)


def stop_by_signal(run: RunTiming, step: int, *, in_flight: bool | None = None) -> FailureOutcome:
    """A signal to stop arrives during the step after `step`: that step is finished and saved, so nothing is lost.

    A save in flight is finished first. If both take longer than `checkpoint.grace_seconds`, the ranks end before: then
    the steps since the newest checkpoint are lost.

    Raises:
        ConfigError: there is no such step.
    """
    found = _save_in_flight(run, step, in_flight)
    before = found.seconds_left if found else 0.0
    first = run.step + before
    saving = first + run.save.stall + run.save.write
    requeue, start = run.known.failures.requeue_delay.value, run.start
    published = _newest_published(run, step, found)
    if saving <= run.grace:
        kept, took = step + 1, saving
    else:  # the save in flight may still make it
        kept, took = (found.step if found and first <= run.grace else published), run.grace
    lost = max(0, step - kept)
    found = found and replace(found, saved_in_time=first <= run.grace)
    return FailureOutcome(
        Ending.SIGNAL, step, range(0), EXIT_TRY_AGAIN, found, kept, lost, lost * run.batch, took, requeue, start,
        _redone(run, kept, step),
    )  # fmt: skip


def _failure(run: RunTiming, ranks: range, step: int, forced: bool | None, ending: Ending) -> FailureOutcome:
    found = _save_in_flight(run, step, forced)
    notice = run.notice(ending, saving=found is not None)
    if found and ending is Ending.HANG:  # the threads that save go on until the watchdog ends the ranks
        found = replace(found, saved_in_time=found.seconds_left <= notice)
    kept = found.step if found and found.saved_in_time else _newest_published(run, step, found)
    lost = step - kept
    return FailureOutcome(
        ending, step, ranks, None if run.ended_by_scheduler(ending) else EXIT_TRY_AGAIN, found, kept, lost,
        lost * run.batch, notice, run.known.failures.requeue_delay.value, run.start, _redone(run, kept, step),
    )  # fmt: skip


def _save_in_flight(run: RunTiming, step: int, forced: bool | None) -> SaveInFlight | None:
    """The save that is in flight after `step` steps, none of which a failure lets count."""
    if step < 0:
        raise ConfigError(f"step {step}: there is none before 0; name one of the run")
    newest = step // run.interval * run.interval
    since = (step - newest) * run.step
    if newest == 0 or forced is False or (forced is None and since >= run.save.write):
        return None
    return SaveInFlight(newest, max(0.0, run.save.write - since), False)


def _newest_published(run: RunTiming, step: int, in_flight: SaveInFlight | None) -> int:
    return in_flight.step - run.interval if in_flight else step // run.interval * run.interval


def _redone(run: RunTiming, first: int, step: int) -> float:
    """Seconds of the steps from `first` to `step`, with the saves that are made again on the way."""
    saves = max(0, (step - 1) // run.interval - first // run.interval)
    return max(0, step - first) * run.step + saves * (run.cycle - run.work)
