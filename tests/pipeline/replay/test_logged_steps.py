"""What the starts of a run computed with, and which of them took which steps."""

from collections.abc import Mapping
from typing import Any

from pipeline.monitoring.event_reader import CurvePoint, RecordedEvents
from pipeline.replay.logged_steps import Computation, LoggedStep, computations, differences, logged_steps, of_steps
from pipeline.runs.event_log import Event, RunEvent

CPU = {"zero_stage": "1", "device": "CPU"}
GPU = {"zero_stage": "1", "device": "H200"}


def entry(event: Event, step: int, **facts: Any) -> RunEvent:
    return RunEvent("2026-01-01T00:00:00+0000", event, {"step": step, **facts})


def started(step: int, ranks: int, now: Mapping[str, str] | None = CPU) -> RunEvent:
    return entry(Event.RESUME if step else Event.START, step, ranks=ranks, computed_with=now)


def test_a_start_from_an_earlier_step_undoes_what_was_after_it() -> None:
    entries = [started(0, 2), entry(Event.SAVE, 5), started(5, 4), started(9, 8), started(5, 1, GPU), started(12, 2)]
    assert computations(entries) == [Computation(0, 2, CPU), Computation(5, 1, GPU), Computation(12, 2, CPU)]


def test_a_start_without_what_it_computed_with_is_one_of_an_earlier_version() -> None:
    assert computations([entry(Event.START, 0, ranks=2), entry(Event.START, 3)]) == [Computation(0, 2, None)]


def test_steps_are_those_of_the_starts_between_their_ends() -> None:
    found = [Computation(0, 2, CPU), Computation(5, 4, CPU), Computation(9, 8, CPU)]
    assert of_steps(found, 0, 5) == found[:1]
    assert of_steps(found, 4, 6) == found[:2]
    assert of_steps(found, 5, 9) == found[1:2]
    assert of_steps(found, 5, 10) == found[1:]
    assert of_steps(found, 20, 30) == found[2:]
    assert of_steps([], 0, 5) == []


def test_differences_are_named_with_both_sides() -> None:
    assert differences(Computation(0, 2, CPU), 2, CPU) == []
    assert differences(Computation(0, 2, CPU), 1, GPU) == ["ranks: 2 then, 1 now", "device: CPU then, H200 now"]
    assert differences(Computation(0, 1, CPU), 1, {"device": "CPU", "torch": "2.13"}) == [
        "torch: not recorded then, 2.13 now",
        "zero_stage: 1 then, none now",
    ]
    assert differences(Computation(0, 2, None), 2, CPU) == ["the run did not record what it computed with"]


def test_logged_values_are_by_step_and_what_is_missing_is_none() -> None:
    points = {
        "train/loss": [CurvePoint(2, 0.5, 0.0), CurvePoint(1, 0.25, 0.0)],
        "train/learning_rate": [CurvePoint(2, 1e-3, 0.0)],
        "other": [CurvePoint(3, 1.0, 0.0)],
    }
    expected = {1: LoggedStep(loss=0.25), 2: LoggedStep(loss=0.5, learning_rate=1e-3)}
    assert logged_steps(RecordedEvents(points)) == expected
