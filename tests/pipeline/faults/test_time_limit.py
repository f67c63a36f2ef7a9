"""When a start must have ended, and the margin that a run learns."""

import time

import pytest

from pipeline.faults.time_limit import Margin, TimeLimit, time_limit

STARTED = 1_000_000.0


@pytest.mark.parametrize(
    ("limit_seconds", "job_end", "end"),
    [
        (None, None, None),
        (60.0, None, STARTED + 60),
        (None, STARTED + 500, STARTED + 500),
        (600.0, STARTED + 500, STARTED + 500),
        (60.0, STARTED + 500, STARTED + 60),
    ],
    ids=["none", "recipe", "job", "job-first", "recipe-first"],
)
def test_the_earlier_of_the_recipe_and_the_job_counts(
    limit_seconds: float | None, job_end: float | None, end: float | None
) -> None:
    limit = time_limit(limit_seconds, STARTED, job_end)
    assert (limit.end if limit else None) == end


def test_the_margin_is_two_of_the_longest_steps_the_longest_save_and_half_a_minute() -> None:
    margin = Margin()
    assert margin.seconds == 30
    for seconds in (900.0, 60.0, 2.0, 5.0, 3.0):  # the first two compile and warm up
        margin.step_took(seconds)
    for seconds in (7.0, 4.0):
        margin.save_took(seconds)
    assert margin.seconds == 2 * 5 + 7 + 30
    assert margin.another_save == 7 + 10


def test_a_run_whose_first_step_takes_longer_than_what_is_left_goes_on() -> None:
    margin = Margin()
    margin.step_took(900.0)
    assert not TimeLimit(time.time() + 1000).near(margin.seconds)


def test_a_limit_is_near_when_no_more_than_the_needed_time_is_left() -> None:
    limit = TimeLimit(time.time() + 1000)
    assert not limit.near(900)
    assert limit.near(1000)
