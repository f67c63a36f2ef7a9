"""The expected calibration error against its definition, computed by other code."""

import numpy as np
import pytest
import torch

from pipeline.evaluation.calibration import BINS, CalibrationCounts
from pipeline.ranks.distributed import Ranks
from pipeline.runs.evaluation_report import Calibration
from tests.pipeline.checkpoints.small import ALONE, together


def calibration(confidence: np.ndarray, correct: np.ndarray, ranks: Ranks = ALONE) -> Calibration:
    counts = CalibrationCounts.on(torch.device("cpu"))
    for first in range(ranks.rank * 7, len(confidence), 7 * ranks.world_size):
        part = slice(first, first + 7)
        counts.add(torch.from_numpy(confidence[part]), torch.from_numpy(correct[part]))
    return counts.result(ranks)


def predictions(count: int = 500) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    confidence = rng.random(count).astype(np.float32)
    return confidence, rng.random(count) < 0.7 * confidence


def test_the_error_is_the_mean_distance_of_accuracy_and_confidence_of_the_bins() -> None:
    confidence, correct = predictions()
    error = 0.0
    for number in range(BINS):
        inside = (confidence > number / BINS) & (confidence <= (number + 1) / BINS)
        error += inside.sum() / len(confidence) * abs(correct[inside].mean() - confidence[inside].mean())
    found = calibration(confidence, correct)
    assert found.error == pytest.approx(error, abs=1e-6)
    assert sum(one.samples for one in found.bins) == len(confidence)


def test_it_is_equal_to_the_bit_on_any_number_of_ranks() -> None:
    alone = calibration(*predictions())
    assert together(3, lambda ranks: calibration(*predictions(), ranks)) == [alone] * 3


def test_the_upper_limit_of_a_bin_belongs_to_it_and_bins_may_be_empty() -> None:
    found = calibration(np.array([0.0, 0.2, 1.0], np.float32), np.array([False, True, True]))
    # 0.2 is 3/15; as float32 it is slightly above, and so in the next bin.
    assert [number for number, one in enumerate(found.bins) if one.samples] == [0, 3, 14]
    assert (found.bins[14].confidence, found.bins[14].accuracy) == (1.0, 1.0)
    assert (found.bins[1].confidence, found.bins[1].accuracy) == (None, None)


def test_without_predictions_there_is_no_error() -> None:
    assert calibration(np.zeros(0, np.float32), np.zeros(0, bool)).error == 0.0
