"""The share of a run's time that is not lost to failures and saves: exactly, to first order, and by simulation.

Failures of N nodes come at random, independent of each other and of their past, with a mean time M between them. Each
throws the run back to its newest published checkpoint and costs a downtime D, in which further failures may come. With
T the seconds of the steps between two saves, d those that a save stops training, w those after that until it counts,
and C those from save to save, a run needs C seconds without a failure from one published checkpoint to the next, and
after a failure R = D + T + d + w. So the mean time between two checkpoints is M (1 - exp(-C / M)) exp(R / M). Where
saves count at once, this is M exp(D / M) (exp((T + d) / M) - 1), the complete model of J. T. Daly, A higher order
estimate of the optimum checkpoint interval for restart dumps (2006).
"""

import math
import random
import statistics
from dataclasses import dataclass

from pipeline.errors import ConfigError
from pipeline.planner.run_timing import Ending, RunTiming

HOUR = 3600.0
DAY = 24 * HOUR
MONTH = 30 * DAY
_FRUITLESS_STARTS = 3
"""Starts in a row without a new checkpoint after which a run is not started again by itself, as in the event log."""


@dataclass(frozen=True, slots=True)
class UsefulTime:
    """Shares of the time, 0 to 1, and what is expected in a duration."""

    seconds_between_failures: float
    """M, of all nodes together."""
    exact: float
    """Seconds of steps that count over seconds, in the long run."""
    first_order: float
    """T / C (1 - (R - C / 2) / M): what a second failure in the same stretch adds is left out."""
    saving: float
    """Share of the time that saves stop training, without failures."""
    failures: float
    """Expected in the duration."""
    gives_up: float
    """Expected number of times in the duration that a person has to start the run again, after three starts in a row
    without a new checkpoint."""


def mean_time_between_failures(run: RunTiming, node_hours: float | None = None) -> float:
    """Seconds between two failures of any node; `node_hours` are those of one, by default those of the figures.

    Raises:
        ConfigError: not positive.
    """
    hours = run.known.failures.node_hours.value if node_hours is None else node_hours
    if not hours > 0:
        raise ConfigError(f"hours between failures of a node: {hours:g}; give a positive number")
    return hours * HOUR / run.nodes


def useful_time(
    run: RunTiming,
    node_hours: float | None = None,
    duration: float = MONTH,
    ending: Ending = Ending.NODE,
) -> UsefulTime:
    """The share of the time in which `run` takes steps that count.

    Args:
        run: its timing.
        node_hours: mean time between failures of a node; by default that of the figures.
        duration: seconds for which failures are counted.
        ending: how failures are noticed.

    Raises:
        ConfigError: the hours are not positive.
    """
    mean, first_save = mean_time_between_failures(run, node_hours), run.work + run.save.stall + run.save.write
    recovery = run.downtime(ending) + first_save
    first = run.work / run.cycle * (1 - (recovery - run.cycle / 2) / mean)
    fruitless = -math.expm1(-(run.start + first_save) / mean)  # the probability that a start is
    row = fruitless**_FRUITLESS_STARTS
    return UsefulTime(
        seconds_between_failures=mean,
        exact=useful_share(run.work, run.cycle, recovery, mean),
        first_order=max(0.0, first),
        saving=1 - run.work / run.cycle,
        failures=duration / mean,
        gives_up=duration / mean * (1 - fruitless) * row / (1 - row)
        if row < 1
        else duration / mean / _FRUITLESS_STARTS,
    )


def useful_share(work: float, cycle: float, recovery: float, mean: float) -> float:
    """The exact share; all arguments in seconds.

    Args:
        work: T, steps between two saves.
        cycle: C, from save to save.
        recovery: R, from a failure to the next published checkpoint.
        mean: M, between failures.
    """
    if recovery / mean > 700:  # it hardly ever gets there, and the exponential has no number
        return 0.0
    return work / (-mean * math.expm1(-cycle / mean) * math.exp(recovery / mean))


@dataclass(frozen=True, slots=True)
class SimulatedRun:
    """One simulated run of a duration; seconds add up to it."""

    steps: int
    """That count at its end, or are taken and not lost yet."""
    failures: int
    useful_seconds: float
    redone_seconds: float
    """Of steps that were lost."""
    stalled_seconds: float
    """Of saves."""
    down_seconds: float
    """Between failures and first steps."""
    gave_up: int
    """How often three starts in a row ended without a new checkpoint. A person is assumed to start the run at once."""

    @property
    def share(self) -> float:
        """Of the time, in steps that count."""
        return self.useful_seconds / (
            self.useful_seconds + self.redone_seconds + self.stalled_seconds + self.down_seconds
        )


