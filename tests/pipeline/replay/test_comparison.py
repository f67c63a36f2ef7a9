"""Replayed values against logged ones: equal to the bit, within rounding, or different."""

import math

import numpy as np
import pytest

from pipeline.recipe.schema import Precision
from pipeline.replay.comparison import ROUNDING, ComparedStep, compare, log_comparison
from pipeline.replay.logged_steps import LoggedStep

NAN, INF = math.nan, math.inf


def compared(ours: float, theirs: float, precision: Precision = "fp32", *, bits: bool = False) -> ComparedStep:
    return compare(3, LoggedStep(loss=ours), LoggedStep(loss=theirs), precision, bits=bits)


def test_values_are_equal_as_float32_which_the_log_holds() -> None:
    exact = 0.1234567890123
    found = compared(exact, float(np.float32(exact)), bits=True)
    assert (found.agreement, found.difference) == ("equal", 0.0)
    last_bit = float(np.nextafter(np.float32(exact), np.float32(1)))
    found = compared(exact, last_bit, bits=True)
    assert found.agreement == "different"
    assert 0 < found.difference < 2e-7
    assert compared(exact, last_bit).agreement == "rounding"


@pytest.mark.parametrize(
    ("ours", "theirs", "agreement", "difference"),
    [
        (NAN, NAN, "equal", 0.0),
        (INF, INF, "equal", 0.0),
        (-INF, INF, "different", INF),
        (NAN, INF, "different", INF),
        (1.0, NAN, "different", INF),
        (INF, 1.0, "different", INF),
        (0.0, -0.0, "equal", 0.0),
        (0.0, 1.0, "different", 1.0),
        (4.0, 3.0, "different", 0.25),
    ],
)
def test_what_is_not_finite_is_equal_to_the_same_alone(
    ours: float, theirs: float, agreement: str, difference: float
) -> None:
    found = compared(ours, theirs)
    assert (found.agreement, found.difference) == (agreement, difference)


@pytest.mark.parametrize("precision", ROUNDING)
def test_rounding_depends_on_the_precision_and_norms_may_differ_more(precision: Precision) -> None:
    share = ROUNDING[precision]
    assert compared(1.0, 1.0 - 0.9 * share, precision).agreement == "rounding"
    assert compared(1.0, 1.0 - 1.1 * share, precision).agreement == "different"
    norms = [LoggedStep(gradient_norm=value) for value in (1.0, 1.0 - 4 * share, 1.0 - 6 * share)]
    assert compare(1, norms[0], norms[1], precision, bits=False).agreement == "rounding"
    assert compare(1, norms[0], norms[2], precision, bits=False).agreement == "different"


def test_the_worst_value_of_a_step_counts_and_missing_ones_do_not() -> None:
    ours = LoggedStep(loss=1.0, gradient_norm=2.0, learning_rate=1e-3)
    found = compare(3, ours, LoggedStep(loss=1.0, gradient_norm=2.00001), "fp32", bits=False)
    assert found.agreement == "rounding"
    assert found.difference == pytest.approx(5e-6, rel=1e-3)
    nothing = compare(3, ours, LoggedStep(), "fp32", bits=True)
    assert (nothing.agreement, nothing.difference) == (None, 0.0)


def test_a_verdict_counts_values_and_names_steps() -> None:
    equal, rounding, different = compared(1.0, 1.0), compared(1.0, 1.00001), compared(1.0, 2.0)
    found = log_comparison([equal, equal], bits=True)
    assert (found.holds, found.text) == (True, "equal to the bit: all 2 logged values")
    found = log_comparison([equal, rounding], bits=False)
    assert found.holds
    assert found.text == (
        "within rounding: 1 of 2 logged values are equal to the bit, and the largest relative difference is 1e-05"
    )
    found = log_comparison([equal, different], bits=False)
    assert (found.holds, found.different) == (False, (3,))
    assert found.text.startswith("different at step 3: 1 of 2 logged values are equal to the bit, and the largest")


def test_a_verdict_names_five_steps_at_most() -> None:
    steps = [compare(step, LoggedStep(loss=1.0), LoggedStep(loss=2.0), "fp32", bits=True) for step in range(1000, 1007)]
    assert log_comparison(steps, bits=True).text.startswith(
        "different at steps 1,000, 1,001, 1,002, 1,003, 1,004, ...: "
    )


def test_without_logged_values_there_is_no_verdict() -> None:
    found = log_comparison([compare(3, LoggedStep(loss=1.0), LoggedStep(), "fp32", bits=True)], bits=True)
    assert (found.holds, found.values) == (True, 0)
    assert found.text == "none of these steps was logged, so there is nothing to compare"
