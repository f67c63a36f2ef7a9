"""Batch normalization whose running statistics move once per optimizer step, by the mean over its micro-batches."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.variants import Variant


class BatchNorm(nn.Module):
    """BatchNorm over the last dimension of channels-last images.

    In training, a forward normalizes by the statistics of its own micro-batch and adds them to a record;
    `recorded_statistics` and `move_running_statistics` turn the records of one step, from all its micro-batches on
    all ranks, into one movement of the running statistics. So these do not depend on the number of micro-batches
    that a rank computes. Statistics are float32 whatever the dtype of the activations.
    """

    def __init__(self, width: int, *, eps: float = 1e-3, momentum: float = 0.01) -> None:
        super().__init__()
        self.eps = eps
        self.momentum = momentum
        self.recording = True
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))
        self.running_mean: Tensor
        self.running_var: Tensor
        self.recorded: Tensor
        """(2, width) float32: the sums over micro-batches of means and unbiased variances."""
        self.register_buffer("running_mean", torch.zeros(width))
        self.register_buffer("running_var", torch.ones(width))
        self.register_buffer("recorded", torch.zeros(2, width), persistent=False)

    def forward(self, x_BHWC: Tensor) -> Tensor:
        x_BCHW = x_BHWC.permute(0, 3, 1, 2)
        # The kernel takes bf16 activations with float32 for all the rest, and casts none of them.
        weight, bias = self.weight.to(self.running_mean.dtype), self.bias.to(self.running_mean.dtype)
        if not self.training:
            y_BCHW = F.batch_norm(x_BCHW, self.running_mean, self.running_var, weight, bias, eps=self.eps)
            return y_BCHW.permute(0, 2, 3, 1)
        # With momentum 1 the kernel leaves the batch's own mean and unbiased variance in these two. Not empty: it adds
        # 0 times what was there, which may be NaN. In one tensor, that is zeroed and added by one kernel each.
        statistics = torch.zeros_like(self.recorded)
        mean, variance = statistics.unbind()
        y_BCHW = F.batch_norm(x_BCHW, mean, variance, weight, bias, training=True, momentum=1.0, eps=self.eps)
        self.record(statistics)
        return y_BCHW.permute(0, 2, 3, 1)

    def record(self, statistics: Tensor) -> None:
        """Add the mean and the unbiased variance of a micro-batch, (2, width), unless recording is paused."""
        if self.recording:
            self.recorded += statistics

    @torch.no_grad()
    def reset_statistics(self) -> None:
        """Reset the running statistics to those of normalized activations, and clear the records."""
        self.running_mean.zero_()
        self.recorded.zero_()
        self.running_var.fill_(1.0)


def convolution_norm(width: int, variant: Variant) -> nn.Module:
    """The norm of a convolutional part: BatchNorm, or LayerNorm over the channels."""
    if variant.convolution_norm == "layer":
        return nn.LayerNorm(width, eps=variant.layer_norm_epsilon)
    return BatchNorm(width, eps=variant.batch_norm_epsilon, momentum=variant.batch_norm_momentum)


def batch_norms(model: nn.Module) -> list[BatchNorm]:
    """The BatchNorm layers of `model`, in module order."""
    return [module for module in model.modules() if isinstance(module, BatchNorm)]


@contextmanager
def recording_paused(model: nn.Module) -> Iterator[None]:
    """Inside, forwards record no statistics: they repeat earlier ones that did."""
    norms = batch_norms(model)
    for norm in norms:
        norm.recording = False
    try:
        yield
    finally:
        for norm in norms:
            norm.recording = True


def recorded_statistics(model: nn.Module) -> Tensor:
    """The sums over the micro-batches since the last movement: one flat float32 tensor, means then variances."""
    norms = batch_norms(model)
    records = [norm.recorded[kind] for kind in (0, 1) for norm in norms]
    return torch.cat(records) if records else torch.zeros(0, device=next(model.parameters()).device)


@torch.no_grad()
def move_running_statistics(model: nn.Module, statistics: Tensor) -> None:
    """Move every running mean and variance towards `statistics` by the layer's momentum, and clear the records.

    `statistics` is laid out as `recorded_statistics` returns it, divided by the number of micro-batches.
    """
    norms = batch_norms(model)
    widths = [norm.running_mean.numel() for norm in norms]
    parts = torch.split(statistics, widths * 2)
    running = [norm.running_mean for norm in norms] + [norm.running_var for norm in norms]
    if running:
        torch._foreach_lerp_(running, parts, [norm.momentum for norm in norms] * 2)
    discard_recorded_statistics(model)


@torch.no_grad()
def discard_recorded_statistics(model: nn.Module) -> None:
    """Clear the records, for a step that is not applied."""
    records = [norm.recorded for norm in batch_norms(model)]
    if records:
        torch._foreach_zero_(records)
