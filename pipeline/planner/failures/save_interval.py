"""How often to save: the interval at which saves and the work that failures destroy cost least together.

J. W. Young, A first order approximation to the optimum checkpoint interval (1974): sqrt(2 d M), with d the seconds that
a save stops training and M those between failures. J. T. Daly, A higher order estimate of the optimum checkpoint
interval for restart dumps (2006), equation 37, has two more terms. A save is written behind the training, so d is the
copy to host memory alone; but the next save waits for that write, so the interval is no shorter than it.
"""

import math
from dataclasses import dataclass, replace

from pipeline.errors import ConfigError
from pipeline.planner.failures.run_timing import Ending, RunTiming
from pipeline.planner.failures.useful_time import mean_time_between_failures, useful_time


def young(stall: float, mean: float) -> float:
    """Seconds of work between two saves, by Young's formula."""
    return math.sqrt(2 * stall * mean)


def daly(stall: float, mean: float) -> float:
    """The same by Daly's formula; M where a save takes more than twice that."""
    if stall >= 2 * mean:
        return mean
    ratio = stall / (2 * mean)
    return math.sqrt(2 * stall * mean) * (1 + math.sqrt(ratio) / 3 + ratio / 9) - stall


@dataclass(frozen=True, slots=True)
class SaveInterval:
    """An interval between saves, and the useful share of the time with it."""

    steps: int
    seconds: float
    """Of the steps."""
    share: float


@dataclass(frozen=True, slots=True)
class IntervalAdvice:
    """Intervals side by side."""

    own: SaveInterval
    """Of the recipe."""
    young: SaveInterval
    daly: SaveInterval
    best: SaveInterval
    """Daly's, but no shorter than the write of a save."""
    write_binds: bool
    """Whether that write, rather than the formula, decides the best one."""


def best_interval(run: RunTiming, node_hours: float | None = None, ending: Ending = Ending.NODE) -> IntervalAdvice:
    """The best number of steps between saves for `run`, beside the one that it has.

    Args:
        run: its timing.
        node_hours: mean time between failures of a node; by default that of the figures.
        ending: how failures are noticed.

    Raises:
        ConfigError: the hours are not positive, or a save does not stop training at all, so that no interval is best.
    """
    mean, stall = mean_time_between_failures(run, node_hours), run.save.stall
    if not stall > 0:
        raise ConfigError(f"save.stall: {stall:g} seconds; a save stops training for some time, give how long")

    def interval(steps: int) -> SaveInterval:
        changed = replace(run, interval=steps)
        return SaveInterval(steps, changed.work, useful_time(changed, node_hours, ending=ending).exact)

    by_young, by_daly = (max(1, round(formula(stall, mean) / run.step)) for formula in (young, daly))
    least = max(1, math.ceil(run.save.write / run.step))
    return IntervalAdvice(
        own=interval(run.interval),
        young=interval(by_young),
        daly=interval(by_daly),
        best=interval(max(by_daly, least)),
        write_binds=least > by_daly,
    )
