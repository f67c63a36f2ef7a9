"""Stochastic depth: in training, a sample skips a residual branch with a given probability.

The decisions are drawn on the host before the forward and passed to the blocks. So a block is a pure function of its
inputs: recomputing it for activation checkpointing repeats the decisions, a compiled block draws no random numbers,
and the number of kept samples is known without waiting for the device.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Kept(NamedTuple):
    """The samples that take part in one residual branch."""

    samples: Tensor
    """(b,) int64 positions in the micro-batch, at least one."""
    scale: Tensor
    """() float32, the factor on the branch."""

    def of(self, x: Tensor) -> Tensor:
        """The kept samples of `x` (B, ...) -> (b, ...)."""
        return x.index_select(0, self.samples)

    def add(self, shortcut: Tensor, branch: Tensor) -> Tensor:
        """`shortcut` (B, ...) plus the scaled `branch` (b, ...) at the kept samples."""
        return shortcut.index_add(0, self.samples, (branch * self.scale).to(shortcut.dtype))


def draw_kept(rates: Sequence[float], batch: int, device: torch.device) -> list[Kept]:
    """One draw for each branch: every sample is kept with probability `1 - rate`, and scaled by `1 / (1 - rate)`.

    Drawn from torch's default CPU generator, whatever the `device` that receives them.
    """
    kept, scales = [], []
    for rate in rates:
        samples = (torch.rand(batch) >= rate).nonzero().squeeze(1)
        scales.append(1.0 / (1.0 - rate) if samples.numel() else 0.0)
        # If one rank skipped a branch altogether, its collectives for sharded parameters would be missing.
        kept.append(samples if samples.numel() else torch.zeros(1, dtype=torch.long))
    if not kept:
        return []
    # One copy to the device for all blocks.
    samples_on_device = torch.cat(kept).to(device, non_blocking=True)
    scales_on_device = torch.tensor(scales, dtype=torch.float32).to(device, non_blocking=True)
    parts = torch.split(samples_on_device, [samples.numel() for samples in kept])
    return [Kept(*pair) for pair in zip(parts, scales_on_device.unbind(), strict=True)]
