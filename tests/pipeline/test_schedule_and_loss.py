"""Learning rate by step, and the two losses."""

import math

import pytest
import torch
from torch.nn import functional as F

from pipeline.loss import classification_loss
from pipeline.schedule import learning_rate


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


def test_no_warm_up_begins_at_the_peak() -> None:
    assert learning_rate(0, steps=5, warmup_steps=0, peak=2.0, minimum=0.0, schedule="linear") == 2.0


def test_softmax_is_the_smoothed_cross_entropy() -> None:
    logits, labels = torch.randn(4, 5), torch.tensor([0, 4, 2, 2])
    ours = classification_loss(logits, labels, kind="softmax", label_smoothing=0.1)
    targets = torch.full((4, 5), 0.02) + 0.9 * F.one_hot(labels, 5)
    torch.testing.assert_close(ours, -(targets * logits.log_softmax(1)).sum(1))


def test_sigmoid_sums_binary_cross_entropies_over_the_classes() -> None:
    logits, labels = torch.randn(3, 4), torch.tensor([1, 0, 3])
    ours = classification_loss(logits, labels, kind="sigmoid", label_smoothing=0.2)
    targets = torch.where(F.one_hot(labels, 4) == 1, 0.9, 0.1)
    p = logits.sigmoid()
    torch.testing.assert_close(ours, -(targets * p.log() + (1 - targets) * (1 - p).log()).sum(1))


def test_loss_of_bfloat16_logits_is_float32() -> None:
    loss = classification_loss(torch.randn(2, 3).bfloat16(), torch.tensor([0, 1]), kind="softmax", label_smoothing=0.0)
    assert loss.dtype == torch.float32
