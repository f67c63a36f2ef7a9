"""MixUp and CutMix: the formulas, and their draws."""

import numpy as np
import pytest
import torch

from data.random_streams import RandomStream
from pipeline.training.images import normalized, viewable
from pipeline.training.loss import LossKind, class_targets
from pipeline.training.mixup import MixingSettings, cut_at, mixed, mixing_weight
from tests.support.timm_import import timm

timm_mixup = timm.data.mixup


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


PLACE = {"seed": 3, "step": 5, "number": 1}


@pytest.mark.parametrize("size", [16, 33])
@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
def test_cutmix_equals_timms_with_the_same_random_numbers(
    monkeypatch: pytest.MonkeyPatch, size: int, kind: LossKind
) -> None:
    images = torch.randn(6, size, size, 3)
    labels = torch.tensor([0, 3, 1, 2, 2, 0])
    hot = torch.nn.functional.one_hot(labels, 4).float()
    targets = class_targets(labels[:, None], 4, kind=kind, label_smoothing=0.1)
    reference = timm_mixup.Mixup(0.0, 1.0, label_smoothing=0.1, num_classes=4, multi_label=kind == "sigmoid")
    for share, down, along in [(0.3, 4, 9), (0.99, 15, 0), (0.0, 8, 8), (1.0, 0, 0), (0.5, 0, 15), (0.73, 10, 3)]:
        centres = iter((down, along))
        monkeypatch.setattr(np.random, "rand", lambda: 0.5)
        monkeypatch.setattr(np.random, "beta", lambda *alphas, share=share: share)
        monkeypatch.setattr(np.random, "randint", lambda *limits, centres=centres, **size: next(centres))
        theirs, their_targets = reference(
            images.clone().permute(0, 3, 1, 2), hot if kind == "sigmoid" else labels.clone()
        )
        mixing = cut_at(size, share, down, along)
        assert torch.equal(mixing.images(images), theirs.permute(0, 2, 3, 1))
        torch.testing.assert_close(mixing.targets(targets), their_targets, rtol=0, atol=2e-7)


def test_mixup_equals_timms_to_the_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    images = torch.randn(4, 8, 8, 3)
    mixing = MixingSettings(0.8).mixing(8, **PLACE)
    assert mixing is not None
    assert mixing.weight == mixing_weight(0.8, **PLACE)
    monkeypatch.setattr(np.random, "beta", lambda *alphas: mixing.weight)
    theirs, _ = timm_mixup.Mixup(0.8, num_classes=4)(images.clone(), torch.tensor([0, 1, 2, 3]))
    assert torch.equal(mixing.images(images), theirs)


def test_what_is_not_set_draws_nothing() -> None:
    """A run without CutMix has the weights that it had before there was one."""
    assert MixingSettings(0.0).mixing(8, **PLACE) is None
    weights = [MixingSettings(0.8).mixing(8, seed=0, step=step, number=0) for step in range(20)]
    assert [mixing and mixing.weight for mixing in weights] == [
        RandomStream.MIXUP.generator(0, step, 0).beta(0.8, 0.8) for step in range(20)
    ]


@pytest.mark.parametrize("changed", [{"seed": 1}, {"step": 4}, {"number": 2}])
def test_the_rectangle_depends_on_seed_step_and_micro_batch(changed: dict[str, int]) -> None:
    settings = MixingSettings(0.0, 1.0)
    assert settings.mixing(224, **PLACE) == settings.mixing(224, **PLACE)
    assert settings.mixing(224, **PLACE) != settings.mixing(224, **(PLACE | changed))


@pytest.mark.parametrize(
    ("settings", "none", "cut"),
    [
        (MixingSettings(0.8, 1.0), 0.0, 0.5),
        (MixingSettings(0.8, 1.0, 0.6, 0.25), 0.4, 0.15),
        (MixingSettings(0.0, 1.0, 0.7, 0.1), 0.3, 0.7),
        (MixingSettings(0.8, 0.0, 0.7, 0.9), 0.3, 0.0),
    ],
)
def test_micro_batches_are_mixed_with_their_probabilities(settings: MixingSettings, none: float, cut: float) -> None:
    found = [settings.mixing(32, seed=0, step=step, number=0) for step in range(2000)]
    assert abs(found.count(None) / 2000 - none) < 0.04
    assert abs(sum(mixing is not None and mixing.rectangle is not None for mixing in found) / 2000 - cut) < 0.04


def test_the_share_of_a_rectangle_is_beta_distributed_apart_from_what_edges_clip() -> None:
    found = [MixingSettings(0.0, 1.0).mixing(64, seed=0, step=step, number=0) for step in range(2000)]
    sides = [max(r.stop - r.start for r in mixing.rectangle) for mixing in found if mixing and mixing.rectangle]
    # Of a uniform area, the side of the square is below half of the image's with probability 1 / 4.
    assert np.mean([side < 32 for side in sides]) == pytest.approx(0.25, abs=0.12)
