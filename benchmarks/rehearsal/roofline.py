"""What an operation takes at least on a GPU: the time for its bytes or for its arithmetic, whichever is longer.

The rates are below the data sheet's, by what kernels of torch are known to reach; docs/gpus.md lists them. A bound says
which operations are worth looking at. How fast a kernel is, it does not say.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import flop_registry

_ATTENTION = "_scaled_dot_product_efficient_attention"


@dataclass(frozen=True, slots=True)
class Rates:
    """How fast a GPU is taken to be; by default an H100 SXM: 3.35 TB/s and 989 TFLOP/s by its data sheet."""

    bandwidth: float = 2.7e12
    """Bytes per second that an operation on large tensors reads and writes."""
    matrix: float = 600e12
    """Operations per second of matrix products and convolutions in bf16."""
    matrix_float32: float = 50e12
    """The same in float32, without TF32."""
    attention: dict[str, float] = field(default_factory=lambda: {_ATTENTION: 150e12, f"{_ATTENTION}_backward": 110e12})
    """Operations per second of the attention kernels, which are not made for this GPU."""
    slow: dict[str, float] = field(
        default_factory=lambda: {
            "convolution depthwise": 1.5e12,
            "convolution_backward depthwise": 0.8e12,
            "index_add": 0.5e12,
        }
    )
    """Bytes per second of operations whose kernels are far from `bandwidth`."""
    launch: float = 3e-6
    """Seconds that any kernel takes."""
    launch_on_host: float = 7e-6
    """Seconds of the host for an operation; a step cannot be faster than the host issues it."""


def label(function: Any, arguments: Sequence[Any]) -> str:
    """The name of an operator, with the kind of convolution."""
    name: str = function.overloadpacket.__name__
    if not name.startswith("convolution"):
        return name
    groups = arguments[8] if name == "convolution" else arguments[9]
    return f"{name} {'depthwise' if groups > 1 else 'dense'}"


def operation_seconds(
    name: str, tensors: Sequence[Tensor], operations: int, *, float32: bool, rates: Rates
) -> tuple[int, float]:
    """Bytes and seconds of a call of operator `name`, as `label` has it, on different `tensors` in and out."""
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    matrix = rates.matrix_float32 if float32 else rates.attention.get(name, rates.matrix)
    seconds = max(size / rates.slow.get(name, rates.bandwidth), operations / matrix, rates.launch)
    return size, seconds


def count_operations(function: Any, name: str, arguments: Any, keywords: Any, result: Any) -> int:
    """Additions and multiplications of a call by torch's counter; 0 for those that bytes alone limit."""
    # Torch counts the backward of a depthwise convolution as if it were dense.
    if function.overloadpacket not in flop_registry or name.endswith("depthwise"):
        return 0
    return int(flop_registry[function.overloadpacket](*arguments, **keywords, out_val=result))


def computes_in_float32(tensors: Sequence[Tensor]) -> bool:
    """Whether all floating-point tensors of a call are float32."""
    dtypes = {tensor.dtype for tensor in tensors if tensor.is_floating_point()}
    return dtypes == {torch.float32}
