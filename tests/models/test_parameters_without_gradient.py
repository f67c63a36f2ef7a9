"""Which parameters have no gradient: the list of the model against gradients in float64, where rounding is far smaller."""

from typing import Any

import pytest
import torch
from torch.nn import functional as F

from models.registry import create_model

NEGLIGIBLE = 1e-9
"""Times the median gradient: float64 computes about 1e-13 for zero, and the smallest that is not zero is above 1e-3."""


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"stride_in": "depthwise"},
        {"pool": "average"},
        {"convolution_norm": "layer"},
        {"relative_attention": "none"},
        {"relative_attention": "post_normalization"},
        {"name": "coatnet_nano"},
        {"name": "coatnet_2_vit_rel", "depths": [1], "widths": [64, 64]},
    ],
    ids=str,
)
def test_exactly_these_parameters_have_no_gradient(options: dict[str, Any]) -> None:
    name = options.get("name", "coatnet_debug")
    others = {key: value for key, value in options.items() if key != "name"}
    model = create_model(name, num_classes=7, image_size=(64, 64), **others).double()
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():  # so that no gradient is zero for a reason of the initial weights
            parameter.add_(0.05 * torch.randn_like(parameter))
    images = torch.randn(8, 64, 64, 3, dtype=torch.float64)
    F.cross_entropy(model(images), torch.randint(7, (8,))).backward()  # type: ignore[no-untyped-call]
    gradients = {name: p.grad.flatten().abs() for name, p in model.named_parameters() if p.grad is not None}
    typical = torch.cat(list(gradients.values())).median()
    listed = model.parameters_without_gradient()
    for parameter_name, gradient in gradients.items():
        start, stop = listed.pop(parameter_name, (0, 0))
        expected = torch.zeros(len(gradient), dtype=torch.bool)
        expected[start:stop] = True
        assert torch.equal(gradient < NEGLIGIBLE * typical, expected), parameter_name
    assert not listed


def test_the_paper_models_have_them_in_stem_mbconv_and_keys() -> None:
    listed = create_model(
        "coatnet_0", num_classes=10, image_size=(224, 224), device="meta"
    ).parameters_without_gradient()
    blocks = [f"blocks.{n}.norm.bias" for n in range(5)] + [f"blocks.{n}.attention.qkv.bias" for n in range(5, 12)]
    assert list(listed) == ["stem.conv1.bias", *blocks]
    assert listed["blocks.5.attention.qkv.bias"] == (384, 768)
    assert sum(stop - start for start, stop in listed.values()) == 64 + 64 + 2 * 96 + 2 * 192 + 5 * 384 + 2 * 768
