"""MixUp (Zhang et al., 2018): a micro-batch mixed with itself in reverse order, pictures and targets alike."""

import numpy as np
from torch import Tensor

_MIXUP = 5  # keeps these draws apart from those in data/ and from stochastic depth's


def mixing_weight(alpha: float, *, seed: int, step: int, number: int) -> float:
    """The share that each sample of micro-batch `number` of a step keeps of itself, drawn from Beta(alpha, alpha)."""
    return float(np.random.default_rng([seed, _MIXUP, step, number]).beta(alpha, alpha))


def mixed(values: Tensor, weight: float) -> Tensor:
    """`weight` of each sample and the rest of its partner, the sample as far from the end as it is from the start.

    Pictures or targets: (B, ...) of a floating type.
    """
    return weight * values + (1 - weight) * values.flip(0)
