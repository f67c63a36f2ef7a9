"""Which part of a run reaches its limit first as its ranks grow, and at how many."""

from collections.abc import Iterator
from dataclasses import dataclass

from pipeline.planner.scaling.load import Load, ScaledRun
from pipeline.planner.scaling.run_loads import run_loads
from pipeline.planner.scaling.start_loads import start_loads


@dataclass(frozen=True, slots=True)
class Limit:
    """Where a part of a run reaches its limit."""

    load: Load
    """On the most ranks that were looked at, or on those where it reaches the limit."""
    ranks: int | None
    """The fewest on which it has too much; None if it never has."""


def loads(run: ScaledRun, ranks: int) -> tuple[Load, ...]:
    """Everything that `run` needs on `ranks` ranks, the largest share of a limit first.

    Raises:
        ConfigError: the ranks do not divide the samples of a step.
    """
    run.check(ranks)
    return tuple(sorted((*start_loads(run, ranks), *run_loads(run, ranks)), key=lambda load: -load.share))


def limits(run: ScaledRun, most: int | None = None) -> tuple[Limit, ...]:
    """Every part of `run` with the fewest ranks on which it has too much, those that come first in front.

    Args:
        run: whose ranks are varied over those that divide a step, on full nodes or one.
        most: ranks to look at, by default a sample for each.
    """
    first: dict[str, Limit] = {}
    for ranks in _worlds(run, most or run.batch):
        for load in loads(run, ranks):
            known = first.get(load.name)
            if known is None or known.ranks is None:
                first[load.name] = Limit(load, ranks if load.share >= 1 else None)
    return tuple(sorted(first.values(), key=lambda limit: (limit.ranks or 2**60, -limit.load.share)))


def _worlds(run: ScaledRun, most: int) -> Iterator[int]:
    for ranks in range(1, min(most, run.batch) + 1):
        if run.batch % ranks == 0 and (ranks <= run.ranks_per_node or ranks % run.ranks_per_node == 0):
            yield ranks
