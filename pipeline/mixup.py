"""MixUp (Zhang et al., 2018): a micro-batch mixed with itself in reverse order, pictures and targets alike."""

from torch import Tensor

from data.random_streams import RandomStream


def mixing_weight(alpha: float, *, seed: int, step: int, number: int) -> float:
    """The share that each sample of micro-batch `number` of a step keeps of itself, drawn from Beta(alpha, alpha)."""
    return float(RandomStream.MIXUP.generator(seed, step, number).beta(alpha, alpha))


def mixed(values: Tensor, weight: float) -> Tensor:
    """`weight` of each sample and the rest of its partner, the sample as far from the end as it is from the start.

    Pictures or targets: (B, ...) of a floating type.
    """
    return weight * values + (1 - weight) * values.flip(0)
