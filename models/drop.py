"""Stochastic depth: in training, a sample skips a residual branch with a given probability."""

from collections.abc import Callable

import torch
from torch import Tensor


def add_branch_of_kept_samples(shortcut: Tensor, x: Tensor, branch: Callable[[Tensor], Tensor], rate: float) -> Tensor:
    """`shortcut + branch(x)` with the branch computed for the kept samples only and scaled by `1 / (1 - rate)`.

    Each sample is kept with probability `1 - rate`. The decision is drawn on the host, so that the shape of the work
    is known without waiting for the device. Only for branches that treat samples independently.

    Shapes: `shortcut` (B, ...), `x` (B, ...); `branch` maps (b, ...) to (b, ...) of the shortcut's trailing shape.
    """
    kept = (torch.rand(x.shape[0]) >= rate).nonzero().squeeze(1)
    scale = 1.0 / (1.0 - rate)
    if kept.numel() == 0:
        # A branch that one rank skips altogether would leave the collectives of sharded parameters unmatched.
        kept, scale = torch.zeros(1, dtype=torch.long), 0.0
    kept = kept.to(x.device, non_blocking=True)
    return shortcut.index_add(0, kept, branch(x.index_select(0, kept)).to(shortcut.dtype), alpha=scale)


def drop_samples(branch: Tensor, rate: float) -> Tensor:
    """Zero the branch of each sample with probability `rate` and scale the others by `1 / (1 - rate)`; (B, ...)."""
    keep = (torch.rand(branch.shape[0]) >= rate).to(branch.dtype) / (1.0 - rate)
    return branch * keep.to(branch.device, non_blocking=True).reshape(-1, *[1] * (branch.dim() - 1))
