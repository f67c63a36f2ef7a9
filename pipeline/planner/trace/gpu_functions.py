"""Torch's choices on a GPU or a CPU, made on the meta device: casts of autocast, and the kernel of attention.

The meta device has neither: autocast knows no such device, and attention is the plain formula there.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

# torch/aten/src/ATen/autocast_mode.h, AT_FORALL_LOWER_PRECISION_FP and AT_FORALL_FP32: those that a vision model calls.
_HALF = {
    "__matmul__", "__rmatmul__", "addbmm", "addmm", "addmv", "baddbmm", "bmm", "conv1d", "conv2d", "conv3d",
    "conv_transpose2d", "einsum", "linear", "matmul", "mm", "mv", "prelu", "scaled_dot_product_attention",
}  # fmt: skip
_FLOAT32 = {
    "__pow__", "__rpow__", "acos", "asin", "binary_cross_entropy_with_logits", "cosh", "cosine_similarity",
    "cross_entropy", "cumprod", "cumsum", "dist", "erfinv", "exp", "expm1", "group_norm", "layer_norm", "log", "log10",
    "log1p", "log2", "log_softmax", "mse_loss", "nll_loss", "norm", "pow", "prod", "reciprocal", "rsqrt", "sinh",
    "softmax", "sum", "tan",
}  # fmt: skip
# The same for CPUs: of what a model calls, nothing is float32 there for autocast's sake.
_FLOAT32_ON_CPU: set[str] = set()


class GpuFunctions(TorchFunctionMode):
    """Runs functions of torch on the meta device as they run on a GPU.

    Attention without a bias is flash attention in half precision; with a bias, or in float32, it is the
    memory-efficient kernel. With `autocast` to a dtype its rules apply, and weights are cast once while the mode lasts.

    Args:
        autocast: the dtype.
        on_cpu: choose as on CPUs instead: attention whose bias is trained is the plain formula there, and autocast
            leaves norms and softmax in half precision.
    """

    def __init__(self, autocast: torch.dtype | None = None, *, on_cpu: bool = False) -> None:
        super().__init__()
        self._autocast, self._on_cpu = autocast, on_cpu
        self._float32 = _FLOAT32_ON_CPU if on_cpu else _FLOAT32
        self._cast_weights: dict[int, tuple[Tensor, Tensor]] = {}  # holds the weights, whose ids are the keys

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, arguments: tuple[Any, ...] = (), keywords: Any = None
    ) -> Any:
        keywords = keywords or {}
        name = getattr(function, "__name__", "")
        if self._autocast is not None and name in _HALF:
            arguments, keywords = self._cast(arguments, self._autocast), self._cast(keywords, self._autocast)
        elif self._autocast is not None and name in self._float32:
            arguments, keywords = self._cast(arguments, torch.float32), self._cast(keywords, torch.float32)
        if function is F.scaled_dot_product_attention and not self._on_cpu:
            return _attention(*arguments, **keywords)
        return function(*arguments, **keywords)

    def forget_casts(self) -> None:
        """Drop the casts of weights, as the end of an autocast context does."""
        self._cast_weights.clear()

    def _cast(self, value: Any, dtype: torch.dtype) -> Any:
        if isinstance(value, Tensor):
            return self._cast_tensor(value, dtype)
        if isinstance(value, tuple | list):
            return type(value)(self._cast(one, dtype) for one in value)
        if isinstance(value, dict):
            return {key: self._cast(one, dtype) for key, one in value.items()}
        return value

    def _cast_tensor(self, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        if not tensor.is_floating_point() or tensor.dtype in (dtype, torch.float64):
            return tensor
        is_weight = tensor.dtype == torch.float32 and tensor.is_leaf and tensor.requires_grad
        if not is_weight:
            return tensor.to(dtype)
        if id(tensor) not in self._cast_weights:
            self._cast_weights[id(tensor)] = tensor, tensor.to(dtype)
        return self._cast_weights[id(tensor)][1]


def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    options: dict[str, Any] = {"dropout_p": dropout_p, "is_causal": is_causal, "scale": scale}
    if attn_mask is None and q.dtype != torch.float32:
        found: Tensor = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, **options)[0]
        return found
    if attn_mask is not None:
        attn_mask = attn_mask.expand(q.shape[0], q.shape[1], q.shape[2], k.shape[2])
    trains = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (q, k, v, attn_mask))
    efficient = torch.ops.aten._scaled_dot_product_efficient_attention
    result: Tensor = efficient(q, k, v, attn_mask, compute_log_sumexp=trains, **options)[0]
    return result
