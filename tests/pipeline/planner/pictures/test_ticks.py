"""Round numbers on axes, and numbers as texts."""

import pytest

from pipeline.planner.pictures.ticks import exact, linear_ticks, logarithmic_ticks, percent, round_step, rounded


@pytest.mark.parametrize(("least", "step"), [(0.011, 0.02), (1.0, 1), (2.1, 5), (51, 100), (0.5, 0.5)])
def test_steps_are_1_2_or_5_times_a_power_of_ten(least: float, step: float) -> None:
    assert round_step(least) == pytest.approx(step)


def test_linear_ticks_are_multiples_within_both_ends() -> None:
    assert linear_ticks(0, 1.0, 0.25) == [0, 0.25, 0.5, 0.75, 1]
    assert linear_ticks(1121, 1219, 50) == [1150, 1200]


@pytest.mark.parametrize(
    ("start", "end", "ticks"),
    [
        (380, 720, [400, 500, 600, 700]),
        (9, 520, [10, 20, 50, 100, 200, 500]),
        (90, 110_000, [100, 300, 1e3, 3e3, 1e4, 3e4, 1e5]),
    ],
)
def test_logarithmic_ticks_are_evenly_spread(start: float, end: float, ticks: list[float]) -> None:
    assert logarithmic_ticks(start, end) == pytest.approx(ticks)


def test_there_are_not_too_many_logarithmic_ticks() -> None:
    assert len(logarithmic_ticks(1e-9, 1e9)) <= 8


def test_numbers_have_three_digits() -> None:
    values = [0, 0.0001, 0.0123, 0.9996, 1.234, 9.996, 12.34, 99.96, 123.4, 999.6, 1219, 158669]
    shown = ["0", "< 0.001", "0.012", "1.00", "1.23", "10.0", "12.3", "100", "123", "1,000", "1,220", "159,000"]
    assert [rounded(value) for value in values] == shown
    assert [exact(value) for value in (0.25, 5.0, 20000.0, 0.1 + 0.2)] == ["0.25", "5", "20,000", "0.3"]
    assert [percent(share) for share in (0, 0.0001, 0.004, 0.124, 1)] == ["0 %", "< 0.1 %", "0.4 %", "12 %", "100 %"]
