"""CoAtNet as a whole: shapes, the interface that vision code expects, numbers at other sizes and precisions."""

import re
from itertools import pairwise
from typing import Any, cast

import pytest
import torch

from models.attention import TransformerBlock
from models.coatnet import CoAtNet
from models.mbconv import MBConv
from models.registry import create_model
from models.relative_bias import RelativeBias


def debug(image_size: int | tuple[int, int] = 32, **settings: object) -> CoAtNet:
    return create_model("coatnet_debug", num_classes=7, image_size=image_size, **settings)  # type: ignore[arg-type]


def intermediates(model: CoAtNet, x: torch.Tensor, **settings: Any) -> list[torch.Tensor]:
    return cast(list[torch.Tensor], model.forward_intermediates(x, **settings, intermediates_only=True))


@pytest.mark.parametrize("size", [(32, 32), (48, 48), (32, 64)])
def test_every_parameter_takes_part_in_the_gradient(size: tuple[int, int]) -> None:
    model = debug(size)
    logits = model(torch.randn(3, *size, 3))
    assert logits.shape == (3, 7)
    logits.square().sum().backward()
    without = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert without == []


@pytest.mark.parametrize(
    "name", ["coatnet_2_cccc", "coatnet_2_ccct", "coatnet_2_cttt", "coatnet_2_vit_rel", "coatnet_6"]
)
def test_every_layout_runs_forward_and_backward(name: str) -> None:
    widths = {4: (8, 8, 16, 32, 32), 1: (32, 32), 5: (8, 8, 16, 32, 32, 64)}
    stages = len(create_model(name, device="meta").variant.stages)
    model = create_model(
        name, num_classes=3, image_size=64, head_size=16, widths=widths[stages], depths=(2,) * stages, weight_std=None
    )
    model(torch.randn(2, 64, 64, 3)).square().sum().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []


def test_features_and_head_make_the_forward() -> None:
    model = debug().eval()
    x = torch.randn(2, 32, 32, 3)
    features = model.forward_features(x)
    assert features.shape == (2, 2, 2, 32)
    assert torch.equal(model.forward_head(features), model(x))
    pre_logits = model.forward_head(features, pre_logits=True)
    assert pre_logits.shape == (2, model.num_features) == (2, 32)
    assert torch.equal(model.get_classifier()(pre_logits), model(x))


def test_intermediates_are_what_feature_info_says() -> None:
    model = debug().eval()
    x = torch.randn(2, 64, 32, 3)
    final, features = model.forward_intermediates(x)
    assert [info["module"] for info in model.feature_info] == ["stem", "blocks.0", "blocks.1", "blocks.2", "blocks.3"]
    for feature, info in zip(features, model.feature_info, strict=True):
        assert feature.shape == (2, 64 // info["reduction"], 32 // info["reduction"], info["num_chs"])
    assert torch.equal(final, model.forward_features(x))
    assert torch.equal(features[-1], final)
    seen = {}
    for info in model.feature_info:
        model.get_submodule(info["module"]).register_forward_hook(lambda _, i, y, m=info["module"]: seen.update({m: y}))
    model(x)
    assert all(torch.equal(seen[i["module"]], f) for i, f in zip(model.feature_info, features, strict=True))


def test_intermediates_can_be_chosen_reordered_and_cut_short() -> None:
    model = debug().eval()
    x = torch.randn(2, 32, 32, 3)
    everything = intermediates(model, x)
    last_two = intermediates(model, x, indices=2)
    assert [f.shape for f in last_two] == [f.shape for f in everything[-2:]]
    chosen = intermediates(model, x, indices=[-1, 0], output_fmt="NCHW")
    assert torch.equal(chosen[0].permute(0, 2, 3, 1), everything[-1])
    assert torch.equal(chosen[1].permute(0, 2, 3, 1), everything[0])
    model.blocks[2].register_forward_pre_hook(lambda *_: pytest.fail("computed a block that nobody asked for"))
    final, (feature,) = model.forward_intermediates(x, [2], stop_early=True)
    assert torch.equal(final, feature)
    for bad in ([5], [-6], [], 0, 6, -1):
        with pytest.raises(ValueError, match="this model has features 0 to 4"):
            model.forward_intermediates(x, bad)
    with pytest.raises(ValueError, match="must be NHWC or NCHW"):
        model.forward_intermediates(x, output_fmt="NLC")


@pytest.mark.parametrize("hidden", [True, False])
def test_the_classifier_can_be_replaced_and_removed(hidden: bool) -> None:
    model = debug(head_hidden_layer=hidden).eval()
    x = torch.randn(2, 32, 32, 3)
    before = model.forward_head(model.forward_features(x), pre_logits=True)
    model.reset_classifier(5)
    assert model(x).shape == (2, 5)
    assert model.num_classes == 5
    assert model.get_parameter("head.classifier.weight").abs().sum() > 0
    model.reset_classifier(0)
    assert torch.equal(model(x), before)
    assert create_model("coatnet_debug", num_classes=0, image_size=32)(x).shape == (2, 32)


def test_a_new_classifier_leaves_the_rest_as_it_was_trained() -> None:
    model = debug()
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data.add_(torch.rand_like(tensor))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.reset_classifier(5)
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {"head.classifier.weight", "head.classifier.bias"}


@pytest.mark.parametrize("coarse", [False, True])
def test_group_matcher_puts_every_parameter_into_one_layer_in_order(coarse: bool) -> None:
    """As timm reads it: a group is a regular expression, or several with an ordinal that stands in for the match."""
    model = debug(depths=(2, 3, 2, 1))
    expressions = []
    for number, (_, value) in enumerate(model.group_matcher(coarse).items()):
        rules = [(value, None)] if isinstance(value, str) else value
        expressions += [(re.compile(rule), number, ordinal) for rule, ordinal in rules]

    def layer(name: str) -> tuple[float, ...]:
        matches = [(match, number, ordinal) for rule, number, ordinal in expressions if (match := rule.match(name))]
        ((match, number, ordinal),) = matches
        return (number, *map(float, ordinal or match.groups()))

    layers = {name: layer(name) for name, _ in model.named_parameters()}
    assert len(set(layers.values())) == 1 + (4 if coarse else 8) + 1
    order = [layers[name] for name in layers]
    assert all(first <= second for first, second in pairwise(order))


def test_weight_decay_spares_biases_norms_and_relative_tables() -> None:
    model = debug()
    spared = model.no_weight_decay()
    assert {"stem.norm.weight", "stem.conv1.bias", "head.norm.weight"} <= spared
    assert {"blocks.2.attention.relative_bias.table", "blocks.2.attention_norm.weight"} <= spared
    decayed = {name for name, _ in model.named_parameters()} - spared
    assert all(name.endswith(".weight") and "norm" not in name for name in decayed)
    assert "blocks.0.expand.weight" in decayed


def test_activations_are_channels_last_from_stem_to_head() -> None:
    """In memory, too: each permutation to (B, C, H, W) and back is free, and no block starts with a copy."""
    model = debug(64)
    shapes = []
    for module in (model.stem, *model.blocks):
        module.register_forward_hook(lambda _, inputs, output: shapes.append((output.shape, output.is_contiguous())))
    model(torch.randn(2, 64, 64, 3))
    assert len(shapes) == 5
    assert all(contiguous and shape[1] == shape[2] for shape, contiguous in shapes)


def test_a_strided_expansion_reads_a_quarter_of_the_pixels() -> None:
    model = debug(64)
    seen = []
    model.get_submodule("blocks.0.expand").register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape))
    model(torch.randn(2, 64, 64, 3))
    assert seen == [(2, 16, 16, 8)]


