"""Which predictions count as correct, and how accuracies are shown."""

import numpy as np
import pytest
import torch

from pipeline.evaluate import _FRACTIONS, Accuracy, _exact, best_classes, hits
from pipeline.runs.stage_result import ClassAccuracy


@pytest.mark.parametrize(
    ("labels", "first", "in_five"),
    [([2], 1, 1), ([0], 0, 1), ([5], 0, 0), ([5, 2], 1, 1), ([5, 0], 0, 1), ([5, -1], 0, 0), ([-1, -1], 0, 0)],
)
def test_the_best_classes_may_be_any_of_a_samples_labels(labels: list[int], first: int, in_five: int) -> None:
    logits = torch.tensor([[0.2, 0.3, 0.9, 0.4, 0.5, 0.1]])
    best, among_five = hits(best_classes(logits), torch.tensor([labels]))
    assert best.any(dim=1).tolist() == [bool(first)]
    assert among_five.any(dim=1).tolist() == [bool(in_five)]


def test_with_fewer_than_five_classes_all_are_among_the_best_five() -> None:
    assert hits(best_classes(torch.randn(3, 2)), torch.tensor([[0], [1], [0]]))[1].all()


def test_the_accuracy_has_the_papers_term_for_the_kind_of_loss() -> None:
    accuracy = Accuracy(0.5, 0.75, 0.1, 4, 1, np.zeros((2, 3), np.int64))
    assert accuracy.text("softmax") == "top-1 50.00%  top-5 75.00%  on 4 images (1 more cannot be used)"
    assert accuracy.text("sigmoid").startswith("precision@1 50.00%  top-5 75.00%")


def test_the_table_of_classes_has_shares_of_their_samples_and_none_without_samples() -> None:
    accuracy = Accuracy(0.5, 1.0, 0.1, 4, 0, np.array([[3, 1, 2], [0, 0, 0], [1, 1, 1]]))
    assert accuracy.table(["cat", "dog", "eel"]) == {
        "cat": ClassAccuracy(samples=3, top1=0.333333, top5=0.666667),
        "dog": ClassAccuracy(samples=0, top1=None, top5=None),
        "eel": ClassAccuracy(samples=1, top1=1.0, top5=1.0),
    }


def test_classes_of_one_name_have_rows_of_their_own() -> None:
    accuracy = Accuracy(0.5, 1.0, 0.1, 4, 0, np.array([[3, 1, 2], [1, 0, 0], [2, 1, 1]]))
    table = accuracy.table(["crane", "dog", "crane"])
    assert {name: row.samples for name, row in table.items()} == {"crane (class 0)": 3, "dog": 1, "crane (class 2)": 2}


def test_sums_of_losses_do_not_depend_on_their_order_as_sums_of_floats_do() -> None:
    losses = 10 ** torch.linspace(-9, 3, 1001)
    parts = [_exact(losses[rank::3]).sum(dim=0) for rank in range(3)]
    assert torch.equal(sum(parts, torch.zeros(3, dtype=torch.int64)), _exact(losses.flip(0)).sum(dim=0))
    whole, fractions, not_finite = _exact(losses).sum(dim=0).tolist()
    assert whole + fractions / _FRACTIONS == pytest.approx(losses.double().sum().item(), rel=1e-9)
    assert not_finite == 0


def test_losses_that_are_not_finite_or_beyond_every_sum_are_counted_instead_of_added() -> None:
    losses = torch.tensor([1.5, torch.nan, torch.inf, 2.0**41])
    assert _exact(losses).tolist() == [[1, _FRACTIONS // 2, 0], [0, 0, 1], [0, 0, 1], [0, 0, 1]]
