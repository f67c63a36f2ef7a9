"""Stochastic depth: in training, a sample skips a residual branch with a given probability.

The decisions are drawn on the host before the forward and passed to the blocks. So a block is a pure function of its
inputs: recomputing it for activation checkpointing repeats the decisions, a compiled block draws no random numbers,
and the number of kept samples is known without waiting for the device.
"""

from collections.abc import Sequence
from itertools import accumulate
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.autograd import Function

from models.host_tensors import to_device


class Kept(NamedTuple):
    """The samples of a micro-batch of B that take part in one residual branch, as tensors on the device."""

    samples: Tensor
    """(b,) int64 positions in the micro-batch, at least one, ascending."""
    places: Tensor
    """(B,) int64, the inverse: the position of each sample in `samples`, and b for those that are not kept."""
    scale: Tensor
    """() float32, the factor on the branch."""
    factors: Tensor
    """(B,) float32: `scale` for the samples that are kept, 0 for the others."""

    def of(self, x: Tensor) -> Tensor:
        """The kept samples of `x` (B, ...) -> (b, ...)."""
        return cast(Tensor, _Select.apply(x, self.samples, self.places))  # type: ignore[no-untyped-call]

    def add(self, shortcut: Tensor, branch: Tensor) -> Tensor:
        """`shortcut` (B, ...) plus the scaled `branch` (b, ...) at the kept samples."""
        tensors = shortcut, branch, self.samples, self.places, self.scale
        return cast(Tensor, _AddAtKept.apply(*tensors))  # type: ignore[no-untyped-call]

    def add_computed_for_all(self, shortcut: Tensor, branch: Tensor) -> Tensor:
        """`shortcut` (B, ...) plus the scaled `branch` (B, ...) at the kept samples: `add(shortcut, of(branch))`.

        Where all samples were computed anyway, a factor for each takes half as many passes over them as that.
        """
        scaled: Tensor = _ScaleSamples.apply(branch, self.factors)  # type: ignore[no-untyped-call]
        return shortcut + scaled.to(shortcut.dtype)


# index_add and the backward of index_select add with atomic instructions on GPUs, although no sample occurs twice:
# slow, and not deterministic. Below, samples are only gathered, from a buffer whose last row of zeros is for those that
# are not kept. In passes over the activations of B samples, with a share p kept: the addition takes 2p + (1 + p) + 3
# (scale into the buffer, gather, add) instead of 2 + 2p + 3p (clone, scale, index_add), and the backward of the
# selection 2p + (1 + p) instead of 1 + 3p, the same. Gathering any row for the others and masking it takes 6 + 3p and
# 3 + p.
#
# Compiled, the forwards write into no tensor and return what their last operation has made. Torch 2.11 would otherwise
# compile a gradient of zeros, without an error; and the compiler needs no such forms to save passes.


class _Select(Function):
    """`x[samples]`, with a gather for its backward."""

    @staticmethod
    def forward(x: Tensor, samples: Tensor, places: Tensor) -> Tensor:
        return x.index_select(0, samples)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(inputs[2])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (places,) = ctx.saved_tensors
        padded = torch.cat((grad, grad.new_zeros(1, *grad.shape[1:])))
        return padded.index_select(0, places), None, None


class _AddAtKept(Function):
    """`shortcut` with the scaled `branch` added at `samples`."""

    @staticmethod
    def forward(shortcut: Tensor, branch: Tensor, samples: Tensor, places: Tensor, scale: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            scaled = _cast(branch * scale, shortcut.dtype)
            padded = torch.cat((scaled, scaled.new_full((1, *scaled.shape[1:]), -0.0)))
            return padded.index_select(0, places) + shortcut
        padded = shortcut.new_empty(branch.shape[0] + 1, *branch.shape[1:])
        torch.mul(branch, scale, out=padded[:-1])
        padded[-1].fill_(-0.0)  # the sum with it is the shortcut to the bit, whatever the sign of its zeros
        return padded.index_select(0, places).add_(shortcut)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        _, branch, samples, _, scale = inputs
        ctx.dtype = branch.dtype
        ctx.save_for_backward(samples, scale)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        samples, scale = ctx.saved_tensors
        return grad, grad.index_select(0, samples).to(ctx.dtype).mul_(scale), None, None, None


class _ScaleSamples(Function):
    """`x` (B, ...) times a float32 factor for each sample, rounded once to the dtype of `x`."""

    @staticmethod
    def forward(x: Tensor, factors: Tensor) -> Tensor:
        factors = factors.view(-1, *[1] * (x.dim() - 1))
        if torch.compiler.is_compiling():
            return _cast(x * factors, x.dtype)
        # Not `x * factors`, which would be float32 and as large again. The factors are not rounded to bf16.
        return torch.mul(x, factors, out=torch.empty_like(x))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(inputs[1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _ScaleSamples.forward(grad, *ctx.saved_tensors), None


def _cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x if x.dtype == dtype else x.to(dtype)


def draw_kept(rates: Sequence[float], batch: int, device: torch.device) -> list[Kept]:
    """One draw for each branch: every sample is kept with probability `1 - rate`, and scaled by `1 / (1 - rate)`.

    Drawn from torch's default CPU generator, whatever the `device` that receives them.
    """
    if not rates:
        return []
    samples, places, scales = [], [], torch.zeros(len(rates))
    for number, rate in enumerate(rates):
        kept = torch.rand(batch) >= rate
        if kept.any():
            scales[number] = 1.0 / (1.0 - rate)
        else:
            # If one rank skipped a branch altogether, its collectives for sharded parameters would be missing.
            kept[0] = True
        samples.append(kept.nonzero().squeeze(1))
        before = torch.tensor(list(accumulate(kept.tolist(), initial=0))[:-1])
        places.append(torch.where(kept, before, len(samples[-1])))
    factors = scales[:, None] * torch.stack([place < len(one) for place, one in zip(places, samples, strict=True)])
    # Two copies to the device for all blocks.
    sizes = [len(one) for one in samples]
    positions = to_device(torch.cat([*samples, *places]), device)
    numbers = to_device(torch.cat([scales, factors.flatten()]), device)
    parts = torch.split(positions, [*sizes, *[batch] * len(rates)])
    scale_of, factors_of = numbers[: len(rates)].unbind(), numbers[len(rates) :].view(len(rates), batch).unbind()
    return [Kept(*one) for one in zip(parts[: len(rates)], parts[len(rates) :], scale_of, factors_of, strict=True)]
