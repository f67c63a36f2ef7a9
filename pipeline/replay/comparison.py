"""Replayed values held against logged ones: equal to the bit, within rounding, or different."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Literal

import numpy as np

from pipeline.recipe.schema import Precision
from pipeline.replay.logged_steps import LoggedStep

Agreement = Literal["equal", "rounding", "different"]

ROUNDING: Mapping[Precision, float] = {"fp32": 1e-3, "bf16_autocast": 3e-2, "bf16": 5e-2}
"""Largest relative difference of a loss that counts as rounding where bits are not expected to be equal.

Another order of summation moves single sums by some units in the last place, and every step amplifies what the one
before it has left. docs/replay.md has measured ones."""
_NORM_FACTOR = 5.0
"""The norm of a gradient differs more than the loss."""


@dataclass(frozen=True, slots=True)
class ComparedStep:
    """What a replay has of a step beside what the run has logged."""

    step: int
    replayed: LoggedStep
    logged: LoggedStep
    agreement: Agreement | None
    """The worst of its values; None if none was logged."""
    difference: float
    """The largest relative difference of a value, 0 where bits are equal."""


@dataclass(frozen=True, slots=True)
class LogComparison:
    """What the comparison of some steps with the log comes to."""

    bits_expected: bool
    """Whether the replay computed with the same as the run: then every value must be equal to the bit."""
    values: int
    """Values that were compared."""
    equal: int
    """Of them, those with equal bits."""
    difference: float
    """The largest relative difference."""
    different: tuple[int, ...]
    """Steps with values that are neither equal nor, where bits are not expected, within rounding."""

    @property
    def holds(self) -> bool:
        """Whether the log is what the replay has."""
        return not self.different

    @property
    def text(self) -> str:
        """The verdict, for a person."""
        if not self.values:
            return "none of these steps was logged, so there is nothing to compare"
        if self.equal == self.values:
            return f"equal to the bit: all {self.values} logged values"
        counted = (
            f"{self.equal} of {self.values} logged values are equal to the bit, and the largest relative difference is "
            f"{self.difference:.2g}"
        )
        if self.holds:
            return f"within rounding: {counted}"
        steps = ", ".join(f"{step:,}" for step in self.different[:5]) + (", ..." if len(self.different) > 5 else "")
        return f"different at step{'s' if len(self.different) > 1 else ''} {steps}: {counted}"


def compare(step: int, replayed: LoggedStep, logged: LoggedStep, precision: Precision, *, bits: bool) -> ComparedStep:
    """The values of one step; where `bits` are expected, nothing counts as rounding."""
    found: list[tuple[Agreement, float]] = []
    for field in fields(LoggedStep):
        ours, theirs = getattr(replayed, field.name), getattr(logged, field.name)
        if ours is not None and theirs is not None:
            tolerance = ROUNDING[precision] * (_NORM_FACTOR if field.name == "gradient_norm" else 1.0)
            found.append(_agreement(ours, theirs, 0.0 if bits else tolerance))
    worst = max((one for one, _ in found), key=("equal", "rounding", "different").index, default=None)
    return ComparedStep(step, replayed, logged, worst, max((difference for _, difference in found), default=0.0))


def log_comparison(compared: Iterable[ComparedStep], *, bits: bool) -> LogComparison:
    """What the comparisons of steps come to."""
    steps = [one for one in compared if one.agreement is not None]
    values = [pair for one in steps for pair in _pairs(one)]
    return LogComparison(
        bits,
        len(values),
        sum(_is_equal(ours, theirs) for ours, theirs in values),
        max((one.difference for one in steps), default=0.0),
        tuple(one.step for one in steps if one.agreement == "different"),
    )


def _pairs(step: ComparedStep) -> Sequence[tuple[float, float]]:
    both = [(getattr(step.replayed, f.name), getattr(step.logged, f.name)) for f in fields(LoggedStep)]
    return [(ours, theirs) for ours, theirs in both if ours is not None and theirs is not None]


def _agreement(ours: float, theirs: float, tolerance: float) -> tuple[Agreement, float]:
    if _is_equal(ours, theirs):
        return "equal", 0.0
    if not (math.isfinite(ours) and math.isfinite(theirs)):
        return "different", math.inf
    difference = abs(ours - theirs) / max(abs(ours), abs(theirs))
    return ("rounding" if difference <= tolerance else "different"), difference


def _is_equal(ours: float, theirs: float) -> bool:
    """Whether they are the same as float32, in which TensorBoard stores them."""
    one, other = np.float32(ours), np.float32(theirs)
    return bool(one == other or (np.isnan(one) and np.isnan(other)))