@dataclass(frozen=True, slots=True)
class Simulation:
    """Many runs of the same duration."""

    runs: tuple[SimulatedRun, ...]

    @property
    def share(self) -> float:
        """Mean useful share."""
        return statistics.fmean(run.share for run in self.runs)

    @property
    def error(self) -> float:
        """Standard error of the mean."""
        if len(self.runs) < 2:
            return math.inf
        return statistics.stdev(run.share for run in self.runs) / math.sqrt(len(self.runs))

    @property
    def failures(self) -> float:
        """Mean number."""
        return statistics.fmean(run.failures for run in self.runs)


def simulate(
    run: RunTiming,
    node_hours: float | None = None,
    duration: float = MONTH,
    *,
    runs: int = 20,
    seed: int = 0,
    ending: Ending = Ending.NODE,
) -> Simulation:
    """Simulate `runs` runs of `duration` seconds each, event by event; the same seed gives the same runs.

    Raises:
        ConfigError: the hours, the duration or the number of runs are not positive.
    """
    if runs < 1 or not duration > 0:
        raise ConfigError(f"{runs} runs of {duration:g} seconds cannot be simulated; give at least one of some time")
    mean = mean_time_between_failures(run, node_hours)
    chance = random.Random(seed)
    return Simulation(tuple(_simulated(run, mean, duration, run.downtime(ending), chance) for _ in range(runs)))


def _simulated(run: RunTiming, mean: float, duration: float, down: float, chance: random.Random) -> SimulatedRun:
    clock, published, failures, fruitless, gave_up = 0.0, 0, 0, 0, 0
    lost, stalled, idle = 0.0, 0.0, 0.0
    running = True  # the first start is not counted as lost
    while True:
        failure = clock + chance.expovariate(1 / mean)
        if not running:
            ready = clock + down
            if min(ready, failure) > duration:
                return _ended(run, published, 0.0, failures, lost, stalled, idle + duration - clock, gave_up)
            idle += min(ready, failure) - clock
            if failure < ready:
                clock, failures = failure, failures + 1
                if failure > ready - run.start:  # the start had begun
                    fruitless += 1
                    gave_up, fruitless = _given_up(gave_up, fruitless)
                continue
            clock, running = ready, True
        end = min(failure, duration)
        stretch = _stretch(run, end - clock)
        stalled += stretch.stalled
        if stretch.published:
            fruitless = -1  # this start made progress
        published += stretch.published
        if failure >= duration:
            return _ended(run, published, stretch.unpublished, failures, lost, stalled, idle, gave_up)
        lost += stretch.unpublished
        fruitless += 1
        gave_up, fruitless = _given_up(gave_up, fruitless)
        clock, failures, running = failure, failures + 1, False


@dataclass(frozen=True, slots=True)
class _Stretch:
    """Uninterrupted training after a checkpoint."""

    published: int
    """New checkpoints."""
    unpublished: float
    """Seconds of steps beyond the newest of them."""
    stalled: float
    """Seconds in saves."""


def _stretch(run: RunTiming, seconds: float) -> _Stretch:
    """What `seconds` of training make: work, stall, and the next work beside the write of the save.

    The stall of the first save ends after `work + stall`, and that of each later one a cycle after the one before. So
    it takes no longer for many short intervals than for a few.
    """
    work, stall, write = run.work, run.save.stall, run.save.write
    first = work + stall
    saves = max(0, math.ceil((seconds - first) / run.cycle))  # whose stall has ended
    rest = seconds - (first + (saves - 1) * run.cycle if saves else 0.0)
    waits = max(0, saves - 1) * max(0.0, write - work)  # for the write of the save before
    worked = saves * work + min(work, rest)
    published = min(saves, max(0, math.floor((seconds - first - write) / run.cycle) + 1))
    return _Stretch(published, worked - published * work, saves * stall + waits + max(0.0, rest - work))


def _given_up(gave_up: int, fruitless: int) -> tuple[int, int]:
    return (gave_up + 1, 0) if fruitless >= _FRUITLESS_STARTS else (gave_up, fruitless)


def _ended(
    run: RunTiming, published: int, unpublished: float, failures: int, lost: float, stalled: float, idle: float, up: int
) -> SimulatedRun:
    useful = published * run.work + unpublished
    return SimulatedRun(int(useful / run.step + 1e-9), failures, useful, lost, stalled, idle, up)
