"""Step times compared across ranks: what waiting for data costs, and which rank keeps the others waiting."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

_KINDS = ("data_wait", "forward")
_SYMPTOMS = {"data_wait": "waits longest for data", "forward": "is slowest in its forward"}
_CAUSES = {
    "data_wait": "its node's disks, network and processor cores",
    "forward": "its GPU's clock, temperature and neighbours",
}

_SLOW_RATIO = 1.5  # to the median of all ranks
_SLOW_SHARE = 0.05  # of the step's time; a smaller difference is not worth a message
_SLOW_INTERVALS = 3  # in a row


class RankTimes:
    """Sums of each rank's data waits and forward passes over the steps of an interval.

    With ZeRO 3 a forward includes gathering weights, so a slow rank also slows the forwards of the others.
    """

    def __init__(self, world_size: int) -> None:
        self._world_size = world_size
        self._sums = np.zeros((2, world_size))
        self._waited = 0.0
        self._steps = 0
        self._suspects: dict[str, tuple[int, int]] = {}

    def add(self, seconds: Sequence[float]) -> None:
        """Add one step: the data waits of all ranks, then their forwards, in seconds; 2 x world_size values."""
        step = np.array(seconds, np.float64).reshape(2, self._world_size)
        self._sums += step
        # The slowest rank determines how long a step takes.
        self._waited += float(step[0].max())
        self._steps += 1

    def interval(self, seconds: float) -> tuple[dict[str, float], list[str]]:
        """TensorBoard tags and values for the steps since the last call, which took `seconds`, and messages about
        ranks that have been slow for several intervals.
        """
        scalars, messages = {}, []
        if self._steps and seconds > 0:
            scalars["wall_time/data_wait_share"] = min(1.0, self._waited / seconds)
            for kind, sums in zip(_KINDS, self._sums, strict=True):
                means: NDArray[np.float64] = sums / self._steps
                slowest, median = int(means.argmax()), float(np.median(means))
                largest = float(means[slowest])
                if self._world_size > 1:
                    prefix = f"wall_time_of_ranks/{kind}"
                    scalars |= {f"{prefix}_largest_seconds": largest, f"{prefix}_median_seconds": median}
                    scalars[f"{prefix}_slowest_rank"] = slowest
                is_slow = largest > _SLOW_RATIO * median and largest - median > _SLOW_SHARE * seconds / self._steps
                if self._persists(kind, slowest if is_slow else None):
                    messages.append(
                        f"rank {slowest} {_SYMPTOMS[kind]}: {largest:.3g} s per step, and the median of all ranks is "
                        f"{median:.3g} s; look at {_CAUSES[kind]} (its log names the node)"
                    )
        self._sums[:] = 0.0
        self._waited, self._steps = 0.0, 0
        return scalars, messages

    def _persists(self, kind: str, rank: int | None) -> bool:
        """Whether this interval completes a series of `_SLOW_INTERVALS` in which `rank` was slow."""
        if rank is None:
            self._suspects.pop(kind, None)
            return False
        before, count = self._suspects.get(kind, (rank, 0))
        self._suspects[kind] = (rank, count + 1 if before == rank else 1)
        return self._suspects[kind][1] == _SLOW_INTERVALS
