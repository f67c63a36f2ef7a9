"""Useful time: the simulation against the closed form, both against cases that are known, and the best interval."""

import math
from dataclasses import replace

import pytest

from pipeline.errors import ConfigError
from pipeline.planner.failures.run_timing import Ending, RunTiming, SaveCost
from pipeline.planner.failures.save_interval import best_interval, daly, young
from pipeline.planner.failures.useful_time import (
    _FRUITLESS_STARTS,
    MONTH,
    _stretch,
    mean_time_between_failures,
    simulate,
    useful_share,
    useful_time,
)
from pipeline.runs.event_log import STARTS_WITHOUT_PROGRESS

RUN = RunTiming(nodes=16, ranks_per_node=8, batch=4096, step=0.5, interval=1000, save=SaveCost(2.0, 100.0), start=120.0)
SLOW = replace(RUN, save=SaveCost(20.0, 900.0))
"""Its saves take longer than the steps between them."""


@pytest.mark.parametrize(("run", "hours"), [(RUN, 300.0), (RUN, 60.0), (SLOW, 300.0)])
def test_the_simulation_agrees_with_the_closed_form(run: RunTiming, hours: float) -> None:
    found, exact = simulate(run, hours, runs=60, seed=1), useful_time(run, hours)
    assert abs(found.share - exact.exact) < 3 * found.error
    assert found.error < 0.002
    assert found.failures == pytest.approx(exact.failures, rel=0.1)


def test_the_first_order_is_that_of_the_closed_form() -> None:
    """Its error falls with the square of the rate of failures."""
    errors = []
    for hours in (1000.0, 10_000.0):
        found = useful_time(RUN, hours)
        errors.append(abs(found.exact - found.first_order))
    assert errors[0] / errors[1] == pytest.approx(100, rel=0.1)


def test_saves_that_count_at_once_give_dalys_model() -> None:
    run, mean = replace(RUN, save=SaveCost(30.0, 0.0)), 5000.0
    down = run.downtime()
    found = useful_share(run.work, run.cycle, down + run.cycle, mean)
    daly_model = mean * math.exp(down / mean) * (math.exp((run.work + 30) / mean) - 1)
    assert found == pytest.approx(run.work / daly_model, rel=1e-12)


