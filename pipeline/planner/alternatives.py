"""Other settings of a stage that compute the same, each with its memory and its time, and the best of them."""

from dataclasses import dataclass
from typing import Any

from data.order import default_lanes
from pipeline.planner.hardware import Cluster
from pipeline.planner.stage_memory import (
    GpuMemory,
    gpu_memory,
    largest_micro_batch,
    with_micro_batch,
    with_settings,
)
from pipeline.planner.step_estimate import MeasuredSpeed, StepEstimate, estimate_step
from pipeline.recipe.schema import TrainStage

_EQUAL = 1.05
"""Configurations whose steps differ by less take equally long, as estimates go: the recipe's own is preferred."""


@dataclass(frozen=True, slots=True)
class Alternative:
    """The stage with another ZeRO stage or another policy of activation checkpointing."""

    zero_stage: int
    policy: str | int
    micro_size: int
    memory: GpuMemory
    """With this micro-batch."""
    largest_micro_size: int | None
    """That fits and divides a GPU's share of the global batch; None if not even one image fits."""
    step: StepEstimate | None
    """None if it does not fit."""
    is_own: bool
    """Whether these are the recipe's settings."""

    @property
    def name(self) -> str:
        """For people."""
        return f"ZeRO {self.zero_stage}, {policy_name(self.policy)}"


def policy_name(policy: str | int) -> str:
    """What an activation checkpointing policy is called in tables."""
    if isinstance(policy, int):
        return f"every {policy} blocks recomputed" if policy > 1 else "every block recomputed"
    return {"none": "nothing recomputed", "mbconv": "MBConv recomputed", "every_block": "every block recomputed"}[
        policy
    ]


def alternatives(
    stage: TrainStage, classes: int, cluster: Cluster, measured: MeasuredSpeed | None = None
) -> tuple[Alternative, ...]:
    """Every ZeRO stage that the stage's precision and options allow, with every policy, in the recipe's micro-batch."""
    found = []
    for zero_stage in possible_zero_stages(stage):
        for policy in dict.fromkeys(("none", "mbconv", "every_block", stage.activation_checkpointing)):
            one = with_settings(stage, zero_stage=zero_stage, activation_checkpointing=policy)
            memory = gpu_memory(one, classes, cluster)
            is_own = (zero_stage, policy) == (stage.zero_stage, stage.activation_checkpointing)
            found.append(
                Alternative(
                    zero_stage=zero_stage,
                    policy=policy,
                    micro_size=stage.batch.micro_size,
                    memory=memory,
                    largest_micro_size=largest_micro_batch(one, classes, cluster),
                    step=estimate_step(one, classes, cluster, measured) if memory.fits else None,
                    is_own=is_own,
                )
            )
    return tuple(found)


def possible_zero_stages(stage: TrainStage) -> list[int]:
    """Those that a recipe may have with the stage's other settings."""
    least = 0 if stage.precision == "fp32" else 1
    most = 2 if stage.compile or stage.fused_depthwise else 3
    return list(range(least, most + 1))


@dataclass(frozen=True, slots=True)
class Recommendation:
    """Settings for the cluster."""

    settings: dict[str, Any]
    """By their keys below the stage, as `batch.micro_size`."""
    stage: TrainStage
    """With them."""
    reasons: dict[str, str]
    """Why, for each key."""
    changes: dict[str, Any]
    """Those of them that the recipe's stage has otherwise."""
    fits: bool
    """False if nothing fits, and these are the settings that need least."""


