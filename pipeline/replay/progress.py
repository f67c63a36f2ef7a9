"""How far a replay is, said now and then: the steps from a checkpoint may take hours."""

import time
from collections.abc import Callable

from pipeline.replay.step_replay import ReplayedStep

_SECONDS = 30.0


class ReplayProgress:
    """Says which steps are done, at most once in half a minute.

    Args:
        until: the last step.
        say: shows a line to the user.
        clock: seconds of a monotonic clock.
    """

    def __init__(self, until: int, say: Callable[[str], None], clock: Callable[[], float] = time.monotonic) -> None:
        self._until, self._say, self._clock = until, say, clock
        self._said = clock()

    def step(self, replayed: ReplayedStep) -> None:
        """A step is done."""
        if self._clock() - self._said >= _SECONDS and replayed.step < self._until:
            self._said = self._clock()
            self._say(f"step {replayed.step:,} of {self._until:,}: loss {replayed.result.loss:.4f}")
