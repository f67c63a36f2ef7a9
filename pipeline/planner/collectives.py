"""What the ranks of a training step exchange, how long that takes, and how much of it nothing hides.

The collectives are those of DeepSpeed 0.19.8 as `pipeline.zero.engine` sets it up; a test counts them.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from pipeline.planner.hardware import Cluster, figure_range
from pipeline.planner.ranges import NOTHING, Range
from pipeline.recipe.schema import Precision
from pipeline.recipe.sections import CommunicationSettings

CollectiveKind = Literal["all_reduce", "all_gather", "reduce_scatter"]

_LIVE = 1_000_000_000
"""Elements: DeepSpeed's stage3_max_live_parameters, up to which ZeRO 3 keeps gathered weights for the backward."""
PERSISTENT = 100_000
"""Elements of a weight: DeepSpeed's stage3_param_persistence_threshold, up to which ZeRO 3 keeps it gathered."""


@dataclass(frozen=True, slots=True)
class Collective:
    """Collectives of one kind in a step."""

    kind: CollectiveKind
    what: str
    bytes: int
    """Of the whole tensor, in one of them."""
    times: int
    """How often in a step."""
    during_backward: bool
    """Whether it runs in a stream of its own while gradients are computed; once in a step, those of its last
    micro-batch."""

    @property
    def total_bytes(self) -> int:
        """Of all of them."""
        return self.bytes * self.times


def collectives(
    parameters: int,
    precision: Precision,
    zero_stage: int,
    rounds: int,
    settings: CommunicationSettings,
    persistent: int = 0,
) -> tuple[Collective, ...]:
    """The large collectives of a step on several ranks.

    Norms and losses, some numbers each, are left out. ZeRO 1 to 3 sum in buckets, which count as one tensor here.

    Args:
        parameters: of the model.
        precision: of the stage.
        zero_stage: 0 to 3.
        rounds: micro-batches of a rank in a step.
        settings: how gradients are summed.
        persistent: those of the parameters that are in weights of at most `PERSISTENT` elements.
    """
    weight = 2 if precision == "bf16" else 4
    gradient = 2 if settings.gradients == "bf16" else 4
    overlap = zero_stage == 3 if settings.overlap is None else settings.overlap
    gathered = Collective("all_gather", "weights", weight * parameters, 1, False)
    if zero_stage == 0:
        return (Collective("all_reduce", "gradients", gradient * parameters, 1, False),)
    if zero_stage == 1:
        hidden = overlap and precision != "bf16"  # bf16 is summed when all gradients are there
        return (Collective("all_reduce", "gradients", gradient * parameters, 1, hidden), gathered)
    if zero_stage == 2:
        return (Collective("all_reduce", "gradients", gradient * parameters, rounds, overlap), gathered)
    # Small weights are gathered after the optimizer. The others are gathered for each micro-batch, and again for its
    # backward if there are too many to keep them.
    passes = rounds if parameters <= _LIVE else 2 * rounds
    found = (
        Collective("all_gather", "weights", weight * (parameters - persistent), passes, overlap),
        Collective("all_gather", "small weights", weight * persistent, 1, False),
        Collective("reduce_scatter", "gradients", gradient * parameters, rounds, overlap),
    )
    return tuple(one for one in found if one.bytes)


def collective_seconds(collective: Collective, cluster: Cluster) -> Range:
    """How long all of them take: their bytes through the slowest link of a ring, and its hops.

    An all-reduce passes 2 (n - 1) / n of its bytes through each GPU, the others half of that, as in nccl-tests. Hops
    within a node are those of a ring, between nodes those of a tree.
    """
    if cluster.gpus == 1:
        return NOTHING
    passes = 2 if collective.kind == "all_reduce" else 1
    share = passes * (cluster.gpus - 1) / cluster.gpus
    moving = cluster.bus.dividing(share * collective.bytes)
    hops = figure_range(cluster.law.link_latency) * (passes * (cluster.gpus_per_node - 1))
    if cluster.nodes > 1:
        between = figure_range(cluster.law.network_latency) * (passes * math.ceil(math.log2(cluster.nodes)))
        hops = hops + between
    return (moving + hops) * collective.times


@dataclass(frozen=True, slots=True)
class CommunicationTime:
    """Seconds of the collectives of a step."""

    total: Range
    exposed: Range
    """In which nothing else runs."""
    each: tuple[Range, ...] = ()
    """Of each of the collectives, all its times together."""


def communication_seconds(found: Sequence[Collective], cluster: Cluster, computing: Range) -> CommunicationTime:
    """The time of all collectives, of which those during the backward hide behind `computing` seconds of it.

    The rule for what is hidden: all of it as far as the computation is long enough. That neither slows the other down
    is an assumption; collectives take some of the GPU's multiprocessors.
    """
    hidden = exposed = NOTHING
    each = tuple(collective_seconds(one, cluster) for one in found)
    for one, seconds in zip(found, each, strict=True):
        if one.during_backward:
            hidden = hidden + seconds
        else:
            exposed = exposed + seconds
    return CommunicationTime(hidden + exposed, exposed + hidden.beyond(computing), each)
