"""What the log says of checks: that the first one was passed, what the second one cost, and how many there were."""

from types import SimpleNamespace
from typing import Any

import pytest

from pipeline.cross_check.price import announcement, points, summary


def checks(passed: int, last_passed: int | None, *, ranks: int = 4, every_steps: int = 50) -> Any:
    return SimpleNamespace(passed=passed, last_passed=last_passed, devices=[None] * ranks, every_steps=every_steps)


@pytest.mark.parametrize(
    ("of", "line"),
    [
        (
            checks(1, 1_001),
            "cross-check: passed in step 1,001, by 4 ranks, each of which computed its neighbour's, in 0.5 s with the warm-up; "
            "another one follows every 50 steps",
        ),
        (
            checks(1, 1, ranks=1, every_steps=1),
            "cross-check: passed in step 1, which one rank computed twice, in 0.5 s with the warm-up; another one follows "
            "every step",
        ),
        (checks(2, 50), "cross-check: takes 0.5 s, 25% of a step; every 50 steps that is 0.50% of the run"),
        (checks(3, 100), None),
    ],
)
def test_the_first_two_checks_of_a_start_are_announced(of: Any, line: str | None) -> None:
    assert announcement(of, 0.5, 2.5) == line


def test_curves_have_the_share_of_the_step_without_its_check() -> None:
    assert points(checks(3, 100), 0.5, 2.5) == {
        "verify/seconds": 0.5, "verify/share_of_step": 0.25, "verify/passed": 3.0,
    }  # fmt: skip


def test_a_start_says_at_its_end_how_many_were_passed() -> None:
    assert summary(checks(12, 550)) == "cross-checks: 12 passed in this start, the last one in step 550"
    assert summary(checks(0, None)) == "cross-checks: none was passed in this start"
