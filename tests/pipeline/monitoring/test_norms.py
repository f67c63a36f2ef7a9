"""Norms from AdamW's moments against a copy of the weights from before the step."""

from collections.abc import Iterator

import pytest
import torch
from torch import nn

from models.registry import create_model
from models.variants import VARIANTS
from pipeline.monitoring.norms import (
    AdamWStep,
    block_index,
    block_names,
    norms_by_part,
    stage_index,
    stage_names,
    weight_and_update_norms,
)
from pipeline.ranks.distributed import Ranks
from pipeline.recipe.sections import OptimizerSettings
from pipeline.zero.fragments import Fragment
from tests.support.operators import Recorded

ALONE = Ranks(0, 1, torch.device("cpu"))
SETTINGS = OptimizerSettings(peak_learning_rate=3e-3, weight_decay=0.3, betas=(0.8, 0.9), eps=1e-3)


@pytest.mark.parametrize(
    ("variant", "parameter", "stage"),
    [
        ("coatnet_0", "stem.conv1.weight", "stem"),
        ("coatnet_0", "blocks.1.norm.weight", "s1"),
        ("coatnet_0", "blocks.2.norm.weight", "s2"),
        ("coatnet_0", "blocks.11.attention.qkv.bias", "s4"),
        ("coatnet_0", "head.classifier.bias", "head"),
        ("coatnet_6", "blocks.14.attention.qkv.bias", "s4"),
        ("coatnet_6", "blocks.56.attention.qkv.bias", "s5"),
        ("coatnet_2_vit_rel", "blocks.10.attention.qkv.bias", "s1"),
    ],
)
def test_parameters_belong_to_the_stages_of_the_paper(variant: str, parameter: str, stage: str) -> None:
    assert stage_names(VARIANTS[variant])[stage_index(VARIANTS[variant])(parameter)] == stage


@pytest.mark.parametrize("name", VARIANTS)
def test_every_parameter_of_every_variant_has_a_stage_and_every_stage_has_parameters(name: str) -> None:
    variant = VARIANTS[name]
    with torch.device("meta"):
        model = create_model(name, num_classes=3, image_size=(variant.stride * 2,) * 2)
    index = stage_index(variant)
    assert {index(parameter) for parameter, _ in model.named_parameters()} == set(range(len(stage_names(variant))))


def fragments_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[Fragment]:
    """Each parameter in two fragments and once more as another rank's."""
    for name, parameter in model.named_parameters():
        tensors = {"master": parameter.data, **optimizer.state[parameter]}
        views = {kind: tensor.view(-1) for kind, tensor in tensors.items() if kind != "step"}
        third = parameter.numel() // 3
        for start, stop in ((0, third), (third, parameter.numel())):
            part = {kind: view[start:stop] for kind, view in views.items()}
            yield Fragment(name, start, stop, part, saved_here=True)
            yield Fragment(name, start, stop, part, saved_here=False)


@pytest.mark.parametrize("steps", [1, 3])
def test_the_update_from_the_moments_is_the_difference_to_a_copy_from_before(steps: int) -> None:
    model = create_model("coatnet_debug", num_classes=3, image_size=(32, 32))
    model.initialize(0)
    undecayed = model.no_weight_decay()
    scales = {name: 0.5 for name, _ in model.named_parameters() if name.startswith("blocks.1.")} | {
        "stem.conv1.bias": 0
    }
    groups = [
        {
            "params": [parameter],
            "lr": SETTINGS.peak_learning_rate * scales.get(name, 1.0),
            "weight_decay": 0.0 if name in undecayed else SETTINGS.weight_decay,
        }
        for name, parameter in model.named_parameters()
    ]
    optimizer = torch.optim.AdamW(groups, betas=SETTINGS.betas, eps=SETTINGS.eps)
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        before = {name: parameter.detach().double().clone() for name, parameter in model.named_parameters()}
        for parameter in model.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()
    variant = VARIANTS["coatnet_debug"]
    last_step = AdamWStep(SETTINGS, SETTINGS.peak_learning_rate, steps, undecayed, scales)
    found = weight_and_update_norms(list(fragments_of(model, optimizer)), variant, last_step, ALONE)
    names, index = stage_names(variant), stage_index(variant)
    squares = torch.zeros(2, len(names), dtype=torch.float64)
    for name, parameter in model.named_parameters():
        after = parameter.detach().double()
        squares[0, index(name)] += after.square().sum()
        squares[1, index(name)] += (before[name] - after).square().sum()
    for stage, (norm, update) in zip(
        [*names, "all"], torch.cat([squares, squares.sum(1, keepdim=True)], dim=1).sqrt().T.tolist(), strict=True
    ):
        assert found[f"weight_norm/{stage}"] == pytest.approx(norm, rel=1e-7)
        assert found[f"update_ratio/{stage}"] == pytest.approx(update / norm, rel=1e-5)
    assert len(found) == 2 * (len(names) + 1)


