"""Whether training can demand deterministic algorithms on GPUs: there is none here, so the operations of a step are listed."""

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from models.registry import create_model
from pipeline.training.loss import class_targets, classification_loss

# From the documentation of torch.use_deterministic_algorithms: on CUDA tensors they raise an error.
WITHOUT_ALGORITHM = (
    "avg_pool3d_backward", "adaptive_avg_pool2d", "adaptive_avg_pool3d", "adaptive_max_pool2d_backward", "fractional_max_pool",
    "max_unpool", "upsample_", "reflection_pad", "nll_loss", "ctc_loss", "embedding_bag", "put_", "histc", "bincount", "median",
    "grid_sampler", "cumsum", "scatter_reduce", "kthvalue",
)  # fmt: skip


class Operations(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Names of the operations inside."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {
            "convolution_norm": "layer", "relative_attention": "post_normalization", "pool": "average",
            "stride_in": "depthwise",
        },
    ],
    ids=["paper", "other-options"],
)  # fmt: skip
def test_no_operation_of_a_training_step_lacks_a_deterministic_algorithm(kind: Any, options: dict[str, Any]) -> None:
    model = create_model("coatnet_debug", num_classes=3, image_size=32, drop_path_rate=0.3, **options)
    with Operations() as seen:
        logits = model(torch.randn(8, 32, 32, 3))
        targets = class_targets(torch.tensor([[0], [1], [2]] * 2 + [[0], [1]]), 3, kind=kind, label_smoothing=0.1)
        torch.autograd.backward(classification_loss(logits, targets, kind).mean())
    assert {"convolution_backward", "index_select", "constant_pad_nd"} <= seen.names
    assert [
        name
        for name in sorted(seen.names)
        if name.startswith(WITHOUT_ALGORITHM) or name.lstrip("_").startswith(WITHOUT_ALGORITHM)
    ] == []
