"""The middle of MBConv, from the output of its expansion to the input of its projection, with few passes over memory.

BatchNorm - GELU - 3x3 depthwise convolution - BatchNorm - GELU, and the mean over pixels that squeeze-and-excitation
takes. As two operators, forward and backward, each with two implementations: plain torch here, for any device and for
gradient checks in float64, and Triton kernels for GPUs in `models.kernels`. Of the wide tensors, three are stored for
the backward: the input, the convolution's output and the result.

B, H, W, C: images, rows, columns and channels. Arithmetic is in float32 (or float64 for float64 images), and only what
is stored is rounded to the images' dtype.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from models.norm import BatchNorm

_PIXELS = (0, 1, 2)
"""The dimensions over which BatchNorm takes its statistics."""


def fused_depthwise(
    x_BHWC: Tensor, norm1: BatchNorm, weight: Tensor, norm2: BatchNorm, *, stride: int, gelu: str
) -> tuple[Tensor, Tensor]:
    """`gelu(norm2(conv(gelu(norm1(x)))))` in training, and its mean over pixels.

    Both norms use and record the statistics of this micro-batch, as in their own forwards.

    Args:
        x_BHWC: float32 or bfloat16; on CPUs also float64.
        norm1, norm2: of the input and of the convolution's output.
        weight: (C, 1, 3, 3), of a depthwise convolution that is padded by one.
        stride: 1 or 2.
        gelu: `tanh` or `none`, as torch calls its approximation.

    Returns:
        (B, ceil(H / stride), ceil(W / stride), C) and (B, C), in the dtype of `x_BHWC`.

    Raises:
        ValueError: one value per channel, which has no variance; or a dtype that the kernels do not take.
    """
    B, H, W, _ = x_BHWC.shape
    counts = (B * H * W, B * -(-H // stride) * -(-W // stride))
    if min(counts) == 1:
        raise ValueError(f"images of shape {tuple(x_BHWC.shape)}: BatchNorm needs more than one value per channel")
    dtype = norm1.running_mean.dtype
    narrow = [t.to(dtype) for t in (norm1.weight, norm1.bias, weight, norm2.weight, norm2.bias)]
    out, pooled, _, moments = torch.ops.coatnet.fused_depthwise(x_BHWC, *narrow, norm1.eps, norm2.eps, stride, gelu)
    for norm, count, (mean, variance) in zip((norm1, norm2), counts, moments.detach().split(2), strict=True):
        norm.record(torch.stack((mean, variance * (count / (count - 1)))))
    return out, pooled


def _normalized(x: Tensor, mean: Tensor, variance: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """Images that are normalized, in the dtype of the statistics, and the reciprocal of the standard deviation."""
    reciprocal = (variance + epsilon).rsqrt()
    return (x.to(mean.dtype) - mean) * reciprocal, reciprocal


@torch.library.custom_op("coatnet::fused_depthwise", mutates_args=())
def _forward(
    x: Tensor, scale1: Tensor, shift1: Tensor, weight: Tensor, scale2: Tensor, shift2: Tensor,
    epsilon1: float, epsilon2: float, stride: int, gelu: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The result, its mean over pixels (B, C), the output of the convolution, and (4, C) float32: mean and biased
    variance of x, and of that output as it is stored. The other arguments are float32, or float64 with x."""
    variance1, mean1 = torch.var_mean(x.to(scale1.dtype), _PIXELS, correction=0)
    z, _ = _normalized(x, mean1, variance1, epsilon1)
    activated = F.gelu(z * scale1 + shift1, approximate=gelu).permute(0, 3, 1, 2)
    with torch.autocast(x.device.type, enabled=False):  # which would round both to bfloat16
        y = F.conv2d(activated, weight, stride=stride, padding=1, groups=x.shape[-1])
    y = y.permute(0, 2, 3, 1).to(x.dtype).contiguous()
    variance2, mean2 = torch.var_mean(y.to(scale2.dtype), _PIXELS, correction=0)
    z, _ = _normalized(y, mean2, variance2, epsilon2)
    out = F.gelu(z * scale2 + shift2, approximate=gelu).to(x.dtype)
    pooled = out.to(scale2.dtype).mean((1, 2)).to(x.dtype)
    return out, pooled, y, torch.stack((mean1, variance1, mean2, variance2))


