"""Learning rate by step, targets, and the two losses."""

import math

import pytest
import torch
from torch.nn import functional as F

from pipeline.training.loss import class_targets, classification_loss
from pipeline.training.schedule import learning_rate


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        (
            "cosine",
            [0.5, 1.0, 1.0, 0.1 + 0.45 * (1 + math.cos(math.pi / 4)), 0.55, 0.1 + 0.45 * (1 - math.cos(math.pi / 4))],
        ),
        ("linear", [0.5, 1.0, 1.0, 0.775, 0.55, 0.325]),
        ("constant", [0.5, 1.0, 1.0, 1.0, 1.0, 1.0]),
    ],
)
def test_rate_rises_to_the_peak_and_follows_the_schedule(schedule: str, expected: list[float]) -> None:
    rates = [
        learning_rate(step, steps=6, warmup_steps=2, peak=1.0, minimum=0.1, schedule=schedule)  # type: ignore[arg-type]
        for step in range(6)
    ]
    assert rates == pytest.approx(expected)


def test_without_warm_up_the_rate_starts_at_the_peak() -> None:
    assert learning_rate(0, steps=5, warmup_steps=0, peak=2.0, minimum=0.0, schedule="linear") == 2.0


def test_softmax_is_the_smoothed_cross_entropy() -> None:
    logits, labels = torch.randn(4, 5), torch.tensor([0, 4, 2, 2])
    targets = class_targets(labels[:, None], 5, kind="softmax", label_smoothing=0.1)
    assert torch.equal(targets, F.one_hot(labels, 5) * (1 - 0.1) + 0.1 / 5)
    ours = classification_loss(logits, targets, "softmax")
    torch.testing.assert_close(ours, F.cross_entropy(logits, labels, label_smoothing=0.1, reduction="none"))


def test_sigmoid_sums_binary_cross_entropies_over_the_classes() -> None:
    logits, labels = torch.randn(3, 4), torch.tensor([1, 0, 3])
    smoothed = class_targets(labels[:, None], 4, kind="sigmoid", label_smoothing=0.2)
    ours = classification_loss(logits, smoothed, "sigmoid")
    targets = torch.where(F.one_hot(labels, 4) == 1, 0.9, 0.1)
    p = logits.sigmoid()
    torch.testing.assert_close(ours, -(targets * p.log() + (1 - targets) * (1 - p).log()).sum(1))


def test_a_sample_may_have_several_labels_padded_with_minus_one() -> None:
    labels = torch.tensor([[1, 3, 0], [2, -1, -1], [-1, -1, -1]])
    targets = class_targets(labels, 4, kind="sigmoid", label_smoothing=0.0)
    assert targets.tolist() == [[1, 1, 0, 1], [0, 0, 1, 0], [0, 0, 0, 0]]


def test_loss_of_bfloat16_logits_is_float32() -> None:
    targets = class_targets(torch.tensor([[0], [1]]), 3, kind="softmax", label_smoothing=0.0)
    assert classification_loss(torch.randn(2, 3).bfloat16(), targets, "softmax").dtype == torch.float32
