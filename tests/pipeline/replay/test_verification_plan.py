"""Which steps are drawn to verify a run, from which states they are recomputed, and which checkpoints are compared."""

import pytest

from pipeline.checkpoints.manifest import RollBack
from pipeline.replay.start_points import ReplayStart
from pipeline.replay.verification_plan import KeptState, VerificationPlan, verification_plan

CHECKPOINTS = {step: f"/run/step-{step:08d}" for step in (10, 20, 40)}


def plan(*roll_backs: RollBack, sample: int = 100, within: int = 10, seed: int = 0) -> VerificationPlan:
    return verification_plan(range(1, 51), CHECKPOINTS, roll_backs, sample=sample, within=within, seed=seed)


def test_steps_near_a_kept_state_are_drawn_and_the_others_are_counted() -> None:
    found = plan()
    assert (found.logged, found.within_reach) == (50, 40)
    assert [one.steps for one in found.stretches] == [tuple(range(first + 1, first + 11)) for first in (0, 10, 20, 40)]
    assert found.steps == 40


def test_a_stretch_goes_to_the_next_checkpoint_if_that_is_near() -> None:
    states = {one.start.step: one.states for one in plan(sample=0).stretches}
    assert states == {0: (KeptState(10, CHECKPOINTS[10]),), 10: (KeptState(20, CHECKPOINTS[20]),)}
    far = {one.start.step: [state.step for state in one.states] for one in plan(sample=0, within=20).stretches}
    assert far == {0: [10], 10: [20], 20: [40]}


@pytest.mark.parametrize("sample", [0, 1, 7, 40])
def test_as_many_steps_are_drawn_as_wanted_and_a_seed_draws_the_same_ones(sample: int) -> None:
    drawn = [step for one in plan(sample=sample).stretches for step in one.steps]
    assert len(drawn) == sample
    assert plan(sample=sample) == plan(sample=sample)
    assert all(one.start.step < step <= one.until for one in plan(sample=sample).stretches for step in one.steps)


def test_other_seeds_draw_other_steps() -> None:
    assert len({plan(sample=5, seed=seed) for seed in range(5)}) == 5


def test_a_stretch_does_not_cross_a_roll_back() -> None:
    found = plan(RollBack(10, 25), sample=100, within=20)
    starts = [(one.start, one.until, [state.step for state in one.states]) for one in found.stretches]
    # After step 25 the weights are those of step 10, and the checkpoint of step 40 follows from these.
    assert (ReplayStart(25, CHECKPOINTS[10], 10), 40, [40]) in starts
    assert (ReplayStart(20, CHECKPOINTS[20], 20), 25, []) in starts


def test_without_a_checkpoint_the_steps_from_the_beginning_are_drawn() -> None:
    found = verification_plan(range(1, 51), {}, sample=100, within=10, seed=0)
    assert [(one.start, one.until, one.states) for one in found.stretches] == [(ReplayStart(0), 10, ())]
