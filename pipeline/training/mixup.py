"""MixUp (Zhang et al., 2018) and CutMix (Yun et al., 2019): a micro-batch mixed with itself in reverse order."""

import math
from dataclasses import dataclass

from torch import Tensor

from data.random_streams import RandomStream


@dataclass(frozen=True, slots=True)
class MixingSettings:
    """How micro-batches are mixed, as in timm's `Mixup` by batch: `probability` is its `prob`, `switch_probability` its
    `switch_prob`. An alpha of 0 leaves its method out."""

    mixup_alpha: float
    cutmix_alpha: float = 0.0
    probability: float = 1.0
    """That a micro-batch is mixed at all."""
    switch_probability: float = 0.5
    """That it is mixed by CutMix and not by MixUp, if there are both."""

    def mixing(self, size: int, *, seed: int, step: int, number: int) -> "Mixing | None":
        """How micro-batch `number` of a step, with square images of `size` pixels, is mixed; None if it is not."""
        place = {"seed": seed, "step": step, "number": number}
        if not self.mixup_alpha and not self.cutmix_alpha:
            return None
        if not self.cutmix_alpha and self.probability == 1:
            return Mixing(mixing_weight(self.mixup_alpha, **place))
        draws = RandomStream.CUTMIX.generator(seed, step, number)
        applied, switched = draws.random(2).tolist()
        if applied >= self.probability:
            return None
        if not self.cutmix_alpha or (self.mixup_alpha and switched >= self.switch_probability):
            return Mixing(mixing_weight(self.mixup_alpha, **place))
        share = float(draws.beta(self.cutmix_alpha, self.cutmix_alpha))
        down, along = draws.integers(size, size=2).tolist()
        return cut_at(size, share, down, along)


@dataclass(frozen=True, slots=True)
class Mixing:
    """How a micro-batch is mixed."""

    weight: float
    """Of each sample's targets against its partner's; without a rectangle also of its images."""
    rectangle: tuple[slice, slice] | None = None
    """Rows and columns that come from the partner's image."""

    def images(self, images: Tensor) -> Tensor:
        """(B, H, W, C) of a floating type -> the same shape; the input is not modified."""
        if self.rectangle is None:
            return mixed(images, self.weight)
        rows, columns = self.rectangle
        images = images.clone()
        images[:, rows, columns] = images.flip(0)[:, rows, columns]
        return images

    def targets(self, targets: Tensor) -> Tensor:
        """(B, classes) -> the same shape."""
        return mixed(targets, self.weight)


def mixing_weight(alpha: float, *, seed: int, step: int, number: int) -> float:
    """Weight of each sample of micro-batch `number` of a step against its partner, drawn from Beta(alpha, alpha)."""
    return float(RandomStream.MIXUP.generator(seed, step, number).beta(alpha, alpha))


def mixed(values: Tensor, weight: float) -> Tensor:
    """Mix images or targets (B, ...) of a floating type: `weight` of each sample, and the rest of its partner.

    Partners are the first and the last sample, the second and the second to last, and so on.
    """
    return weight * values + (1 - weight) * values.flip(0)


def cut_at(size: int, share: float, down: int, along: int) -> Mixing:
    """CutMix with a square of 1 - `share` of an image of `size` pixels around (`down`, `along`), clipped at the edges.

    The weight is the share that the rectangle really leaves.
    """
    side = int(size * math.sqrt(1 - share))
    rows, columns = (slice(max(0, at - side // 2), min(size, at + (side + 1) // 2)) for at in (down, along))
    area = (rows.stop - rows.start) * (columns.stop - columns.start)
    return Mixing(1 - area / (size * size), (rows, columns))
