"""The random streams of a run: each draw is seeded by (run seed, stream, its place in the run)."""

from enum import IntEnum

import numpy as np


class RandomStream(IntEnum):
    """Keeps draws for different purposes independent. The values are part of the identity of a run."""

    SHARD_ORDER = 1
    """Permutation of the shards of an epoch; place: epoch."""
    WINDOW_ORDER = 2
    """Permutation within a shuffle window; place: epoch, lane, window."""
    AUGMENTATION = 3
    """Crop, flip, RandAugment and color jitter of a sample; place: epoch, sample id."""
    STOCHASTIC_DEPTH = 4
    """Dropped branches of a micro-batch; place: step, micro-batch."""
    MIXUP = 5
    """Mixing weight of a micro-batch; place: step, micro-batch."""
    REPLACEMENT = 6
    """Samples that take the place of an unusable one; place: epoch, sample id."""
    ERASING = 7
    """Erased rectangles of a sample; place: epoch, sample id."""
    CUTMIX = 8
    """Whether a micro-batch is mixed, by MixUp or CutMix, and CutMix's rectangle; place: step, micro-batch."""

    def generator(self, seed: int, *place: int) -> np.random.Generator:
        """The generator for the draws at `place` of the run with `seed`."""
        return np.random.default_rng([seed, self, *place])

    def torch_seed(self, seed: int, *place: int) -> int:
        """A seed of 64 bits for torch's generator, for the draws at `place`."""
        return int(np.random.SeedSequence([seed, self, *place]).generate_state(1, np.uint64)[0])
