"""timm's models with our weights: equal logits, and the same weights back."""

from typing import Any

import pytest
import torch

from models.registry import create_model
from models.timm_layout import from_timm, table_shape, timm_arguments, timm_name, to_timm, why_not_timm
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
        {"gelu": "exact", "batch_norm_epsilon": 1e-5, "layer_norm_epsilon": 1e-6},
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


@pytest.mark.parametrize("options", [{}, {"convolution_norm": "layer"}, {"relative_attention": "none"}])
def test_our_weights_come_back_from_timms_to_the_bit(options: dict[str, Any]) -> None:
    ours = trained_model(4, **SMALL | options)
    state = ours.state_dict()
    back = from_timm(to_timm(state, ours.variant), list(state), ours.variant)
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in state.items())


def test_both_forms_of_the_relative_table_are_read_and_others_refused() -> None:
    model = trained_model(4, **SMALL)
    ours = "blocks.3.attention.relative_bias.table"
    theirs = timm_name(ours, model.variant)
    assert theirs == "stages.2.blocks.0.attn.rel_pos.relative_position_bias_table"
    table = model.state_dict()[ours]
    for form in (table.flip(1, 2), table.flatten(1).t()):
        assert torch.equal(from_timm({theirs: form}, [ours], model.variant)[ours], table)
    assert table_shape((49, 2), "t") == (2, 7, 7)
    for shape in ((48, 2), (36, 2), (7,)):
        with pytest.raises(ValueError, match="no relative table of a square grid"):
            table_shape(shape, "t")


def test_names_are_timms_and_what_it_lacks_is_refused() -> None:
    variant = find_variant("coatnet_0")
    assert timm_name("blocks.5.attention_norm.weight", variant) == "stages.2.blocks.0.norm1.norm.weight"
    assert timm_name("blocks.6.attention_norm.weight", variant) == "stages.2.blocks.1.norm1.weight"
    with pytest.raises(ValueError, match=r"no parameter in the place of stem\.conv\.weight"):
        timm_name("stem.conv.weight", find_variant("coatnet_2_vit_rel"))


def test_published_variants_without_mixed_stages_have_timms_parameters() -> None:
    assert {name for name, variant in VARIANTS.items() if not why_not_timm(variant)} == {
        *(f"coatnet_{number}" for number in range(6)), *(f"coatnet_{number}_dw" for number in range(6)),
        "coatnet_2_cccc", "coatnet_2_ccct", "coatnet_2_cctt", "coatnet_2_cttt", "coatnet_micro",
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
