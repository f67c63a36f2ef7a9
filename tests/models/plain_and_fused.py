"""The middle of MBConv computed in both ways, for comparing them."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from models.mbconv import EXPANSION, MBConv
from models.variants import Variant


def plain_and_fused(
    shape: tuple[int, int, int, int],
    *,
    stride: int,
    dtype: torch.dtype,
    device: torch.device,
    variant: Variant,
    values: torch.dtype | None = None,
) -> tuple[Callable[[], list[Tensor]], Callable[[], list[Tensor]]]:
    """The two ways to compute `MBConv.convolve` in training, for comparing what they return.

    Args:
        shape: (B, H, W, C) of its input; C is a multiple of 4.
        stride: of the depthwise convolution, 1 or 2.
        dtype: of the images; the parameters are float32, as under autocast.
        device: where the tensors are.
        variant: has GELU and the epsilon of BatchNorm.
        values: what the input and the gradients of the results are rounded to before they are computed with, by default
            `dtype`. With `dtype` float32 and bfloat16 here, the ways compute in float32 what others do in bfloat16.

    Returns:
        The plain and the fused way: functions that compute forward and backward from the same values, and return the
        result (B, H/stride, W/stride, C), its mean (B, C), the gradients of the input, of the first norm's scale and
        shift, of the convolution, and of the second norm's scale and shift; and the recorded statistics (4, C).
    """
    width = shape[3] // EXPANSION
    generator = torch.Generator().manual_seed(0)
    x, *initial = (
        torch.randn(size, generator=generator).to(device)
        for size in (shape, *((4 * width,),) * 2, (4 * width, 1, 3, 3), *((4 * width,),) * 2)
    )
    x = x.to(values or dtype).to(dtype).requires_grad_()

    def way(fused: bool) -> Callable[[], list[Tensor]]:
        options = replace(variant, stride_in="depthwise", convolution_norm="batch")
        block = MBConv(width, width, stride=stride, variant=options).to(device)
        block.fused = fused
        inner: tuple[Any, ...] = (block.expand_norm, block.depthwise, block.depthwise_norm)
        parameters = [parameter for layer in inner for parameter in layer.parameters()]
        for parameter, value in zip(parameters, initial, strict=True):
            parameter.data.copy_(value)

        def run() -> list[Tensor]:
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                out, mean = block.convolve(x)
            upstream = [
                torch.linspace(-1, 1, t.numel(), device=device).view_as(t).to(values or t.dtype).sin().to(t.dtype)
                for t in (out, mean)
            ]
            gradients = torch.autograd.grad([out, mean], [x, *parameters], upstream)
            statistics = torch.cat([norm.recorded for norm in (inner[0], inner[2])])
            for norm in (inner[0], inner[2]):
                norm.reset_statistics()
            return [out.detach(), mean.detach(), *gradients, statistics]

        return run

    return way(False), way(True)
