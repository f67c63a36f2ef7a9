"""Whether training can demand deterministic algorithms on GPUs: there is none here, so the operations of a step are listed."""

from typing import Any

import pytest
import torch

from models.registry import create_model
from pipeline.training.loss import class_targets, classification_loss
from tests.support.operators import Recorded

# From the documentation of torch.use_deterministic_algorithms: on CUDA tensors they raise an error.
WITHOUT_ALGORITHM = (
    "avg_pool3d_backward", "adaptive_avg_pool2d", "adaptive_avg_pool3d", "adaptive_max_pool2d_backward", "fractional_max_pool",
    "max_unpool", "upsample_", "reflection_pad", "nll_loss", "ctc_loss", "embedding_bag", "put_", "histc", "bincount", "median",
    "grid_sampler", "cumsum", "scatter_reduce", "kthvalue",
)  # fmt: skip


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
    with Recorded() as seen:
        logits = model(torch.randn(8, 32, 32, 3))
        targets = class_targets(torch.tensor([[0], [1], [2]] * 2 + [[0], [1]]), 3, kind=kind, label_smoothing=0.1)
        torch.autograd.backward(classification_loss(logits, targets, kind).mean())
    assert {"convolution_backward", "index_select", "constant_pad_nd"} <= seen.counts.keys()
    assert [
        name
        for name in sorted(seen.counts)
        if name.startswith(WITHOUT_ALGORITHM) or name.lstrip("_").startswith(WITHOUT_ALGORITHM)
    ] == []