def recommend(
    stage: TrainStage, classes: int, cluster: Cluster, found: tuple[Alternative, ...], samples: int
) -> Recommendation:
    """The fastest of the alternatives that fit, in the recipe's micro-batch if any does, and with the upper end of the
    reserve if any does.

    ZeRO 3 only where no other fits: that its gathers hide behind the computation, and what they cost the host, are
    assumptions that no measurement on a GPU supports. If nothing fits in the recipe's micro-batch, that becomes the
    largest that fits with any of them, which makes it another run, as BatchNorm sees it. The precision stays: it is a
    matter of accuracy. Lanes are chosen so that no two nodes share one.
    """
    fitting = [one for one in found if one.step is not None]
    fitting = [one for one in fitting if one.memory.is_safe] or fitting
    fitting = [one for one in fitting if one.zero_stage < 3] or fitting
    if fitting:
        best = _fastest(fitting)
        micro_size, fits = stage.batch.micro_size, True
        why = _why_fastest(best, next(one for one in found if one.is_own))
    else:
        best = max(found, key=lambda one: (one.largest_micro_size or 0, -one.memory.needed))
        micro_size, fits = best.largest_micro_size or stage.batch.micro_size, best.largest_micro_size is not None
        why = "needs the least memory" if not fits else "fits the largest micro-batch"
    chosen = with_settings(stage, zero_stage=best.zero_stage, activation_checkpointing=best.policy)
    chosen = with_micro_batch(chosen, micro_size)
    lanes = best_lanes(stage, cluster.nodes, samples)
    settings: dict[str, Any] = {
        "zero_stage": best.zero_stage,
        "activation_checkpointing": best.policy,
        "precision": stage.precision,
        "batch.micro_size": micro_size,
        "resources.ranks": cluster.gpus,
        "resources.nodes": cluster.nodes,
        "resources.gpu_gigabytes": round(cluster.memory / 1e9, 3),
    }
    rounds = stage.batch.global_size // micro_size // cluster.gpus
    reasons = dict.fromkeys(settings, "of the cluster")
    reasons |= {
        "zero_stage": why,
        "activation_checkpointing": why,
        "precision": "the recipe's: a matter of accuracy",
        "batch.micro_size": f"{rounds} in a step on each GPU"
        if micro_size == stage.batch.micro_size
        else f"the largest that fits: {rounds} in a step on each GPU; BatchNorm sees it, so it makes another run",
    }
    if lanes is not None:
        settings["data.lanes"] = lanes
        reasons["data.lanes"] = f"no two of {cluster.nodes} nodes share one, so each shard is downloaded once an epoch"
    own = {key: _own(stage, key) for key in settings}
    changes = {key: value for key, value in settings.items() if value != own[key]}
    return Recommendation(settings, chosen, reasons, changes, fits)


def _own(stage: TrainStage, key: str) -> Any:
    found: Any = stage
    for name in key.split("."):
        found = getattr(found, name)
    return found


def best_lanes(stage: TrainStage, nodes: int, samples: int) -> int | None:
    """The least number of lanes from the default on that each node has for itself; None if the recipe's are so.

    Lanes decide the order of the samples, so another number makes another run.
    """
    batch, own = stage.batch.global_size, stage.data.lanes
    if own is None:
        own = default_lanes(batch, samples)
    if own % nodes == 0:
        return None
    candidates = (n for n in range(own, min(batch, samples) + 1) if batch % n == 0 and n % nodes == 0)
    return next(candidates, None)


def _fastest(fitting: list[Alternative]) -> Alternative:
    def seconds(one: Alternative) -> float:
        assert one.step is not None
        return one.step.seconds.value

    fastest = min(fitting, key=lambda one: (seconds(one), one.memory.needed))
    own = next((one for one in fitting if one.is_own), fastest)
    return own if seconds(own) <= _EQUAL * seconds(fastest) else fastest


def _why_fastest(best: Alternative, own: Alternative) -> str:
    assert best.step is not None
    if best.is_own:
        return f"none that fits is faster by more than {_EQUAL - 1:.0%}, by estimate"
    if own.step is None:
        return "the fastest that fits by estimate; the recipe's own does not"
    if own.memory.is_safe < best.memory.is_safe:
        return "the fastest that surely fits; the recipe's own may not, with what CUDA and fragmentation take"
    if own.zero_stage == 3 and best.zero_stage < 3:
        return "the fastest that fits without ZeRO 3, whose gathers are assumed to hide behind the computation"
    return f"{own.step.seconds.value / best.step.seconds.value:.2f} times as fast as the recipe's by estimate"
