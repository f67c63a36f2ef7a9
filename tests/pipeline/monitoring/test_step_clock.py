from typing import Any

import pytest
import torch

from pipeline.monitoring.step_clock import Interval, StepClock


def approx(value: float) -> Any:
    return pytest.approx(value)


class Time:
    """A clock that the test sets."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr("pipeline.monitoring.step_clock.time.perf_counter", lambda: self.now)


@pytest.fixture
def time(monkeypatch: pytest.MonkeyPatch) -> Time:
    return Time(monkeypatch)


def run_step(clock: StepClock, time: Time, waiting: float, computing: float, other: float) -> None:
    for _ in range(2):  # micro-batches
        with clock.waiting_for_data():
            time.now += waiting / 2
        with clock.computing():
            time.now += computing / 2
    time.now += other
    clock.step_done()


def test_a_step_is_divided_into_waiting_computing_and_the_rest(time: Time) -> None:
    clock = StepClock(torch.device("cpu"))
    assert clock.last_step_times() == (0.0, 0.0)
    run_step(clock, time, 1.0, 2.0, 4.0)
    assert clock.last_step_times() == (1.0, 2.0)
    with clock.waiting_for_data():
        time.now += 16.0
    # The step in progress is not included.
    assert clock.last_step_times() == (1.0, 2.0)


def test_each_rank_contributes_its_own_times(time: Time) -> None:
    clock = StepClock(torch.device("cpu"))
    run_step(clock, time, 1.0, 2.0, 4.0)
    assert clock.contribution(rank=1, world_size=3) == [0.0, 1.0, 0.0, 0.0, 2.0, 0.0]


def test_an_interval_has_the_percentiles_of_its_steps_and_then_a_new_one_begins(time: Time) -> None:
    clock = StepClock(torch.device("cpu"))
    assert clock.interval() is None
    for seconds in range(1, 101):
        run_step(clock, time, 0.0, 0.0, float(seconds))
    assert clock.interval() == Interval(100, 5050.0, 50.5, approx(90.1), approx(99.01))
    run_step(clock, time, 0.0, 0.0, 8.0)
    assert clock.interval() == Interval(1, 8.0, 8.0, 8.0, 8.0)
    assert clock.interval() is None


def test_paused_time_belongs_to_no_step(time: Time) -> None:
    clock = StepClock(torch.device("cpu"))
    with clock.paused():
        time.now += 1000.0
    run_step(clock, time, 0.0, 0.0, 2.0)
    run_step(clock, time, 0.0, 0.0, 4.0)
    assert clock.interval() == Interval(2, 6.0, 3.0, approx(3.8), approx(3.98))


def test_a_step_that_is_left_out_counts_towards_nothing(time: Time) -> None:
    clock = StepClock(torch.device("cpu"))
    run_step(clock, time, 1.0, 2.0, 4.0)
    clock.leave_out_step()
    run_step(clock, time, 1000.0, 1000.0, 1000.0)
    assert clock.last_step_times() == (0.0, 0.0)
    run_step(clock, time, 2.0, 1.0, 2.0)
    assert clock.last_step_times() == (2.0, 1.0)
    assert clock.interval() == Interval(2, 12.0, 6.0, approx(6.8), approx(6.98))
    clock.leave_out_step()
    run_step(clock, time, 1.0, 1.0, 1.0)
    assert clock.interval() is None


def test_on_a_gpu_the_forward_is_measured_by_events_read_when_they_are_over(
    time: Time, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There is no GPU here: a class stands in for the events, with 3 ms between any two."""
    synchronized = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            self.recorded = not enable_timing

        def record(self) -> None:
            self.recorded = True

        def synchronize(self) -> None:
            synchronized.append(self)

        def elapsed_time(self, end: "Event") -> float:
            assert self.recorded
            assert end in synchronized
            return 3.0

    monkeypatch.setattr("torch.cuda.Event", Event)
    clock = StepClock(torch.device("cuda", 0))
    run_step(clock, time, 1.0, 100.0, 0.0)
    assert not synchronized
    assert clock.last_step_times() == (1.0, approx(6e-3))
    assert clock.last_step_times() == (1.0, approx(6e-3))
    run_step(clock, time, 0.0, 0.0, 0.0)
    assert clock.last_step_times() == (0.0, approx(6e-3))
