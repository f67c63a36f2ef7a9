"""What a run asks of something that its ranks share, and how much of that it has."""

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import Literal

from data.order import default_lanes, lanes_read
from pipeline.errors import ConfigError
from pipeline.planner.cluster_figures import ClusterFigures, bundled_cluster_figures

Phase = Literal["start", "save", "step"]
"""When: at every start, at every save, or all the time."""


class Basis(StrEnum):
    """What a number rests on."""

    MEASURED = "measured"
    """Measured here, and scaled by a law that its origin states."""
    SIMULATED = "simulated"
    """The program's own rules, computed for that size."""
    ASSUMED = "assumed"
    """Nobody's measurement; its origin says so."""


@dataclass(frozen=True, slots=True)
class Load:
    """One thing that a run needs, and what there is of it."""

    name: str
    phase: Phase
    demand: float
    """In `unit`, within `seconds`."""
    unit: str
    seconds: float
    """In which it must be done."""
    capacity: float
    """`unit` per second; of what is not spent, such as descriptors, how many there are, with `seconds` 1."""
    basis: Basis
    """Of the demand. Capacities are figures with origins of their own, most of them assumed."""
    origin: str
    """Of the demand: what was measured, and its law."""
    design: str
    """What the program does about it."""

    @property
    def share(self) -> float:
        """Of the capacity: from 1 on, it is too much."""
        return self.demand / (self.capacity * self.seconds)


@dataclass(frozen=True, slots=True)
class ScaledRun:
    """A training stage whose number of ranks is open."""

    parameters: int
    tensors: int
    """Parameters with a name."""
    state_bytes: float
    """Of a checkpoint, of all ranks together."""
    zero_stage: int
    batch: int
    """Samples of a step."""
    samples: int
    """Of an epoch."""
    sample_bytes: float
    """Of a stored sample."""
    shards: int
    interval: int
    """Steps between saves."""
    step_seconds: Callable[[int], float]
    """Of a step on so many ranks."""
    kept_checkpoints: int = 2
    """`checkpoint.keep_last`; those of `keep_every` and `keep_best` are not counted."""
    ranks_per_node: int = 8
    lanes: int | None = None
    """`data.lanes`."""
    log_every: int = 10
    """Steps between log lines."""
    remote: bool = False
    """Whether shards and checkpoints are in an object store, rather than on a shared file system."""
    verify_shards: bool = True
    """`data.verify_shards`."""
    figures: ClusterFigures | None = None
    """Those that come with the program if None."""

    @property
    def known(self) -> ClusterFigures:
        """The figures of the cluster."""
        return self.figures or bundled_cluster_figures()

    def nodes(self, ranks: int) -> int:
        """Nodes of so many ranks."""
        return -(-ranks // self.ranks_per_node)

    def interval_seconds(self, ranks: int) -> float:
        """Between two saves."""
        return self.interval * self.step_seconds(ranks)

    def images_per_second(self, ranks: int) -> float:
        """Of all ranks together."""
        return self.batch / self.step_seconds(ranks)

    def check(self, ranks: int) -> None:
        """
        Raises:
            ConfigError: a step has no sample for each rank, or the ranks do not share it evenly.
        """
        if ranks < 1 or self.batch % ranks:
            raise ConfigError(
                f"{ranks:,} ranks do not divide the {self.batch:,} samples of a step (batch.global_size); use a divisor"
            )


def lanes_of_nodes(run: ScaledRun, ranks: int) -> int:
    """How many lanes the ranks of each node read, summed over the nodes: more than there are where nodes share one."""
    run.check(ranks)
    lanes = run.lanes or default_lanes(run.batch, run.samples)
    return lanes_read(run.batch, lanes, run.batch // ranks * min(ranks, run.ranks_per_node))


def lanes_of_ranks(run: ScaledRun, ranks: int) -> int:
    """How many lanes each rank reads, summed over the ranks."""
    run.check(ranks)
    lanes = run.lanes or default_lanes(run.batch, run.samples)
    return lanes_read(run.batch, lanes, run.batch // ranks)
