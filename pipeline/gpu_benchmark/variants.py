"""Forms of the same computation that a stage can choose from: a line for each in `VARIANTS`."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pipeline.gpu_benchmark.record import StepsRun
from pipeline.recipe.schema import TrainStage


@dataclass(frozen=True, slots=True)
class ExecutionVariant:
    """A name, and the settings of the stage that make it."""

    name: str
    settings: Mapping[str, Any]


EAGER = ExecutionVariant("eager", {"compile": False})
VARIANTS = (
    EAGER,
    ExecutionVariant("compiled", {"compile": True}),
    ExecutionVariant("eager, fused depthwise", {"compile": False, "fused_depthwise": True}),
    ExecutionVariant("compiled, fused depthwise", {"compile": True, "fused_depthwise": True}),
)

ROUNDING: Mapping[str, float] = {"fp32": 1e-4, "bf16": 2e-2, "bf16_autocast": 2e-2}
"""By precision, how much the losses of two forms may differ, relative to them: some times the unit roundoff of the
arithmetic, as sums in another order do."""


def unknown_setting(variant: ExecutionVariant) -> str | None:
    """The first of its settings that the stages of this version do not have."""
    return next((name for name in variant.settings if name not in TrainStage.model_fields), None)


def all_settings(variant: ExecutionVariant) -> dict[str, Any]:
    """Its settings, and the defaults of those that only other variants name."""
    named = {name for one in VARIANTS for name in one.settings if name in TrainStage.model_fields}
    return {name: TrainStage.model_fields[name].default for name in sorted(named)} | dict(variant.settings)


def is_that_of(variant: ExecutionVariant, stage: TrainStage) -> bool:
    """Whether the stage has the settings of the variant already."""
    return unknown_setting(variant) is None and all(
        getattr(stage, name) == value for name, value in all_settings(variant).items()
    )


def loss_difference(run: StepsRun, reference: StepsRun) -> float | None:
    """The largest relative difference of the losses; None if one of them is not finite."""
    differences = []
    for one, other in zip(run.losses, reference.losses, strict=True):
        if one is None or other is None:
            return None
        differences.append(abs(one - other) / max(abs(other), 1e-30))
    return max(differences)
