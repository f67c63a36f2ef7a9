"""timm's models with our weights: equal logits, and the same weights back."""

from typing import Any

import pytest
import torch

from models.registry import create_model
from models.timm_layout import from_timm, timm_arguments, to_timm, why_not_timm
from models.variants import VARIANTS, find_variant
from tests.support.timm_import import timm
from tests.support.trained import trained_model

SMALL: dict[str, Any] = {
    "name": "coatnet_0", "depths": [1, 2, 2, 1], "widths": [16, 16, 32, 64, 96], "image_size": 64, "num_classes": 5,
    "weight_std": None,
}  # fmt: skip


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"stride_in": "depthwise", "pool": "average"},
        {"convolution_norm": "layer"},
        {"relative_attention": "none"},
        {"head_size": 16},
        {"name": "coatnet_2_cttt"},
        {"image_size": 32},
    ],
)
def test_logits_of_timms_model_with_our_weights_are_equal(options: dict[str, Any]) -> None:
    ours = trained_model(3, **SMALL | options)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            if name.endswith("table"):
                parameter.mul_(40.0)  # so that attention depends on it
            elif name.endswith("bias"):
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    arguments = timm_arguments(ours.variant)
    theirs = timm.create_model("coatnet_0_224", img_size=ours.image_size, num_classes=5, **arguments).eval()
    theirs.load_state_dict(to_timm(ours.state_dict(), ours.variant), strict=True)
    x_BHWC = torch.randn(3, *ours.image_size, 3, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        logits = ours(x_BHWC)
        difference = (theirs(x_BHWC.permute(0, 3, 1, 2)) - logits).abs().max()
    assert logits.std(dim=0).min() > 0.005
    assert difference < 1e-5


def test_our_weights_come_back_from_timms_to_the_bit() -> None:
    ours = trained_model(4, **SMALL)
    state = to_timm(ours.state_dict(), ours.variant)
    shapes = {name: tuple(tensor.shape) for name, tensor in ours.state_dict().items()}
    back = from_timm(state, shapes, ours.variant)
    assert back.keys() == ours.state_dict().keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in ours.state_dict().items())


def test_a_state_of_another_architecture_is_refused_with_what_differs() -> None:
    ours = create_model(**SMALL)
    shapes = {name: tuple(tensor.shape) for name, tensor in ours.state_dict().items()}
    state = to_timm(ours.state_dict(), ours.variant)
    first = next(iter(state))
    for changed, reason in (
        ({name: tensor for name, tensor in state.items() if name != "head.fc.bias"}, "head.fc.bias is missing"),
        (state | {"other": torch.zeros(1), "zother": torch.zeros(1)}, "other and 1 more are not in this model"),
        (state | {first: torch.zeros(7)}, rf"{first} is \(7,\) there and \("),
    ):
        with pytest.raises(ValueError, match=reason):
            from_timm(changed, shapes, ours.variant)


def test_published_variants_without_mixed_stages_have_timms_parameters() -> None:
    assert {name for name, variant in VARIANTS.items() if not why_not_timm(variant)} == {
        *(f"coatnet_{number}" for number in range(6)), *(f"coatnet_{number}_dw" for number in range(6)),
        "coatnet_2_cccc", "coatnet_2_ccct", "coatnet_2_cctt", "coatnet_2_cttt",
    }  # fmt: skip
    for name in ("coatnet_0", "coatnet_5"):
        with torch.device("meta"):
            theirs = timm.create_model("coatnet_0_224", **timm_arguments(VARIANTS[name]))
        ours = create_model(name, device="meta")
        assert sum(p.numel() for p in theirs.parameters()) == sum(p.numel() for p in ours.parameters())


@pytest.mark.parametrize(
    ("name", "options", "reason"),
    [
        ("coatnet_7", {}, "its stage S4 does not stride"),
        ("coatnet_2_vit_rel", {}, "its stem is one convolution of patches"),
        ("coatnet_0", {"relative_attention": "post_normalization"}, "its relative bias is added after the softmax"),
        ("coatnet_0", {"head_hidden_layer": False}, "its head has no hidden layer"),
    ],
)
def test_variants_that_timm_cannot_express_are_named_with_the_reason(
    name: str, options: dict[str, Any], reason: str
) -> None:
    assert (why_not_timm(find_variant(name, **options)) or "").startswith(reason)