@pytest.mark.parametrize("size", [(32, 32), (64, 96), (96, 48)])
def test_images_of_another_size_are_taken_with_resized_tables(size: tuple[int, int]) -> None:
    trained, other = debug(32), debug(size)
    x = torch.randn(2, *size, 3)
    state = trained.state_dict()
    for name in [name for name in state if name.endswith("table")]:
        bias = other.get_submodule(name.rpartition(".")[0])
        assert isinstance(bias, RelativeBias)
        shape = (2 * bias.grid[0] - 1, 2 * bias.grid[1] - 1)
        state[name] = torch.nn.functional.interpolate(state[name][None], size=shape, mode="bilinear")[0]
    other.load_state_dict(state)
    for training in (True, False):
        torch.testing.assert_close(trained.train(training)(x), other.train(training)(x))


def test_stochastic_depth_rises_linearly_over_the_blocks() -> None:
    model = debug(drop_path_rate=0.3)
    kinds = [MBConv, MBConv, TransformerBlock, TransformerBlock]
    assert [type(block) for block in model.blocks] == kinds
    assert [list(rates) for rates in model.drop_rates] == [
        [],
        [pytest.approx(0.1)],
        [pytest.approx(0.2)] * 2,
        [pytest.approx(0.3)] * 2,
    ]


def test_stochastic_depth_follows_from_the_seed_and_is_off_in_evaluation() -> None:
    model = debug(drop_path_rate=0.5)
    x = torch.randn(16, 32, 32, 3)

    def outputs() -> list[torch.Tensor]:
        results = []
        for seed in (1, 1, 2):
            torch.manual_seed(seed)
            results.append(model(x))
        return results

    first, again, other = outputs()
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    model.eval()
    assert torch.equal(*outputs()[1:])


@pytest.mark.parametrize("training", [True, False])
def test_bfloat16_stays_within_two_percent_of_float32(training: bool) -> None:
    """The norm of the logits' difference over that of the logits, for weights of the published spread."""
    model = create_model("coatnet_0", num_classes=100, image_size=64, weight_std=None).train(training)
    x = torch.randn(4, 64, 64, 3)
    with torch.no_grad():
        exact = model(x)
        for parameter in model.parameters():
            parameter.data = parameter.data.bfloat16()
        rounded = model(x.bfloat16())
    assert rounded.dtype == torch.bfloat16
    assert all(buffer.dtype == torch.float32 for buffer in model.buffers())
    assert (rounded.float() - exact).norm() < 0.02 * exact.norm()


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="did you mean coatnet_nano"):
        create_model("coatnet_nan", num_classes=3)
    with pytest.raises(ValueError, match="image size 40 x 32: each side must be a multiple of 16"):
        create_model("coatnet_debug", num_classes=3, image_size=(40, 32))
    for rate in (1.0, -0.1):
        with pytest.raises(ValueError, match=f"drop_path_rate {rate}: must be at least 0 and less than 1"):
            create_model("coatnet_debug", num_classes=3, image_size=32, drop_path_rate=rate)


def test_bad_images_are_named() -> None:
    model = debug()
    with pytest.raises(ValueError, match=r"shape \(2, 3, 32, 32\): must be \(batch, height, width, 3\), channels last"):
        model(torch.randn(2, 3, 32, 32))
    with pytest.raises(ValueError, match="image size 32 x 40: each side must be a multiple of 16"):
        model(torch.randn(2, 32, 40, 3))
