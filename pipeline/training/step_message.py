"""What each rank tells the others with every step, beside gradients and loss: summed in the exchange of the step."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

from pipeline.faults.preemption import REASONS, agreed_reason


@dataclass(frozen=True, slots=True)
class StepMessage:
    """The message of one rank or, once packed messages are summed and unpacked, that of all ranks together."""

    stop_flags: Sequence[float]
    """One for each of `preemption.REASONS`, not 0 where a rank wants to stop for that reason."""
    histograms: float
    """Not 0 if a rank requests histograms of the weights after this step."""
    rank_times: Sequence[float]
    """Seconds, (2 x world_size,): the data waits of all ranks, then their forwards; 0 in the places of other ranks."""
    verifying: float = 0.0
    """Not 0 while a rank has local shards to verify."""

    def pack(self) -> list[float]:
        """The message as numbers that may be summed over the ranks."""
        return [*self.stop_flags, self.histograms, self.verifying, *self.rank_times]

    @classmethod
    def unpack(cls, numbers: Sequence[float]) -> Self:
        """The message that `numbers` were packed from."""
        flags = len(REASONS)
        return cls(list(numbers[:flags]), numbers[flags], list(numbers[flags + 2 :]), numbers[flags + 1])

    @property
    def stop_reason(self) -> str | None:
        """Why the run is to stop after this step, one of `preemption.REASONS`; None if it is not."""
        return agreed_reason(self.stop_flags)
