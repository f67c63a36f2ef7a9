"""The Triton kernels of MBConv in Triton's interpreter: `TRITON_INTERPRET=1 python interpreted_kernels.py FILE`.

Writes to FILE what they and plain torch compute of the same values, as `CASES` has them, and how many wide tensors each
kernel reads and writes. A process of its own, as Triton decides at its import whether it interprets.
"""

import sys
from typing import Any

import numpy as np
import torch
from torch import Tensor
from triton.runtime import interpreter

from models import fused_depthwise
from models.kernels import launch

CASES: list[tuple[tuple[int, int, int, int], int, str, torch.dtype]] = [
    ((2, 4, 6, 18), 1, "tanh", torch.float32),
    ((2, 4, 6, 18), 2, "none", torch.float32),
    ((1, 4, 5, 16), 2, "tanh", torch.bfloat16),
    ((1, 4, 5, 16), 1, "none", torch.bfloat16),
]
"""Shape of the input, stride, GELU and dtype."""
KERNELS = ("moments", "depthwise", "activate", "activate_backward", "input_gradient", "depthwise_backward")
SMALL_TILES = {
    "PIXELS": 8, "COLUMNS": 4, "CHANNELS": 16, "PIXELS_OF_A_PROGRAM": 16, "ROWS_OF_A_PROGRAM": 3,
    "ROWS_OF_A_BACKWARD_PROGRAM": 4,
}  # fmt: skip
"""So that these images have several tiles and programs in each direction, and some that are not full."""


def rounded(original: Any) -> Any:
    """The interpreter's conversion of floats, but rounding to bfloat16 as GPUs do: it cuts digits off."""

    def convert(data: Any, source: Any, target: Any, rounding: Any) -> Any:
        if (source.name, target.name) != ("fp32", "bf16"):
            return original(data, source, target, rounding)
        values = torch.from_numpy(np.ascontiguousarray(data, dtype=np.float32))
        return values.bfloat16().view(torch.int16).numpy().view(np.uint16)

    return convert


class Counted:
    """A kernel that notes how many wide tensors each of its launches reads and writes; one in place does both."""

    def __init__(self, kernel: Any, elements: int, passes: list[int]) -> None:
        self.kernel, self.elements, self.passes = kernel, elements, passes

    def __getitem__(self, grid: Any) -> Any:
        def run(*arguments: Any, **constants: Any) -> None:
            tensors = [value for value in arguments if isinstance(value, Tensor)]
            self.passes.append(sum(tensor.numel() == self.elements for tensor in tensors))
            self.kernel[grid](*arguments, **constants)

        return run


def compare(shape: tuple[int, int, int, int], stride: int, gelu: str, dtype: torch.dtype) -> list[list[Tensor]]:
    """What the kernels compute, and plain torch: result, mean, convolution, statistics; and all gradients."""
    torch.manual_seed(0)
    C = shape[-1]
    x = (2 * torch.randn(shape) + 1).to(dtype)
    narrow = [torch.randn(size) for size in (C, C, (C, 1, 3, 3), C, C)]
    others: list[Any] = [*narrow, 1e-3, 1e-3, stride, gelu]
    ours, plain = launch.forward(x, *others), fused_depthwise._forward(x, *others)
    out, pooled, y, moments = plain
    # As autograd may hand them on: not contiguous.
    upstream = (torch.randn(out.mT.shape).to(dtype).mT, torch.randn(pooled.mT.shape).to(dtype).mT)
    gradients = [
        list(backward(*upstream, x, y, moments, *others)) for backward in (launch.backward, fused_depthwise._backward)
    ]
    return [[*ours, *gradients[0]], [*plain, *gradients[1]]]


def far_from_zero() -> dict[str, Tensor]:
    """Float32 values whose mean is ten thousand standard deviations, and their moments by the kernel."""
    torch.manual_seed(0)
    values = 10_000 + torch.randn(2, 4, 6, 4)
    mean, variance = launch._moments(values)
    return {"values": values, "mean": mean, "variance": variance}


def main() -> None:
    """All cases, to the file."""
    interpreter._convert_float = rounded(interpreter._convert_float)
    for name, size in SMALL_TILES.items():
        assert hasattr(launch, name)
        setattr(launch, name, size)
    passes: dict[str, list[int]] = {name: [] for name in KERNELS}
    cases = []
    for number, case in enumerate(CASES):
        if number == 0:
            kernels = {name: getattr(launch, name) for name in KERNELS}
            for name, kernel in kernels.items():
                setattr(launch, name, Counted(kernel, int(np.prod(case[0])), passes[name]))
        cases.append(compare(*case))
        if number == 0:
            for name, kernel in kernels.items():
                setattr(launch, name, kernel)
    torch.save({"cases": cases, "passes": passes, "far": far_from_zero()}, sys.argv[1])


if __name__ == "__main__":
    main()