@torch.library.custom_op("coatnet::fused_depthwise_backward", mutates_args=())
def _backward(
    gradient: Tensor, pooled_gradient: Tensor, x: Tensor, y: Tensor, moments: Tensor,
    scale1: Tensor, shift1: Tensor, weight: Tensor, scale2: Tensor, shift2: Tensor,
    epsilon1: float, epsilon2: float, stride: int, gelu: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of x, scale1, shift1, weight, scale2 and shift2 from those of the result and of its mean."""
    mean1, variance1, mean2, variance2 = moments.unbind()
    upstream = gradient.to(moments.dtype) + pooled_gradient.to(moments.dtype)[:, None, None] / y[0, ..., 0].numel()
    y_hat, reciprocal2 = _normalized(y, mean2, variance2, epsilon2)
    dz = torch.ops.aten.gelu_backward(upstream, y_hat * scale2 + shift2, approximate=gelu)
    dscale2, dshift2 = (dz * y_hat).sum(_PIXELS), dz.sum(_PIXELS)
    count = y.numel() // y.shape[-1]
    dy = (dz - dshift2 / count - y_hat * (dscale2 / count)) * (scale2 * reciprocal2)

    x_hat, reciprocal1 = _normalized(x, mean1, variance1, epsilon1)
    z = x_hat * scale1 + shift1
    activated = F.gelu(z, approximate=gelu).permute(0, 3, 1, 2)
    dy = dy.to(x.dtype).to(moments.dtype).permute(0, 3, 1, 2)
    da, dweight, _ = torch.ops.aten.convolution_backward(
        dy, activated, weight, None, [stride] * 2, [1, 1], [1, 1], False, [0, 0], x.shape[-1], [True, True, False]
    )
    dz = torch.ops.aten.gelu_backward(da.permute(0, 2, 3, 1), z, approximate=gelu)
    dscale1, dshift1 = (dz * x_hat).sum(_PIXELS), dz.sum(_PIXELS)
    count = x.numel() // x.shape[-1]
    dz = dz.to(x.dtype).to(moments.dtype)
    dx = (dz - dshift1 / count - x_hat * (dscale1 / count)) * (scale1 * reciprocal1)
    return dx.to(x.dtype).contiguous(), dscale1, dshift1, dweight, dscale2, dshift2


@_forward.register_kernel("cuda")
def _forward_on_gpu(*arguments: Any) -> Any:
    from models.kernels.launch import forward

    return forward(*arguments)


@_backward.register_kernel("cuda")
def _backward_on_gpu(*arguments: Any) -> Any:
    from models.kernels.launch import backward

    return backward(*arguments)


@_forward.register_fake
def _shapes(x: Tensor, scale1: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    B, H, W, C = x.shape
    stride = arguments[-2]
    y = x.new_empty((B, (H + stride - 1) // stride, (W + stride - 1) // stride, C))
    return torch.empty_like(y), x.new_empty((B, C)), y, scale1.new_empty((4, C))


@_backward.register_fake
def _gradient_shapes(
    gradient: Tensor, pooled_gradient: Tensor, x: Tensor, y: Tensor, moments: Tensor, *arguments: Any
) -> tuple[Tensor, ...]:
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    return dx, *(torch.empty_like(t, memory_format=torch.contiguous_format) for t in arguments[:5])


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, *narrow = inputs[:6]
    _, _, y, moments = output
    ctx.save_for_backward(x, y, moments, *narrow)
    ctx.constants = inputs[6:]
    # Otherwise a gradient of zeros would be made for the wide tensor y, which nothing differentiates.
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, gradient: Tensor | None, pooled_gradient: Tensor | None, *_: Any) -> tuple[Any, ...]:
    x, y, moments, *narrow = ctx.saved_tensors
    if gradient is None:
        gradient = torch.zeros_like(y)
    if pooled_gradient is None:
        pooled_gradient = y.new_zeros((y.shape[0], y.shape[-1]))
    gradients = torch.ops.coatnet.fused_depthwise_backward(
        gradient, pooled_gradient, x, y, moments, *narrow, *ctx.constants
    )
    return *gradients, None, None, None, None


_forward.register_autograd(_differentiate, setup_context=_keep)
