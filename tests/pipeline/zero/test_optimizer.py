"""AdamW by itself: rates of layers inside one tensor, refused steps, and which layer a parameter belongs to."""

import math
from types import SimpleNamespace

import pytest
import torch

from models.registry import create_model
from pipeline.recipe.sections import OptimizerSettings
from pipeline.zero.fragments import ParameterSlice
from pipeline.zero.optimizer import (
    AdamW,
    build_adamw,
    layer_numbers,
    ranges_without_gradient,
    rate_scales,
    scaled_ranges,
)

SETTINGS = OptimizerSettings(peak_learning_rate=1e-2, weight_decay=0.1, gradient_clip=0)


def three_steps(optimizer: torch.optim.Optimizer, parameters: list[torch.Tensor]) -> None:
    for number in range(3):
        gradient = torch.randn(100, generator=torch.Generator().manual_seed(number))
        for parameter, part in zip(parameters, torch.split(gradient, [p.numel() for p in parameters]), strict=True):
            parameter.grad = part.view_as(parameter).clone()
        optimizer.step()


def allowed(parameters: list[torch.Tensor]) -> AdamW:
    optimizer = AdamW([{"params": parameters, "weight_decay": 0.1}], SETTINGS)
    optimizer.gradient_norm = lambda: torch.ones(())
    return optimizer


def test_ranges_of_one_tensor_step_like_groups_with_their_own_rates() -> None:
    start = torch.randn(100, generator=torch.Generator().manual_seed(9))
    flat = start.clone().requires_grad_()
    ours = allowed([flat])
    for kind in ("exp_avg", "exp_avg_sq"):
        ours.state[flat][kind] = torch.zeros(100)
    ours.state[flat]["step"] = torch.zeros(())
    ours.scales = {flat: [(0, 32, 0.25), (32, 48, 0.5), (48, 80, 0.25), (80, 100, 1.0)]}
    parts = [part.clone().requires_grad_() for part in torch.split(start, [32, 16, 32, 20])]
    groups = [{"params": [p], "lr": 1e-2 * scale} for p, scale in zip(parts, (0.25, 0.5, 0.25, 1.0), strict=True)]
    three_steps(ours, [flat])
    plain = torch.optim.AdamW(groups, weight_decay=0.1, fused=True)
    three_steps(plain, parts)
    assert torch.equal(flat, torch.cat(parts))
    assert ours.state[flat]["step"] == 3
    for kind in ("exp_avg", "exp_avg_sq"):
        assert torch.equal(ours.state[flat][kind], torch.cat([plain.state[part][kind] for part in parts]))


def test_without_ranges_a_step_is_that_of_torch() -> None:
    start = torch.randn(10, 10, generator=torch.Generator().manual_seed(9))
    one, other = start.clone().requires_grad_(), start.clone().requires_grad_()
    three_steps(allowed([one]), [one])
    three_steps(torch.optim.AdamW([other], lr=1e-2, weight_decay=0.1, fused=True), [other])
    assert torch.equal(one, other)


def test_without_a_norm_no_step_is_taken() -> None:
    parameter = torch.ones(100, requires_grad=True)
    optimizer = AdamW([parameter], SETTINGS)
    three_steps(optimizer, [parameter])
    assert torch.equal(parameter, torch.ones(100))
    assert not optimizer.state[parameter]


@pytest.mark.parametrize("norm", [math.nan, math.inf, -1.0])
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("clip", [0.0, 1.0])
def test_a_step_whose_norm_is_not_finite_changes_nothing(norm: float, scaled: bool, clip: float) -> None:
    """Not the weights, the moments or the number of steps, before the first step and after one."""
    parameter = torch.ones(100, requires_grad=True)
    optimizer = AdamW([parameter], SETTINGS.model_copy(update={"gradient_clip": clip}))
    optimizer.scales = {parameter: [(0, 48, 0.25), (48, 100, 1.0)]} if scaled else {}
    optimizer.moments(parameter)
    for good in (True, False):
        before = [tensor.clone() for tensor in (parameter.data, *optimizer.state[parameter].values())]
        steps = optimizer.steps
        optimizer.gradient_norm = lambda: torch.tensor(norm)
        parameter.grad = torch.full((100,), 2.0).index_fill_(0, torch.tensor([7, 60]), norm)
        optimizer.step()
        after = [parameter.data, *optimizer.state[parameter].values()]
        assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))
        assert optimizer.steps == steps
        if good:
            optimizer.gradient_norm = lambda: torch.ones(())
            three_steps(optimizer, [parameter])
            assert optimizer.steps == 3