def test_without_failures_only_saves_take_time() -> None:
    found = simulate(RUN, 1e12, runs=1)
    (one,) = found.runs
    assert (one.failures, one.redone_seconds, one.down_seconds) == (0, 0, 0)
    assert one.useful_seconds + one.stalled_seconds == pytest.approx(MONTH)
    assert one.stalled_seconds == pytest.approx(2.0 * (MONTH // 502))
    assert useful_time(RUN, 1e12).exact == pytest.approx(500 / 502)
    assert one.steps == int(one.useful_seconds / 0.5)


def test_the_seconds_of_a_simulated_run_add_up_to_its_duration() -> None:
    for one in simulate(RUN, 20.0, 1e6, runs=5).runs:
        seconds = one.useful_seconds + one.redone_seconds + one.stalled_seconds + one.down_seconds
        assert seconds == pytest.approx(1e6)
        assert one.failures > 100


def test_the_same_seed_gives_the_same_runs() -> None:
    assert simulate(RUN, 100.0, runs=2, seed=3) == simulate(RUN, 100.0, runs=2, seed=3)
    assert simulate(RUN, 100.0, runs=2, seed=3) != simulate(RUN, 100.0, runs=2, seed=4)


def test_failures_add_up_over_nodes() -> None:
    assert mean_time_between_failures(RUN, 160.0) == 10 * 3600
    assert useful_time(RUN, 160.0, duration=100 * 3600).failures == 10


def test_a_downtime_without_end_leaves_nothing() -> None:
    assert useful_share(1.0, 1.0, 1e9, 1.0) == 0.0


def test_failures_that_are_noticed_at_once_cost_less() -> None:
    assert useful_time(RUN, 100.0, ending=Ending.RANK).exact > useful_time(RUN, 100.0).exact


def test_runs_that_are_given_up_are_counted() -> None:
    """Three starts in a row without a checkpoint, as the event log counts them."""
    assert _FRUITLESS_STARTS == STARTS_WITHOUT_PROGRESS
    expected = useful_time(RUN, 6.0).gives_up
    runs = simulate(RUN, 6.0, runs=40).runs
    # The formula takes every failure for that of a start; some come before the next one has begun.
    assert sum(run.gave_up for run in runs) / len(runs) == pytest.approx(expected, rel=0.5)
    assert useful_time(RUN, 6335.0).gives_up < 1e-6


def test_what_cannot_be_simulated_is_refused() -> None:
    with pytest.raises(ConfigError, match="hours between failures of a node: 0"):
        useful_time(RUN, 0.0)
    with pytest.raises(ConfigError, match="cannot be simulated"):
        simulate(RUN, runs=0)


def test_young_and_daly_by_hand() -> None:
    assert young(2.0, 10_000.0) == 200.0
    ratio = 2.0 / 20_000
    assert daly(2.0, 10_000.0) == pytest.approx(200 * (1 + math.sqrt(ratio) / 3 + ratio / 9) - 2)
    assert daly(300.0, 100.0) == 100.0


@pytest.mark.parametrize("hours", [20.0, 300.0, 6335.0])
def test_no_interval_is_better_than_dalys(hours: float) -> None:
    run = replace(RUN, save=SaveCost(2.0, 0.1))
    advice = best_interval(run, hours)
    for factor in (0.8, 0.95, 1.05, 1.25):
        other = replace(run, interval=round(factor * advice.daly.steps))
        assert useful_time(other, hours).exact < advice.daly.share
    assert advice.best == advice.daly
    assert not advice.write_binds
    assert advice.own.share == useful_time(run, hours).exact


def test_no_interval_is_shorter_than_a_write() -> None:
    advice = best_interval(SLOW, 20.0)
    assert advice.write_binds
    assert advice.best.steps == 1800 > advice.daly.steps
    assert advice.best.share > advice.daly.share
    with pytest.raises(ConfigError, match=r"save\.stall"):
        best_interval(replace(RUN, save=SaveCost(0.0, 1.0)))


def walked(run: RunTiming, seconds: float) -> tuple[int, float, float]:
    """Checkpoints, seconds of work, and seconds in saves of a stretch without failures, save by save."""
    clock, worked, stalled, counts = 0.0, 0.0, 0.0, 0.0
    moments: list[float] = []
    while clock < seconds:
        worked += min(run.work, seconds - clock)
        begin = clock + run.work
        after = max(begin, counts) + run.save.stall
        stalled += max(0.0, min(after, seconds) - begin)
        if after < seconds:
            counts = after + run.save.write
            moments.append(counts)
        clock = after
    return sum(moment <= seconds for moment in moments), worked, stalled


@pytest.mark.parametrize("run", [RUN, SLOW, replace(RUN, interval=1), replace(SLOW, interval=1)])
def test_a_stretch_without_failures_is_that_of_walking_through_its_saves(run: RunTiming) -> None:
    for number in range(200):
        seconds = 37.3 * number
        found = _stretch(run, seconds)
        published, worked, stalled = walked(run, seconds)
        assert found.published == published, seconds
        assert found.stalled == pytest.approx(stalled, abs=1e-6), seconds
        assert found.unpublished == pytest.approx(worked - published * run.work, abs=1e-6), seconds


def test_a_run_of_very_short_steps_is_simulated_as_quickly() -> None:
    """Its month has 10^11 saves, which nothing could walk through."""
    short = replace(RUN, step=1e-5, interval=1, save=SaveCost(1e-6, 1e-6))
    found, exact = simulate(short, 300.0, runs=20), useful_time(short, 300.0)
    assert found.share == pytest.approx(exact.exact, abs=0.01)
