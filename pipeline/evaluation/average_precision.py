"""Average precision of each class of multi-label data, in memory that does not grow with the number of samples.

The average precision of a class is the sum over n of (R_n - R_{n-1}) P_n, where P_n and R_n are precision and recall
at the n-th threshold of its score, from the highest down (as scikit-learn's `average_precision_score`). Samples of
equal score share a threshold. The mean is over the classes that a sample has.

The scores are counted in histograms of the logits, from -32 to 32: samples whose logits fall into one bin count as
equal. The width of a bin is 2**-10, or more if there are so many classes that the histograms would not fit into
512 MiB: 2**-5 for 21,841 classes. Within that resolution the result is exact, and independent of the number of ranks.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.ranks.distributed import Ranks

LIMIT = 32.0
"""Logits beyond it count as equal to it: sigmoids that differ from 0 or 1 by less than 2e-14."""
_MOST_BINS = 2**16
_COUNTERS = 2**26
"""Of each of the two histograms, 4 bytes each."""
_CLASSES_AT_ONCE = 64  # for which precision and recall are in memory


def bins_of(classes: int) -> int:
    """Number of bins of the histogram of each class: a power of two."""
    return min(_MOST_BINS, 1 << (_COUNTERS // max(1, classes)).bit_length() - 1)


@dataclass(frozen=True, slots=True)
class ScoreHistograms:
    """Histograms of the logits of each class.

    Args:
        positive: (classes, bins) int32, samples with the class.
        every: (classes, bins) int32, all samples.
    """

    positive: Tensor
    every: Tensor

    @classmethod
    def on(cls, device: torch.device, classes: int) -> "ScoreHistograms":
        """Without samples."""
        shape = classes, bins_of(classes)
        return cls(*(torch.zeros(shape, dtype=torch.int32, device=device) for _ in range(2)))

    @property
    def resolution(self) -> float:
        """Width of a bin, in logits."""
        return 2 * LIMIT / self.every.shape[1]

    def add(self, logits: Tensor, labels: Tensor) -> None:
        """Count samples: logits (B, classes) float32, labels (B, k) int64, padded with -1."""
        classes, bins = self.every.shape
        # Exact: the width is a power of two.
        places = ((logits + LIMIT) / self.resolution).floor().clamp(0, bins - 1).long()
        rows = torch.arange(classes, device=logits.device) * bins
        flat = (places + rows).flatten()
        self.every.view(-1).index_add_(0, flat, torch.ones_like(flat, dtype=torch.int32))
        has_label = labels >= 0
        of_labels = places.gather(1, labels.clamp(min=0)) + labels * bins
        found = of_labels[has_label]
        self.positive.view(-1).index_add_(0, found, torch.ones_like(found, dtype=torch.int32))

    def result(self, ranks: Ranks) -> NDArray[np.float64]:
        """The average precision (classes,) over all ranks, which all call this; NaN for classes without samples.

        The histograms of the ranks are added up in place.
        """
        ranks.sum(self.positive)
        ranks.sum(self.every)
        classes = len(self.every)
        parts = [
            _average_precision(
                self.positive[first : first + _CLASSES_AT_ONCE].cpu().numpy(),
                self.every[first : first + _CLASSES_AT_ONCE].cpu().numpy(),
            )
            for first in range(0, classes, _CLASSES_AT_ONCE)
        ]
        return np.concatenate(parts)


def _average_precision(positive: NDArray[np.int32], every: NDArray[np.int32]) -> NDArray[np.float64]:
    """From histograms (classes, bins), ascending by score."""
    hits = positive[:, ::-1].astype(np.int64)
    found = hits.cumsum(axis=1)
    retrieved = every[:, ::-1].astype(np.int64).cumsum(axis=1)
    precision = found / np.maximum(1, retrieved)
    total = found[:, -1]
    result = (hits * precision).sum(axis=1) / np.maximum(1, total)
    average: NDArray[np.float64] = np.where(total > 0, result, np.nan)
    return average
