"""The learning rate as a pure function of the step."""

import math
from typing import Literal


def learning_rate(
    step: int,
    *,
    steps: int,
    warmup_steps: int,
    peak: float,
    minimum: float,
    schedule: Literal["cosine", "linear", "constant"],
) -> float:
    """The learning rate of step `step` (from 0) of `steps`.

    It rises linearly over `warmup_steps` steps and reaches `peak` with the last of them; then it falls to `minimum`
    along a half cosine or a line, or stays constant.
    """
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    if schedule == "constant":
        return peak
    progress = (step - warmup_steps) / max(1, steps - warmup_steps)
    share = 0.5 * (1.0 + math.cos(math.pi * progress)) if schedule == "cosine" else 1.0 - progress
    return minimum + (peak - minimum) * share
