"""What counts as right."""

import pytest
import torch

from pipeline.evaluate import hits


@pytest.mark.parametrize(
    ("labels", "first", "in_five"),
    [([2], 1, 1), ([0], 0, 1), ([5], 0, 0), ([5, 2], 1, 1), ([5, 0], 0, 1), ([5, -1], 0, 0), ([-1, -1], 0, 0)],
)
def test_the_best_classes_may_be_any_of_a_samples_labels(labels: list[int], first: int, in_five: int) -> None:
    logits = torch.tensor([[0.2, 0.3, 0.9, 0.4, 0.5, 0.1]])
    assert hits(logits, torch.tensor([labels])).tolist() == [[first, in_five]]


def test_with_fewer_than_five_classes_all_are_among_the_best_five() -> None:
    assert hits(torch.randn(3, 2), torch.tensor([[0], [1], [0]]))[:, 1].tolist() == [1, 1, 1]
