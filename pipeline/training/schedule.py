"""The learning rate as a pure function of the step."""

import math
from dataclasses import dataclass, replace
from typing import Literal

Schedule = Literal["cosine", "linear", "constant"]


def learning_rate(
    step: int,
    *,
    steps: int,
    warmup_steps: int,
    peak: float,
    minimum: float,
    schedule: Schedule,
    before: float = 0.0,
) -> float:
    """The learning rate of step `step` (from 0) of `steps`.

    It rises linearly from `before` over `warmup_steps` steps and reaches `peak` with the last of them; then it falls to
    `minimum` along a half cosine or a line, or stays constant.
    """
    if step < warmup_steps:
        return before + (peak - before) * (step + 1) / warmup_steps
    if schedule == "constant":
        return peak
    progress = (step - warmup_steps) / max(1, steps - warmup_steps)
    share = 0.5 * (1.0 + math.cos(math.pi * progress)) if schedule == "cosine" else 1.0 - progress
    return minimum + (peak - minimum) * share


@dataclass(frozen=True, slots=True)
class LearningRate:
    """The learning rate of the steps of a stage from `first` on."""

    steps: int
    """Of the whole stage: where the decay ends."""
    warmup_steps: int
    """From `first` on."""
    peak: float
    minimum: float
    schedule: Schedule
    first: int = 0
    before: float = 0.0
    """What a warm-up rises from."""

    @property
    def warmup_end(self) -> int:
        """The step that is the first one after the warm-up."""
        return self.first + self.warmup_steps

    def at(self, step: int) -> float:
        """The learning rate of step `step`, from 0."""
        return learning_rate(
            step - self.first,
            steps=self.steps - self.first,
            warmup_steps=self.warmup_steps,
            peak=self.peak,
            minimum=self.minimum,
            schedule=self.schedule,
            before=self.before,
        )

    def going_on(self, step: int, *, steps: int, minimum: float, schedule: Schedule) -> "LearningRate":
        """The rate from `step` on if the stage ends, or decays, otherwise than planned: without a jump.

        Where nothing of that changes it is what it would have been. Otherwise a warm-up under way is finished first,
        and a decay begins at `step`, with the rate of that step.
        """
        if (steps, minimum, schedule) == (self.steps, self.minimum, self.schedule):
            return self
        if step < self.warmup_end:
            return replace(self, steps=steps, minimum=minimum, schedule=schedule)
        return LearningRate(steps, 0, self.at(step), minimum, schedule, first=step)

    def towards(
        self, step: int, peak: float, warmup_steps: int, *, steps: int, minimum: float, schedule: Schedule
    ) -> "LearningRate":
        """The rate from `step` on if it is set to `peak` there: at once, or risen to from the step before it."""
        return LearningRate(steps, warmup_steps, peak, minimum, schedule, first=step, before=self.at(step - 1))
