"""Which steps of a run are recomputed to verify its log: random ones, near the states that are kept."""

import random
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from pipeline.checkpoints.manifest import RollBack
from pipeline.replay.start_points import ReplayStart, possible_starts


@dataclass(frozen=True, slots=True)
class KeptState:
    """A checkpoint whose state is compared with the recomputed one."""

    step: int
    """Steps taken when it was saved."""
    location: str


@dataclass(frozen=True, slots=True)
class Stretch:
    """Steps that are recomputed one after the other."""

    start: ReplayStart
    until: int
    """Steps taken at its end."""
    steps: tuple[int, ...]
    """Logged steps that are compared, from 1, ascending."""
    states: tuple[KeptState, ...]
    """Checkpoints that are compared, ascending."""

    @property
    def length(self) -> int:
        """Steps that are recomputed."""
        return self.until - self.start.step


@dataclass(frozen=True, slots=True)
class VerificationPlan:
    """What is recomputed, and what of the log cannot be."""

    stretches: tuple[Stretch, ...]
    logged: int
    """Steps that the run has logged."""
    within_reach: int
    """Of them, those that are not too far from a kept state."""

    @property
    def steps(self) -> int:
        """Steps that are recomputed."""
        return sum(one.length for one in self.stretches)


def verification_plan(
    logged: Iterable[int],
    checkpoints: Mapping[int, str],
    roll_backs: Iterable[RollBack] = (),
    *,
    sample: int,
    within: int,
    seed: int,
) -> VerificationPlan:
    """Draw the steps to verify.

    Every stretch from a kept state on goes to its last drawn step. One that reaches the next checkpoint in at most
    `within` steps goes there, as the weights in it follow from every step before.

    Args:
        logged: steps, from 1.
        checkpoints: locations by the steps taken when they were saved.
        roll_backs: of the run.
        sample: how many steps to draw.
        within: the most steps from a kept state to a step that is verified.
        seed: of the draw.
    """
    back = tuple(roll_backs)
    steps = sorted(logged)
    nearest = {step: next(iter(possible_starts(step - 1, checkpoints, back)), None) for step in steps}
    reachable = [step for step, start in nearest.items() if start and step - start.step <= within]
    drawn = sorted(random.Random(seed).sample(reachable, min(sample, len(reachable))))
    starts = {start.step: start for step in drawn if (start := nearest[step])}
    for state in sorted(checkpoints):
        before = next(iter(possible_starts(state - 1, checkpoints, back)), None) if state else None
        if before and state - before.step <= within:
            starts.setdefault(before.step, before)
    stretches = []
    for first, start in sorted(starts.items()):
        following = next((state for state in sorted(checkpoints) if state > first), None)
        own = tuple(step for step in drawn if (found := nearest[step]) and found.step == first)
        ends = following is not None and following - first <= within and _follows(start, following, back)
        until = following if ends and following is not None else max(own, default=first)
        states = (KeptState(until, checkpoints[until]),) if ends else ()
        if own or states:
            stretches.append(Stretch(start, until, own, states))
    return VerificationPlan(tuple(stretches), len(steps), len(reachable))


def _follows(start: ReplayStart, state: int, roll_backs: tuple[RollBack, ...]) -> bool:
    """Whether the weights after `state` steps follow from `start`, and no roll-back has replaced them."""
    return not any(start.step < one.at <= state for one in roll_backs)
