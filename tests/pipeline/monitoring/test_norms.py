"""Norms from AdamW's moments against a copy of the weights from before the step."""

from collections.abc import Iterator

import pytest
import torch
from torch import nn

from models.registry import create_model
from models.variants import VARIANTS
from pipeline.monitoring.norms import AdamWStep, stage_index, stage_names, weight_and_update_norms
from pipeline.ranks.distributed import Ranks
from pipeline.recipe.sections import OptimizerSettings
from pipeline.zero.fragments import Fragment

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


def test_before_the_first_step_nothing_has_moved() -> None:
    weight = torch.ones(4)
    zeros = torch.zeros(4)
    fragment = Fragment("stem.conv1.weight", 0, 4, {"master": weight, "exp_avg": zeros, "exp_avg_sq": zeros}, True)
    before_any_step = AdamWStep(SETTINGS, rate=1.0, number=0, undecayed=(), rate_scale={})
    found = weight_and_update_norms([fragment], VARIANTS["coatnet_debug"], before_any_step, ALONE)
    assert (found["weight_norm/stem"], found["update_ratio/stem"], found["update_ratio/head"]) == (2.0, 0.0, 0.0)
