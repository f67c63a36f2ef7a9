"""What a replay found, as it is written: `replay.json`, of which the screen shows a part."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

from pipeline.replay.logged_steps import LoggedStep

Number = float | str
"""A number; `nan`, `inf` and `-inf`, which JSON does not have, as text."""


def number(value: float) -> Number:
    """`value` as JSON can hold it."""
    return value if math.isfinite(value) else str(value)


@dataclass(frozen=True, slots=True)
class LoggedRow:
    """What TensorBoard has of a step; None for what it has not."""

    loss: Number | None
    gradient_norm: Number | None
    learning_rate: Number | None

    @classmethod
    def of(cls, logged: LoggedStep | None) -> Self | None:
        """As JSON can hold it; None if nothing was logged."""
        if logged is None:
            return None
        values = (logged.loss, logged.gradient_norm, logged.learning_rate)
        return cls(*(None if value is None else number(value) for value in values))


@dataclass(frozen=True, slots=True)
class SampleRow:
    """One sample of a step as the model saw it."""

    position: int
    """In the global batch, from 0."""
    micro_batch: int
    """Its number in the step, from 0."""
    shard: str
    key: str
    labels: tuple[str, ...]
    loss: Number
    """With the targets of the step: smoothed, and mixed with those of the partner."""
    prediction: str
    probability: Number
    """Of the prediction."""
    label_probability: Number
    """Of the first label."""
    gradient: Number | None = None
    """Euclidean norm of its gradient at the stem's output, of the mean loss of its micro-batch; None without a
    backward."""
    mixed_with: str | None = None
    """The sample that MixUp or CutMix has mixed into it; None without, or if that is itself."""
    weight: float | None = None
    """Its own share then, of the targets."""

    @property
    def name(self) -> str:
        """As `data.excluded_samples` has it."""
        return f"{self.shard}/{self.key}"


@dataclass(frozen=True, slots=True)
class BlockRow:
    """One block of the model in a step: Euclidean norms."""

    name: str
    weight: Number | None = None
    """After the step."""
    gradient: Number | None = None
    """Of the averaged gradient of its parameters, before clipping."""
    update: Number | None = None
    """Of what AdamW took off its weights; None if the step was not applied."""
    output: Number | None = None
    """Of its output, over all samples; None if the step was not looked into, as for the next one."""
    output_gradient: Number | None = None
    """Of the gradient that arrives at its output, of the mean loss of each micro-batch."""


@dataclass(frozen=True, slots=True)
class NotFiniteRow:
    """The first thing in a micro-batch that is not finite."""

    micro_batch: int
    kind: str
    """`input`, `weight`, `output` or `gradient`."""
    name: str
    """See `pipeline.replay.not_finite.NotFinite`."""
    elements: int | None
    """That are not finite; None if repeating the computation had none."""
    of: int
    samples: tuple[str, ...]
    """Names of those that they belong to, where that can be told."""


@dataclass(frozen=True, slots=True)
class CauseRow:
    """The smallest set of samples that makes a micro-batch not finite."""

    micro_batch: int
    explanation: str
    samples: tuple[str, ...]
    """`shard/key`; empty where no sample is to blame."""
    module: str | None
    """The first that is not finite with them alone."""
    trials: int


@dataclass(frozen=True, slots=True)
class StepRow:
    """One step."""

    step: int
    """Its number, from 1."""
    loss: Number | None
    gradient_norm: Number | None
    learning_rate: float | None
    applied: bool | None
    """None if only the forward was computed."""
    seconds: float
    branch: bool = False
    """Whether it was taken with other settings than the run's."""
    logged: LoggedRow | None = None
    agreement: str | None = None
    """`equal`, `rounding` or `different`; None if it was not logged, or is one of a branch."""
    skipped: tuple[str, ...] = ()
    """Samples that were replaced, with the reasons."""
    blocks: tuple[BlockRow, ...] = ()
    not_finite: tuple[NotFiniteRow, ...] = ()
    causes: tuple[CauseRow, ...] = ()
    samples: tuple[SampleRow, ...] = ()
    """By position."""
    picture: str | None = None
    """File with the worst and the best samples."""


@dataclass(frozen=True, slots=True)
class ReplayReport:
    """What was recomputed, from where, with what, and what came of it."""

    run: str
    stage: str
    run_id: str | None
    first: int
    """The step that was asked for, from 1."""
    until: int
    start: str
    start_step: int
    """Steps taken before the first recomputed one."""
    passed_over: tuple[str, ...]
    """Checkpoints that were damaged."""
    ranks: int
    computed_with: Mapping[str, str]
    why_not_bits: tuple[str, ...]
    """Why values may differ by rounding; empty if all of them must be equal to the bit."""
    changed: tuple[str, ...]
    """Settings of this replay that any start may change."""
    branched: tuple[str, ...]
    """Settings of the branch."""
    verdict: str
    holds: bool
    """Whether what was logged is what was recomputed."""
    remarks: tuple[str, ...]
    steps: tuple[StepRow, ...]
    branch_run: str | None = None
    """Run folder that continues the branch."""
