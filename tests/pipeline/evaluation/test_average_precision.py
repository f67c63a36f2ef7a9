"""Average precision from histograms against its definition, computed from the scores by other code."""

import numpy as np
import pytest
import torch

from pipeline.evaluation.average_precision import LIMIT, ScoreHistograms, bins_of
from pipeline.ranks.distributed import Ranks
from tests.pipeline.checkpoints.small import ALONE, together

CLASSES, SAMPLES = 6, 200


def scores_and_labels() -> tuple[np.ndarray, np.ndarray]:
    """Logits (samples, classes), and up to two labels (samples, 2), padded with -1; no sample has the last class."""
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 4, (SAMPLES, CLASSES)).astype(np.float32)
    logits[::7] = np.round(logits[::7])  # equal scores
    logits[3], logits[4] = 100, -100  # beyond the limits
    first, second = rng.integers(0, CLASSES - 1, SAMPLES), rng.integers(-1, CLASSES - 1, SAMPLES)
    labels = np.stack([first, np.where(second == first, -1, second)], axis=1)
    return logits, labels


def histograms(ranks: Ranks = ALONE) -> np.ndarray:
    logits, labels = map(torch.from_numpy, scores_and_labels())
    counts = ScoreHistograms.on(torch.device("cpu"), CLASSES)
    for first in range(ranks.rank * 9, SAMPLES, 9 * ranks.world_size):
        counts.add(logits[first : first + 9], labels[first : first + 9])
    return counts.result(ranks)


def average_precision(scores: np.ndarray, positive: np.ndarray) -> float:
    """As scikit-learn defines it: precision at each different score, weighted by the rise of the recall."""
    total = 0.0
    recall = 0.0
    for threshold in sorted(set(scores.tolist()), reverse=True):
        retrieved = scores >= threshold
        now = (retrieved & positive).sum() / positive.sum()
        total += (now - recall) * (retrieved & positive).sum() / retrieved.sum()
        recall = now
    return float(total)


def test_it_is_that_of_the_scores_up_to_the_stated_resolution() -> None:
    logits, labels = scores_and_labels()
    resolution = 2 * LIMIT / bins_of(CLASSES)
    rounded = np.floor(np.clip(logits, -LIMIT, LIMIT - resolution) / resolution)
    found = histograms()
    for number in range(CLASSES - 1):
        positive = (labels == number).any(axis=1)
        assert found[number] == pytest.approx(average_precision(rounded[:, number], positive), abs=1e-12)
        assert found[number] == pytest.approx(average_precision(logits[:, number], positive), abs=1e-3)
    assert np.isnan(found[-1])


def test_it_is_equal_to_the_bit_on_any_number_of_ranks() -> None:
    alone = histograms()
    for found in together(3, histograms):
        assert np.array_equal(found, alone, equal_nan=True)


def test_the_histograms_of_many_classes_are_coarser_and_take_no_more_memory() -> None:
    assert [bins_of(classes) for classes in (1, 80, 1000, 1025, 21_841)] == [65_536, 65_536, 65_536, 32_768, 2_048]
    assert all(2 * 4 * classes * bins_of(classes) <= 2**29 for classes in range(1, 30_000, 97))


def test_perfect_scores_have_precision_one_and_reversed_ones_the_share_of_the_class() -> None:
    counts = ScoreHistograms.on(torch.device("cpu"), 2)
    counts.add(torch.tensor([[3.0, -3.0], [2.0, -2.0]]), torch.tensor([[0], [0]]))
    counts.add(torch.tensor([[-1.0, -9.0], [-1.0, -9.0]]), torch.tensor([[1], [1]]))
    assert counts.result(ALONE).tolist() == [1.0, 0.5]
