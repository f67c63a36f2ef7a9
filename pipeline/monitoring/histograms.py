"""Histograms of the weights, counted on the ranks that hold them, in the fixed bins of TensorBoard's own writer."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from tensorboard.compat.proto.summary_pb2 import HistogramProto, Summary

from pipeline.ranks.distributed import Ranks
from pipeline.zero.fragments import Fragment

_CHUNK = 2**22  # elements counted at a time


def _bin_edges() -> list[float]:
    positive = [1e-12]
    while positive[-1] * 1.1 < 1e20:
        positive.append(positive[-1] * 1.1)
    return [*(-edge for edge in reversed(positive)), 0.0, *positive]


EDGES = _bin_edges()
"""Bin i holds EDGES[i - 1] <= x < EDGES[i]; the last one holds everything above the last edge."""


@dataclass(frozen=True, slots=True)
class Histogram:
    """The distribution of one parameter: counts (len(EDGES) + 1,), sum and sum of squares of the values."""

    counts: NDArray[np.int64]
    sum: float
    sum_squares: float

    def summary(self, tag: str) -> Summary:
        """As TensorBoard reads it; minimum and maximum are bin edges."""
        filled = np.flatnonzero(self.counts)
        first, last = int(filled[0]), int(filled[-1])
        limits = [-sys.float_info.max, *EDGES, sys.float_info.max]  # of bin i: limits[i], limits[i + 1]
        histogram = HistogramProto(
            min=limits[first],
            max=limits[last + 1],
            num=int(self.counts.sum()),
            sum=self.sum,
            sum_squares=self.sum_squares,
            bucket_limit=limits[first + 1 : last + 2],
            bucket=self.counts[first : last + 1].tolist(),
        )
        return Summary(value=[Summary.Value(tag=tag, histo=histogram)])


@torch.no_grad()
def weight_histograms(fragments: Sequence[Fragment], parameters: Sequence[str], ranks: Ranks) -> dict[str, Histogram]:
    """A histogram of each of `parameters`, from the fragments of all ranks, which call this together.

    Exchanges about 12 KB per parameter.
    """
    rows = {name: row for row, name in enumerate(parameters)}
    bins = len(EDGES) + 1
    edges = torch.tensor(EDGES, dtype=torch.float32, device=ranks.device)
    table = torch.zeros(len(rows), bins + 2, dtype=torch.float64, device=ranks.device)
    for fragment in fragments:
        if not fragment.saved_here:  # replicated state counts once
            continue
        row = table[rows[fragment.parameter]]
        for chunk in torch.split(fragment.tensors["master"], _CHUNK):
            row[:bins] += torch.bincount(torch.bucketize(chunk, edges, right=True), minlength=bins)
            row[bins] += chunk.sum(dtype=torch.float64)
            row[bins + 1] += torch.linalg.vector_norm(chunk, dtype=torch.float64).square()
    whole = ranks.sum(table).cpu().numpy()
    return {
        name: Histogram(whole[row, :bins].astype(np.int64), float(whole[row, bins]), float(whole[row, bins + 1]))
        for name, row in rows.items()
    }
