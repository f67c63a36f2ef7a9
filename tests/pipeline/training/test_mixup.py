"""MixUp: the formula, and its draws."""

import numpy as np
import pytest
import torch

from pipeline.training.images import normalized, viewable
from pipeline.training.loss import class_targets
from pipeline.training.mixup import mixed, mixing_weight


def test_each_sample_is_mixed_with_its_partner_from_the_other_end() -> None:
    values = torch.randn(5, 4, 4, 3)
    out = mixed(values, 0.3)
    for i in range(5):
        torch.testing.assert_close(out[i], 0.3 * values[i] + 0.7 * values[4 - i])
    assert torch.equal(mixed(values, 1.0), values)


def test_mixed_targets_stay_distributions() -> None:
    targets = mixed(class_targets(torch.tensor([[0], [2], [1]]), 4, kind="softmax", label_smoothing=0.1), 0.25)
    torch.testing.assert_close(targets.sum(dim=1), torch.ones(3))
    torch.testing.assert_close(targets[0], torch.tensor([0.225, 0.675, 0.0, 0.0]) + 0.025)


@pytest.mark.parametrize("changed", [{"seed": 1}, {"step": 4}, {"number": 2}])
def test_the_weight_depends_on_seed_step_and_micro_batch(changed: dict[str, int]) -> None:
    place = {"seed": 0, "step": 3, "number": 1}
    assert mixing_weight(0.8, **place) == mixing_weight(0.8, **place)
    assert mixing_weight(0.8, **place) != mixing_weight(0.8, **(place | changed))


@pytest.mark.parametrize("alpha", [0.2, 0.8, 5.0])
def test_weights_are_beta_distributed(alpha: float) -> None:
    weights = np.array([mixing_weight(alpha, seed=0, step=step, number=0) for step in range(4000)])
    assert abs(weights.mean() - 0.5) < 0.03
    assert weights.var() == pytest.approx(1 / (4 * (2 * alpha + 1)), rel=0.1)


def test_viewable_inverts_normalized() -> None:
    images = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3), dtype=np.uint8)
    assert np.array_equal(viewable(normalized(images, torch.device("cpu"), torch.float32)), images)
