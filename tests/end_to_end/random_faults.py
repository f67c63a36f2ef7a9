"""Which faults strike a run: kinds, moments and steps, drawn at random."""

import math
import random
import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

SAVE_EVERY = 3
"""Steps between saves."""
PERIOD = 15
"""Steps between evaluations, and between the rows of steps that are not finite."""
BEFORE_ROW = SAVE_EVERY
"""Steps before the first row. A multiple of `SAVE_EVERY`: where a run goes back to does not depend on the stops before."""
MARGIN = 2 * PERIOD
"""Steps between the last fault and the end."""
STEPS_PER_FAULT = 3

Moment = Literal["start", "step", "save", "evaluation", "roll-back"]
Victim = Literal["rank", "everyone", "launcher"]
KINDS: tuple[tuple[Victim, signal.Signals], ...] = (
    ("rank", signal.SIGKILL),
    ("everyone", signal.SIGKILL),
    ("launcher", signal.SIGKILL),
    ("rank", signal.SIGTERM),
    ("launcher", signal.SIGTERM),
    ("launcher", signal.SIGHUP),
    ("launcher", signal.SIGINT),
)
MOMENTS: tuple[Moment, ...] = ("step", "save", "evaluation", "save", "start", "evaluation")
WITH_ROLL_BACKS: tuple[Moment, ...] = ("roll-back", "save", "evaluation", "roll-back", "step", "save", "start")

_SECONDS: dict[Moment, float] = {"start": 1.5, "step": 0.05, "save": 0.005, "evaluation": 0.03, "roll-back": 0.1}
_Drawn = TypeVar("_Drawn")


@dataclass(frozen=True)
class Setup:
    """What the starts of a run are like."""

    worlds: tuple[int, ...] = (2,)
    """Numbers of ranks, of which each start has one."""
    zero: tuple[int, ...] = (1,)
    """ZeRO stages, likewise."""
    row: int = 0
    """Steps in a row that are not finite, after which the run goes back to its last checkpoint; 0 for no such rows."""
    compile: bool = False

    @property
    def is_exact(self) -> bool:
        """Whether all starts compute sums in the same order."""
        return len(self.worlds) == len(self.zero) == 1

    @property
    def batch(self) -> dict[str, int]:
        """A number of micro-batches that all worlds divide."""
        return {"global_size": 2 * math.lcm(4 if len(self.worlds) == 1 else 1, *self.worlds), "micro_size": 2}

    def evaluates(self, step: int) -> bool:
        """Whether an evaluation follows step `step`, from 1."""
        return step % PERIOD == 0

    def rolls_back(self, step: int) -> bool:
        """Whether a roll-back follows step `step`, from 1."""
        return self.row > 0 and step % PERIOD == BEFORE_ROW + 1 + self.row

    def not_finite(self, steps: int) -> list[int]:
        """The steps, from 0, of a run of `steps` steps that are not finite."""
        return [step for step in range(steps) if 0 <= step % PERIOD - BEFORE_ROW - 1 < self.row]


@dataclass(frozen=True)
class Fault:
    """What happens to one start of a run."""

    victim: Victim
    signal: signal.Signals
    moment: Moment
    """During the start, after a step, after the save of a step has begun, in an evaluation, or in a roll-back."""
    step: int
    """That step, or a later one."""
    delay: float
    """Seconds after that moment, at most about as long as a start, a step, a save and so on takes."""
    ranks: int
    """Number of ranks of the start."""
    zero: int
    """ZeRO stage of the start."""
    rank: int
    """The victim, modulo the number of ranks."""
    fresh: bool
    """Whether the command starts in a new interpreter instead of a fork (`tests/support/prefork.py`)."""

    def is_at(self, step: int, setup: Setup) -> bool:
        """Whether this is the moment, with `step` the last one taken; for moments that a step begins."""
        # A moment that is missed on a busy machine is replaced by any other before the run ends.
        if step < self.step or self.moment == "step" or step > self.step + PERIOD:
            return step >= self.step
        return setup.rolls_back(step) if self.moment == "roll-back" else setup.evaluates(step)


def steps_for(faults: int) -> int:
    """Length of a run that survives that many faults."""
    return faults * STEPS_PER_FAULT + MARGIN


def draw_faults(count: int, setup: Setup, fresh: int, rng: random.Random) -> list[Fault]:
    """`count` faults in the order of their steps, every kind equally often, `fresh` of them in new interpreters.

    Their moments are steps of the run rather than times, so that a slow machine does not change what is tested.
    """
    steps = sorted(rng.randint(1, steps_for(count) - MARGIN) for _ in range(count))
    kinds = list(_shuffled(KINDS, count, rng))
    # Each by itself: what is killed in a save loses it, and what is asked to stop finishes it first.
    killed = sum(number == signal.SIGKILL for _, number in kinds)
    aimed = WITH_ROLL_BACKS if setup.row else MOMENTS
    moments = {True: _shuffled(aimed, killed, rng), False: _shuffled(aimed, count - killed, rng)}
    worlds, zero = _shuffled(setup.worlds, count, rng), _shuffled(setup.zero, count, rng)
    real = _shuffled([number < fresh for number in range(count)], count, rng)
    return [
        Fault(
            victim,
            number,
            moment := next(moments[number == signal.SIGKILL]),
            step,
            delay=rng.uniform(0, _SECONDS[moment]),
            ranks=next(worlds),
            zero=next(zero),
            rank=rng.randrange(max(setup.worlds)),
            fresh=next(real),
        )
        for (victim, number), step in zip(kinds, steps, strict=True)
    ]


def _shuffled(values: Sequence[_Drawn], count: int, rng: random.Random) -> Iterator[_Drawn]:
    """`count` of these in random order, each equally often."""
    drawn = [values[number % len(values)] for number in range(count)]
    rng.shuffle(drawn)
    return iter(drawn)
