"""From which states a step can be recomputed."""

import pytest

from pipeline.checkpoints.manifest import RollBack
from pipeline.replay.start_points import ReplayStart, possible_starts

PLACES = {4: "runs/a/step-00000004", 8: "runs/a/step-00000008", 12: "runs/a/step-00000012"}


def steps(before: int, roll_backs: list[RollBack] | None = None, places: dict[int, str] = PLACES) -> list[int]:
    return [start.step for start in possible_starts(before, places, roll_backs or [])]


@pytest.mark.parametrize(
    ("before", "expected"), [(0, [0]), (3, [0]), (4, [4, 0]), (11, [8, 4, 0]), (12, [12, 8, 4, 0]), (99, [12, 8, 4, 0])]
)
def test_the_nearest_checkpoint_comes_first_and_the_beginning_last(before: int, expected: list[int]) -> None:
    assert steps(before) == expected


def test_a_checkpoint_of_the_beginning_takes_its_place() -> None:
    (start,) = possible_starts(2, {0: "step-00000000"})
    assert start == ReplayStart(0, "step-00000000", 0)


def test_steps_after_a_roll_back_follow_from_the_checkpoint_that_it_returned_to_and_from_later_ones() -> None:
    back = RollBack(to=4, at=9)
    assert steps(8, [back]) == [8, 4, 0]  # before it
    assert possible_starts(10, PLACES, [back]) == [ReplayStart(9, PLACES[4], 4)]
    assert possible_starts(13, PLACES, [back]) == [ReplayStart(12, PLACES[12], 12), ReplayStart(9, PLACES[4], 4)]


def test_a_checkpoint_that_was_saved_just_after_a_roll_back_has_its_weights() -> None:
    places = PLACES | {9: "step-00000009"}
    assert possible_starts(10, places, [RollBack(to=4, at=9)]) == [ReplayStart(9, "step-00000009", 9)]


def test_of_several_roll_backs_the_last_one_before_the_step_counts() -> None:
    backs = [RollBack(to=4, at=9), RollBack(to=8, at=12), RollBack(to=4, at=20)]
    assert steps(11, backs) == [9]
    # The checkpoint of step 12 was saved after the roll-back there.
    assert steps(15, backs) == [12]
    assert steps(15, backs, {8: PLACES[8]}) == [12]
    assert steps(15, backs, {4: PLACES[4]}) == []


def test_a_start_says_what_it_is() -> None:
    assert ReplayStart(0).text == "the beginning of the stage"
    assert ReplayStart(8, PLACES[8], 8).text == "step-00000008"
    rolled_back = ReplayStart(1209, PLACES[4], 4).text
    assert rolled_back == "step-00000004, to which the run was rolled back at step 1,209"
