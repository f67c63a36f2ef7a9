"""Our tensors in timm's names and order, and back. What timm itself computes is in tests/pipeline."""

from typing import Any

import pytest
import torch

from models.coatnet import CoAtNet
from models.registry import create_model
from models.timm_names import from_timm, table_shape, timm_name, to_timm
from models.timm_options import timm_arguments
from models.variants import find_variant


def small(**options: Any) -> CoAtNet:
    """Four stages as timm's, with two heads."""
    shape = {"depths": (1, 1, 2, 1), "widths": (8, 8, 16, 32, 32), "head_size": 16}
    model = create_model("coatnet_0", num_classes=3, image_size=64, **{**shape, **options})
    for tensor in model.state_dict().values():
        tensor.data.normal_(generator=torch.Generator().manual_seed(tensor.numel()))
    return model


@pytest.mark.parametrize("options", [{}, {"convolution_norm": "layer"}, {"relative_attention": "none"}])
def test_a_state_in_timms_names_comes_back_equal(options: dict[str, Any]) -> None:
    model = small(**options)
    state = model.state_dict()
    back = from_timm(to_timm(state, model.variant), list(state), model.variant)
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in state.items())


def test_both_forms_of_the_relative_table_are_read() -> None:
    model = small()
    state = to_timm(model.state_dict(), model.variant)
    name = "stages.2.blocks.0.attn.rel_pos.relative_position_bias_table"
    assert state[name].shape == (7 * 7, 2)
    table = model.state_dict()["blocks.2.attention.relative_bias.table"]
    state[name] = table.flip(1, 2)
    read = from_timm(state, ["blocks.2.attention.relative_bias.table"], model.variant)
    assert torch.equal(read["blocks.2.attention.relative_bias.table"], table)


def test_a_table_that_is_not_of_a_square_grid_is_refused() -> None:
    assert table_shape((49, 2), "t") == (2, 7, 7)
    for shape in ((48, 2), (36, 2), (7,)):
        with pytest.raises(ValueError, match="no relative table of a square grid"):
            table_shape(shape, "t")


def test_names_are_timms() -> None:
    variant = find_variant("coatnet_0")
    assert timm_name("blocks.5.attention_norm.weight", variant) == "stages.2.blocks.0.norm1.norm.weight"
    assert timm_name("blocks.6.attention_norm.weight", variant) == "stages.2.blocks.1.norm1.weight"
    assert timm_name("blocks.0.squeeze_excitation.squeeze.bias", variant) == "stages.0.blocks.0.se.fc1.bias"
    with pytest.raises(ValueError, match=r"no parameter in the place of stem\.conv\.weight"):
        timm_name("stem.conv.weight", find_variant("coatnet_2_vit_rel"))


def test_every_reason_why_timm_has_no_such_model_is_given() -> None:
    assert timm_arguments(find_variant("coatnet_5", pool="average"))["transformer_pool_type"] == "avg2"
    with pytest.raises(ValueError, match=r"strides 2, 2, 2, 1, 2.*softmax.*without a hidden layer"):
        timm_arguments(find_variant("coatnet_7", relative_attention="post_normalization", head_hidden_layer=False))
