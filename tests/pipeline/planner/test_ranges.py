"""Arithmetic of figures with ranges."""

from pipeline.planner.ranges import NOTHING, Range

SECONDS = Range(4.0, 2.0, 8.0)


def test_a_figure_without_a_range_has_equal_ends() -> None:
    assert Range.exactly(3.0) == Range(3.0, 3.0, 3.0)
    assert Range.exactly(3.0).is_exact
    assert not SECONDS.is_exact


def test_sums_and_multiples_are_those_of_each_end() -> None:
    assert SECONDS + Range(1.0, 0.5, 3.0) == Range(5.0, 2.5, 11.0)
    half = SECONDS * 0.5
    assert half == Range(2.0, 1.0, 4.0)
    assert SECONDS + NOTHING == SECONDS


def test_the_ends_of_a_rate_change_places() -> None:
    assert SECONDS.dividing(16) == Range(4.0, 2.0, 8.0)
    assert SECONDS.dividing(8) == Range(2.0, 1.0, 4.0)


def test_what_is_left_is_least_when_most_is_hidden_and_never_negative() -> None:
    assert SECONDS.beyond(Range(1.0, 0.5, 1.5)) == Range(3.0, 0.5, 7.5)
    assert SECONDS.beyond(Range(5.0, 3.0, 9.0)) == Range(0.0, 0.0, 5.0)
    assert SECONDS.beyond(Range.exactly(10.0)) == NOTHING


def test_the_larger_of_two_is_taken_end_by_end() -> None:
    assert SECONDS.at_least(Range(3.0, 3.0, 20.0)) == Range(4.0, 3.0, 20.0)
