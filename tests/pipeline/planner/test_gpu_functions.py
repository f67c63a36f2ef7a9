"""Functions on the meta device run as on a GPU."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.planner.trace.gpu_functions import GpuFunctions
from pipeline.planner.trace.recording import Recording


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


@pytest.mark.parametrize(
    ("function", "dtype"),
    [
        (lambda x: F.linear(x, meta(8, 8)), torch.bfloat16),
        (lambda x: F.conv2d(x, meta(2, 2, 1, 1)), torch.bfloat16),
        (lambda x: x @ x, torch.bfloat16),
        (lambda x: torch.einsum("abcd,abde->abce", x, x), torch.bfloat16),
        (lambda x: F.layer_norm(x, (8,)), torch.float32),
        (lambda x: x.bfloat16().softmax(-1), torch.float32),
        (lambda x: x.bfloat16().sum(), torch.float32),
        (lambda x: F.gelu(x.bfloat16()), torch.bfloat16),
        (lambda x: F.gelu(x), torch.float32),
    ],
)
def test_autocast_computes_in_the_dtypes_that_it_has_on_gpus(
    function: Callable[[Tensor], Tensor], dtype: torch.dtype
) -> None:
    with GpuFunctions(torch.bfloat16):
        assert function(meta(2, 2, 8, 8)).dtype == dtype


def test_a_weight_is_cast_once_and_an_activation_each_time() -> None:
    layer = nn.Linear(8, 8, bias=False, device="meta")
    recording = Recording()
    with recording, GpuFunctions(torch.bfloat16):
        x = meta(4, 8)
        layer(x)
        layer(x)
    assert [o.name for o in recording.operations] == ["_to_copy", "_to_copy", "mm", "_to_copy", "mm"]


@pytest.mark.parametrize(
    ("biased", "dtype", "kernel"),
    [
        (False, torch.bfloat16, "_scaled_dot_product_flash_attention"),
        (True, torch.bfloat16, "_scaled_dot_product_efficient_attention"),
        (False, torch.float32, "_scaled_dot_product_efficient_attention"),
    ],
)
def test_a_bias_and_float32_exclude_flash_attention(biased: bool, dtype: torch.dtype, kernel: str) -> None:
    q = meta(2, 3, 16, 8, dtype=dtype)
    recording = Recording()
    with recording, GpuFunctions():
        F.scaled_dot_product_attention(q, q, q, attn_mask=meta(1, 3, 16, 16, dtype=dtype) if biased else None)
    assert [o.name for o in recording.operations] == [kernel]
