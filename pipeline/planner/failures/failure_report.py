"""What failures cost a run, all in one record: named failures, useful time over a duration, intervals of saves."""

from dataclasses import dataclass

from pipeline.planner.failures.outcome import FailureOutcome, node_failure, rank_failure, stop_by_signal
from pipeline.planner.failures.run_timing import Ending, RunTiming
from pipeline.planner.failures.save_interval import IntervalAdvice, best_interval
from pipeline.planner.failures.useful_time import MONTH, Simulation, UsefulTime, simulate, useful_time


@dataclass(frozen=True, slots=True)
class FailureReport:
    """What failures cost a run."""

    run: RunTiming
    node: int
    """That fails."""
    outcomes: tuple[FailureOutcome, ...]
    """Of the same moment: the node dies, a rank of it dies, a rank of it hangs, a signal stops the run."""
    duration: float
    """Seconds."""
    node_hours: float
    """Mean time between failures of a node."""
    useful: UsefulTime
    simulation: Simulation
    intervals: IntervalAdvice


def failure_report(
    run: RunTiming,
    node: int,
    step: int,
    *,
    in_flight: bool | None = None,
    node_hours: float | None = None,
    duration: float = MONTH,
    runs: int = 20,
    seed: int = 0,
) -> FailureReport:
    """Everything about failures of `run`.

    Args:
        run: its timing.
        node: that fails, from 0.
        step: steps taken when it does.
        in_flight: whether a save was in flight; by default as its write time says.
        node_hours: mean time between failures of a node; by default that of the figures.
        duration: seconds of the useful time.
        runs, seed: of the simulation.

    Raises:
        ConfigError: there is no such node or step, or a number is not positive.
    """
    rank = node * run.ranks_per_node
    outcomes = (
        node_failure(run, node, step, in_flight=in_flight),
        rank_failure(run, rank, step, in_flight=in_flight),
        rank_failure(run, rank, step, in_flight=in_flight, ending=Ending.HANG),
        stop_by_signal(run, step, in_flight=in_flight),
    )
    return FailureReport(
        run,
        node,
        outcomes,
        duration,
        run.known.failures.node_hours.value if node_hours is None else node_hours,
        useful_time(run, node_hours, duration),
        simulate(run, node_hours, duration, runs=runs, seed=seed),
        best_interval(run, node_hours),
    )