def test_gradients_are_clipped_as_by_the_zero_optimizers_of_deepspeed() -> None:
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    settings = SETTINGS.model_copy(update={"gradient_clip": 0.5})
    start, gradient = torch.randn(2, 1000, generator=torch.Generator().manual_seed(9))
    for factor in (1e-3, 1.0, 1e3):
        one, other = start.clone().requires_grad_(), start.clone().requires_grad_()
        one.grad = gradient * factor
        norm = one.grad.norm()
        zero = SimpleNamespace(clip_grad=0.5, loss_scale=1.0)
        clipped = one.grad.clone()
        DeepSpeedZeroOptimizer.unscale_and_clip_grads(zero, [clipped], norm)
        ours = AdamW([{"params": [one], "weight_decay": 0.1}], settings)
        ours.gradient_norm = lambda norm=norm: norm
        ours.step()
        other.grad = clipped
        torch.optim.AdamW([other], lr=1e-2, weight_decay=0.1, fused=True).step()
        assert torch.equal(one, other)
        assert torch.equal(clipped, gradient * factor) == (norm < 0.5)


@pytest.mark.parametrize("scaled", [False, True])
def test_ranges_without_gradient_keep_their_values_and_the_others_step_as_before(scaled: bool) -> None:
    start = torch.randn(100, generator=torch.Generator().manual_seed(9))
    one, other = start.clone().requires_grad_(), start.clone().requires_grad_()
    optimizers = [AdamW([{"params": [flat], "weight_decay": 0.0}], SETTINGS) for flat in (one, other)]
    for optimizer, flat in zip(optimizers, (one, other), strict=True):
        optimizer.gradient_norm = lambda: torch.ones(())
        optimizer.moments(flat)
        optimizer.scales = {flat: [(0, 48, 0.25), (48, 100, 1.0)]} if scaled else {}
    optimizers[0].without_gradient = ranges_without_gradient(
        [ParameterSlice("a", 20, 60, one, 0, True), ParameterSlice("b", 0, 60, one, 40, True)],
        {"a": (30, 90), "b": (5, 9)},
    )
    assert optimizers[0].without_gradient == {one: [(10, 40), (45, 49)]}
    for optimizer, flat in zip(optimizers, (one, other), strict=True):
        three_steps(optimizer, [flat])
    held = torch.zeros(100, dtype=torch.bool)
    held[10:40] = held[45:49] = True
    assert torch.equal(one[held], start[held])
    assert torch.equal(one[~held], other[~held])
    assert not (one == other)[held].any()


def test_parameters_that_the_model_names_have_no_weight_decay() -> None:
    model = create_model("coatnet_debug", num_classes=3, image_size=32)
    decayed, undecayed = build_adamw(model, SETTINGS, model.no_weight_decay()).param_groups
    assert (decayed["weight_decay"], undecayed["weight_decay"]) == (0.1, 0.0)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert {names[id(parameter)] for parameter in undecayed["params"]} == model.no_weight_decay()
    assert len(decayed["params"]) + len(undecayed["params"]) == len(names)


def test_layers_are_numbered_from_the_stem_over_the_blocks_to_the_head() -> None:
    model = create_model("coatnet_debug", num_classes=3, image_size=32, depths=(1, 1, 9, 1))
    layers = layer_numbers(model)
    assert layers.keys() == dict(model.named_parameters()).keys()
    assert layers["stem.conv1.weight"] == 0
    # Blocks 0 to 11, so that 10 must not come before 2.
    assert [layers[f"blocks.{n}.{'norm' if n < 2 else 'attention_norm'}.weight"] for n in range(12)] == list(
        range(1, 13)
    )
    assert layers["head.norm.weight"] == layers["head.classifier.bias"] == 13
    scales = rate_scales(layers, 0.5)
    assert scales["head.classifier.weight"] == 1.0
    assert scales["blocks.11.attention_norm.weight"] == 0.5
    assert scales["stem.conv1.weight"] == pytest.approx(2.0**-13)


def test_adjacent_slices_with_the_same_scale_become_one_range() -> None:
    holder, other = torch.zeros(30), torch.zeros(4)
    parameter_slices = [
        ParameterSlice("a", 5, 10, holder, 0, True), ParameterSlice("b", 0, 10, holder, 5, True), ParameterSlice("d", 0, 4, other, 0, True),
        ParameterSlice("c", 0, 10, holder, 15, True),
    ]  # fmt: skip
    ranges = scaled_ranges(parameter_slices, {"a": 0.5, "b": 0.5, "c": 1.0, "d": 1.0})
    assert ranges == {holder: [(0, 15, 0.5), (15, 25, 1.0)], other: [(0, 4, 1.0)]}
