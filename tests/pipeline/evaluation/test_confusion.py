"""Sparse confusion matrices against dense ones, and their pictures."""

import numpy as np
import pytest

from pipeline.evaluation import confusion as module
from pipeline.evaluation.confusion import Confusion, ConfusionCounts
from pipeline.evaluation.confusion_picture import MOST_CLASSES, confusion_picture
from pipeline.ranks.distributed import Ranks
from tests.pipeline.checkpoints.small import ALONE, together


def pairs(classes: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(classes)
    return rng.integers(0, classes, count), rng.integers(0, classes, count)


def counted(classes: int, count: int, ranks: Ranks = ALONE) -> Confusion:
    true, predicted = pairs(classes, count)
    counts = ConfusionCounts(classes)
    for first in range(ranks.rank * 10, count, 10 * ranks.world_size):
        counts.add(true[first : first + 10], predicted[first : first + 10])
    return counts.result(ranks)


def dense(classes: int, count: int) -> np.ndarray:
    matrix = np.zeros((classes, classes), np.int64)
    np.add.at(matrix, pairs(classes, count), 1)
    return matrix


@pytest.mark.parametrize("pending", [1, 64, 1 << 20])
def test_the_counts_are_those_of_the_dense_matrix(pending: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_PENDING", pending)
    found = counted(9, 500)
    assert np.array_equal(found.dense(range(9)), dense(9, 500))
    assert np.array_equal(found.true * 9 + found.predicted, np.flatnonzero(dense(9, 500)))


def test_the_leader_has_the_counts_of_all_ranks() -> None:
    assert np.array_equal(together(3, lambda ranks: counted(9, 500, ranks))[0].dense(range(9)), dense(9, 500))


def test_the_classes_that_are_not_chosen_are_the_last_row_and_column() -> None:
    matrix, found = dense(5, 300), counted(5, 300).dense([1, 3])
    assert found.shape == (3, 3)
    assert found[0, 1] == matrix[1, 3]
    assert found[0, 2] == matrix[1, [0, 2, 4]].sum()
    assert found[2, 2] == matrix[np.ix_([0, 2, 4], [0, 2, 4])].sum()


def test_the_worst_pairs_are_of_different_classes_and_equal_ones_in_the_order_of_the_classes() -> None:
    counts = ConfusionCounts(4)
    counts.add(np.array([0, 0, 0, 3, 3, 2, 1, 1]), np.array([0, 0, 0, 1, 1, 3, 2, 2]))
    found = counts.result(ALONE)
    assert found.worst(3) == [(1, 2, 2), (3, 1, 2), (2, 3, 1)]
    assert found.worst(1) == [(1, 2, 2)]
    assert found.most_confused(2) == [1, 2]
    assert found.most_confused(4) == [0, 1, 2, 3]


def test_a_picture_of_few_classes_shows_all_of_them() -> None:
    picture = confusion_picture(counted(3, 100), ["a", "b\x1b[31m", "c"])
    assert picture.remark == ""
    pixels = np.asarray(picture.image)
    assert pixels.shape[0] > 3 * 40
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 10  # cells of several colours


def test_a_picture_of_many_classes_has_the_most_confused_ones_and_says_so() -> None:
    few, many = (confusion_picture(counted(classes, 2000), list(map(str, range(classes)))) for classes in (50, 21_841))
    assert few.remark == ""
    assert (
        many.remark
        == f"it shows {MOST_CLASSES - 1} of 21,841 classes, those of the most confused pairs, and the other 21,792 together"
    )
    assert max(many.image.size) < 2000
