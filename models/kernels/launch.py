"""The two operators of `models.fused_depthwise` by Triton kernels; their arguments and results are described there."""

from collections.abc import Callable
from typing import Any

import torch
import triton
from torch import Tensor

from models.kernels.depthwise import depthwise, depthwise_backward
from models.kernels.normalization import activate, activate_backward, input_gradient, moments

PIXELS = 16
"""Of a tile of the kernels that go through whole images."""
COLUMNS = 4
"""Of a tile of the kernels that go from row to row: with CHANNELS, two elements for each thread of four warps, so that
the nine taps and their gradients stay in registers. It divides the widths of the feature maps."""
CHANNELS = 64
"""Of a tile: in bfloat16 the 128 bytes of a cache line."""
PIXELS_OF_A_PROGRAM = 512
"""At most, of one image: many programs for the GPU, and few partial sums."""
ROWS_OF_A_PROGRAM = 32
"""At most, of one output of the convolution."""
ROWS_OF_A_BACKWARD_PROGRAM = 128
"""Of all images: more, as each program has eleven partial sums for a channel."""
_DTYPES = (torch.float32, torch.bfloat16)


def _divided(size: int, part: int) -> int:
    return -(-size // part)


def _check(x_BHWC: Tensor) -> None:
    if x_BHWC.dtype not in _DTYPES:
        raise ValueError(
            f"fused depthwise convolution of {x_BHWC.dtype}: the kernels take {', '.join(map(str, _DTYPES))}"
        )
    if x_BHWC[0].numel() >= 2**31:
        raise ValueError(
            f"fused depthwise convolution of {tuple(x_BHWC.shape)}: the kernels take images of less than 2^31 elements"
        )


def _channels(C: int) -> int:
    return int(min(CHANNELS, triton.next_power_of_2(C)))


def _merged(partial: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Mean and biased variance from the counts, means and squared deviations of parts, (parts, 3, C)."""
    counts, means, squares = partial.unbind(1)
    mean = (counts * means).sum(0) / count
    return mean, (squares + counts * (means - mean).square()).sum(0) / count


def _normalization(mean: Tensor, variance: Tensor, scale: Tensor, shift: Tensor, epsilon: float) -> Tensor:
    """(4, C): a and b of a x + b, the mean, and the reciprocal of the standard deviation."""
    reciprocal = (variance + epsilon).rsqrt()
    a = scale * reciprocal
    return torch.stack((a, shift - mean * a, mean, reciprocal))


def _through_images(kernel: Any, x: Tensor) -> tuple[int, Callable[..., None]]:
    """The number of parts into which all images are divided, and the kernel as a function of its first arguments."""
    B, H, W, C = x.shape
    chunks, channels = _divided(H * W, PIXELS_OF_A_PROGRAM), _channels(C)
    grid = (B * chunks * _divided(C, channels),)

    def launch(*arguments: Tensor, **constants: bool) -> None:
        kernel[grid](*arguments, H * W, C, chunks, **constants, BP=PIXELS, BC=channels)

    return B * chunks, launch


def _moments(x: Tensor) -> tuple[Tensor, Tensor]:
    parts, launch = _through_images(moments, x)
    partial = x.new_empty((parts, 3, x.shape[-1]), dtype=torch.float32)
    launch(x, partial)
    return _merged(partial, x.numel() // x.shape[-1])


def forward(
    x: Tensor, scale1: Tensor, shift1: Tensor, weight: Tensor, scale2: Tensor, shift2: Tensor,
    epsilon1: float, epsilon2: float, stride: int, gelu: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(B, H, W, C) -> output, its mean over pixels, convolution, moments (4, C)."""
    _check(x)
    x, tanh = x.contiguous(), gelu == "tanh"
    B, H, W, C = x.shape
    OUT_H, OUT_W = _divided(H, stride), _divided(W, stride)
    mean1, variance1 = _moments(x)
    norm = _normalization(mean1, variance1, scale1, shift1, epsilon1)
    y = x.new_empty((B, OUT_H, OUT_W, C))
    chunks, channels = _divided(OUT_H, ROWS_OF_A_PROGRAM), _channels(C)
    parts = B * chunks * _divided(OUT_W, COLUMNS)
    partial = x.new_empty((parts, 3, C), dtype=torch.float32)
    depthwise[(parts * _divided(C, channels),)](
        x, norm, _taps(weight), y, partial, H, W, C, OUT_H, OUT_W, chunks,
        STRIDE=stride, TANH=tanh, BW=COLUMNS, BC=channels,
    )  # fmt: skip
    mean2, variance2 = _merged(partial, B * OUT_H * OUT_W)
    norm = _normalization(mean2, variance2, scale2, shift2, epsilon2)
    out = torch.empty_like(y)
    parts, launch = _through_images(activate, y)
    sums = x.new_empty((parts, C), dtype=torch.float32)
    launch(y, norm, out, sums, TANH=tanh)
    pooled = (sums.view(B, -1, C).sum(1) / (OUT_H * OUT_W)).to(x.dtype)
    return out, pooled, y, torch.stack((mean1, variance1, mean2, variance2))


def backward(
    gradient: Tensor, pooled_gradient: Tensor, x: Tensor, y: Tensor, moments: Tensor,
    scale1: Tensor, shift1: Tensor, weight: Tensor, scale2: Tensor, shift2: Tensor,
    epsilon1: float, epsilon2: float, stride: int, gelu: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of x, scale1, shift1, weight, scale2 and shift2."""
    gradient, x, tanh = gradient.contiguous(), x.contiguous(), gelu == "tanh"
    (B, H, W, C), (_, OUT_H, OUT_W, _) = x.shape, y.shape
    mean1, variance1, mean2, variance2 = moments.unbind()
    norm = _normalization(mean2, variance2, scale2, shift2, epsilon2)
    pooled = pooled_gradient.float().contiguous() / (OUT_H * OUT_W)
    parts, launch = _through_images(activate_backward, y)
    partial = x.new_empty((parts, 2, C), dtype=torch.float32)
    launch(gradient, pooled, y, norm, partial, TANH=tanh)
    sums2 = partial.sum(0)
    dy = torch.empty_like(y)
    _, launch = _through_images(input_gradient, y)
    launch(gradient, pooled, y, norm, sums2 / (B * OUT_H * OUT_W), dy, ACTIVATED=True, TANH=tanh)
    norm = _normalization(mean1, variance1, scale1, shift1, epsilon1)
    channels, rows = _channels(C), B * H
    parts = _divided(rows, ROWS_OF_A_BACKWARD_PROGRAM) * _divided(W, COLUMNS)
    partial = x.new_empty((parts, 11, C), dtype=torch.float32)
    dx = torch.empty_like(x)
    depthwise_backward[(parts * _divided(C, channels),)](
        dy, x, norm, _taps(weight), dx, partial, rows, H, W, C, OUT_H, OUT_W, ROWS_OF_A_BACKWARD_PROGRAM,
        STRIDE=stride, TANH=tanh, BW=COLUMNS, BC=channels,
    )  # fmt: skip
    sums1 = partial.sum(0)
    _, launch = _through_images(input_gradient, x)
    # In place: what was the gradient before GELU becomes that of x. `pooled` is not read.
    launch(dx, pooled, x, norm, sums1[:2] / (B * H * W), dx, ACTIVATED=False, TANH=tanh)
    weight_gradient = sums1[2:].t().reshape(weight.shape)
    return dx, sums1[1].clone(), sums1[0].clone(), weight_gradient.contiguous(), sums2[1].clone(), sums2[0].clone()


def _taps(weight: Tensor) -> Tensor:
    """(C, 1, 3, 3) -> (9, C)."""
    return weight.reshape(-1, 9).t().contiguous()
