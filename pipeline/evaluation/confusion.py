"""Which classes are taken for which: counts of the pairs that occur, which are few of all pairs of many classes."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from pipeline.evaluation.gathering import array_of_rank
from pipeline.ranks.distributed import Ranks

_PENDING = 1 << 20  # predictions that are counted together

Int64 = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Confusion:
    """The confusion matrix in sparse form: the pairs (P,) that occur, ascending by true class, then by prediction."""

    classes: int
    true: Int64
    predicted: Int64
    counts: Int64
    """(P,) samples of that class with that prediction, at least 1."""

    def dense(self, chosen: Sequence[int]) -> Int64:
        """The matrix (n, n) of the `chosen` classes, or (n + 1, n + 1) with all others as the last row and column."""
        rest = len(chosen) < self.classes
        size = len(chosen) + rest
        rows = np.full(self.classes, size - 1, np.int64)
        rows[list(chosen)] = np.arange(len(chosen))
        matrix = np.zeros((size, size), np.int64)
        np.add.at(matrix, (rows[self.true], rows[self.predicted]), self.counts)
        return matrix

    def worst(self, count: int) -> list[tuple[int, int, int]]:
        """Up to `count` pairs of different classes with the most samples: true class, predicted class, samples.

        Equal ones in the order of the classes.
        """
        wrong = np.flatnonzero(self.true != self.predicted)
        chosen = wrong[np.argsort(-self.counts[wrong], kind="stable")[:count]]
        return list(
            zip(self.true[chosen].tolist(), self.predicted[chosen].tolist(), self.counts[chosen].tolist(), strict=True)
        )

    def most_confused(self, count: int) -> list[int]:
        """`count` classes, or all if there are fewer: those of the worst pairs, ascending."""
        chosen: dict[int, None] = {}
        for true, predicted, _ in self.worst(count * count):  # more than there are among `count` classes
            chosen |= {true: None, predicted: None}
        for number in range(self.classes):
            if len(chosen) >= count:
                break
            chosen[number] = None
        return sorted(list(chosen)[:count])


@dataclass(slots=True)
class ConfusionCounts:
    """Counts pairs of true and predicted class on one rank.

    Memory is 16 bytes for each pair that occurs, of which there are no more than samples, and a buffer of 8 MiB.
    """

    classes: int
    _keys: Int64 = field(default_factory=lambda: np.zeros(0, np.int64))
    """Ascending: true class * classes + predicted class."""
    _counts: Int64 = field(default_factory=lambda: np.zeros(0, np.int64))
    _pending: list[Int64] = field(default_factory=list)
    _waiting: int = 0

    def add(self, true: Int64, predicted: Int64) -> None:
        """Count pairs, two (B,)."""
        self._pending.append(true * self.classes + predicted)
        self._waiting += len(true)
        if self._waiting >= _PENDING:
            self._merge_pending()

    def result(self, ranks: Ranks) -> Confusion:
        """The counts of all ranks, which all call this; on other ranks than the leader, only their own."""
        self._merge_pending()
        own = self._keys, self._counts
        for rank in range(1, ranks.world_size):
            keys, counts = (array_of_rank(ranks, rank, values) for values in own)
            if ranks.is_leader:
                self._merge(keys, counts)
        true, predicted = np.divmod(self._keys, self.classes)
        return Confusion(self.classes, true, predicted, self._counts)

    def _merge_pending(self) -> None:
        if self._pending:
            self._merge(*np.unique(np.concatenate(self._pending), return_counts=True))
        self._pending, self._waiting = [], 0

    def _merge(self, keys: Int64, counts: Int64) -> None:
        """Add counts of different keys."""
        merged, places = np.unique(np.concatenate([self._keys, keys]), return_inverse=True)
        sums = np.zeros(len(merged), np.int64)
        np.add.at(sums, places, np.concatenate([self._counts, counts]))
        self._keys, self._counts = merged, sums
