"""Expected calibration error: how far the confidence of predictions is from the share of them that is right.

Guo et al., "On Calibration of Modern Neural Networks", 2017, with 15 bins of equal width.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.ranks.distributed import Ranks
from pipeline.runs.evaluation_report import Calibration, CalibrationBin

BINS = 15
_FRACTIONS = 2**32  # of a confidence of 1, so that sums are of integers and do not depend on their order


@dataclass(frozen=True, slots=True)
class CalibrationCounts:
    """What the predictions so far come to in each bin of confidence.

    Args:
        bins: (BINS, 3) int64: predictions, those that are right, and the sum of their confidences in units of 2**-32.
    """

    bins: Tensor

    @classmethod
    def on(cls, device: torch.device) -> "CalibrationCounts":
        """Without predictions."""
        return cls(torch.zeros(BINS, 3, dtype=torch.int64, device=device))

    def add(self, confidence: Tensor, correct: Tensor) -> None:
        """Count predictions: confidence (B,) float32 from 0 to 1, and whether they are right (B,) bool."""
        exact = confidence.double()
        # Bin b has those above b / BINS and up to (b + 1) / BINS.
        rows = ((exact * BINS).ceil() - 1).clamp(0, BINS - 1).long()
        counts = torch.stack([torch.ones_like(rows), correct.long(), (exact * _FRACTIONS).round().long()], dim=1)
        self.bins.index_add_(0, rows, counts)

    def result(self, ranks: Ranks) -> Calibration:
        """The calibration over all ranks, which all call this; their counts are added up in place."""
        rows = ranks.sum(self.bins).tolist()
        total = max(1, sum(samples for samples, _, _ in rows))
        # |accuracy - confidence| of a bin, times its samples: again a sum of integers.
        error = sum(abs(right * _FRACTIONS - confidence) for _, right, confidence in rows) / _FRACTIONS / total
        bins = tuple(
            CalibrationBin(
                samples,
                confidence / _FRACTIONS / samples if samples else None,
                right / samples if samples else None,
            )
            for samples, right, confidence in rows
        )
        return Calibration(error, bins)