def test_norms_of_any_division_of_the_model_are_those_of_its_parts() -> None:
    step = AdamWStep(SETTINGS, 1e-3, 5, undecayed={"blocks.0.1"}, rate_scale={})
    fragments = of_numbers(4, 30) + of_numbers(2, 50, "blocks.1") + of_numbers(1, 7, "head")
    parts = ["head", "blocks.1", "nothing", "blocks.0"]
    found = norms_by_part(fragments, len(parts), lambda name: parts.index(name.rpartition(".")[0]), step, ALONE)
    for part, weight, update in zip(parts, *found, strict=True):
        own = [fragment for fragment in fragments if fragment.parameter.startswith(f"{part}.")]
        alone = weight_and_update_norms(own, VARIANTS["coatnet_debug"], step, ALONE)
        assert weight == pytest.approx(alone["weight_norm/all"], rel=1e-12)
        assert update == pytest.approx(alone["weight_norm/all"] * alone["update_ratio/all"], rel=1e-12)
        assert (weight > 0) == (part != "nothing")


def test_blocks_are_in_order_of_computation_and_every_parameter_is_in_one() -> None:
    variant = VARIANTS["coatnet_0"]
    names, index = block_names(variant), block_index(variant)
    assert names == ("stem", *(f"blocks.{number}" for number in range(12)), "head")
    assert names[index("stem.conv1.bias")] == "stem"
    assert names[index("blocks.11.attention.qkv.bias")] == "blocks.11"
    assert names[index("head.classifier.bias")] == "head"


def test_before_the_first_step_nothing_has_moved() -> None:
    weight = torch.ones(4)
    zeros = torch.zeros(4)
    fragment = Fragment("stem.conv1.weight", 0, 4, {"master": weight, "exp_avg": zeros, "exp_avg_sq": zeros}, True)
    before_any_step = AdamWStep(SETTINGS, rate=1.0, number=0, undecayed=(), rate_scale={})
    found = weight_and_update_norms([fragment], VARIANTS["coatnet_debug"], before_any_step, ALONE)
    assert (found["weight_norm/stem"], found["update_ratio/stem"], found["update_ratio/head"]) == (2.0, 0.0, 0.0)


VIEWS = ("split", "detach", "slice", "unbind", "select", "unsqueeze")


def of_numbers(count: int, size: int, stage: str = "blocks.0") -> list[Fragment]:
    """`count` parameters of `size` numbers each."""
    generator = torch.Generator().manual_seed(0)
    result = []
    for number in range(count):
        tensors = {kind: torch.rand(size, generator=generator) for kind in ("master", "exp_avg", "exp_avg_sq")}
        result.append(Fragment(f"{stage}.{number}", 0, size, tensors, True))
    return result


@pytest.mark.parametrize("number", [0, 5])
def test_the_number_of_operators_does_not_depend_on_that_of_the_parameters(number: int) -> None:
    step = AdamWStep(SETTINGS, 1e-3, number, undecayed={"blocks.0.0", "blocks.0.1"}, rate_scale={})
    counts = []
    for parameters in (5, 500):
        fragments = of_numbers(parameters, 3)
        with Recorded() as recorded:
            weight_and_update_norms(fragments, VARIANTS["coatnet_debug"], step, ALONE)
        counts.append(sum(recorded.counts.values()) - sum(recorded.counts[view] for view in VIEWS))
    assert counts[0] == counts[1] < 50


def test_more_numbers_than_are_taken_at_a_time_give_the_same_norms(monkeypatch: pytest.MonkeyPatch) -> None:
    """But for the order in which float64 squares are added."""
    step = AdamWStep(SETTINGS, 1e-3, 5, undecayed={"blocks.0.3"}, rate_scale={"blocks.0.4": 0.5})
    fragments = of_numbers(20, 50) + of_numbers(3, 0) + of_numbers(5, 70, "head")
    variant = VARIANTS["coatnet_debug"]
    at_once = weight_and_update_norms(fragments, variant, step, ALONE)
    monkeypatch.setattr("pipeline.monitoring.norms._TOGETHER", 120)
    assert weight_and_update_norms(fragments, variant, step, ALONE) == pytest.approx(at_once, rel=1e-14)
    monkeypatch.setattr("pipeline.monitoring.norms._CHUNK", 7)
    assert weight_and_update_norms(fragments, variant, step, ALONE) == pytest.approx(at_once, rel=1e-12)
