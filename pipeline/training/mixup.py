"""MixUp (Zhang et al., 2018): a micro-batch mixed with itself in reverse order, images and targets alike."""

from torch import Tensor

from data.random_streams import RandomStream


def mixing_weight(alpha: float, *, seed: int, step: int, number: int) -> float:
    """Weight of each sample of micro-batch `number` of a step against its partner, drawn from Beta(alpha, alpha)."""
    return float(RandomStream.MIXUP.generator(seed, step, number).beta(alpha, alpha))


def mixed(values: Tensor, weight: float) -> Tensor:
    """Mix images or targets (B, ...) of a floating type: `weight` of each sample, and the rest of its partner.

    Partners are the first and the last sample, the second and the second to last, and so on.
    """
    return weight * values + (1 - weight) * values.flip(0)
