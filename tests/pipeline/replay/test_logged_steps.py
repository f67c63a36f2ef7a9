"""What the starts of a run computed with, and which of them took which steps."""

from collections.abc import Mapping
from typing import Any

from pipeline.monitoring.event_reader import CurvePoint, RecordedEvents
from pipeline.replay.logged_steps import (
    LoggedStep,
    RunStart,
    differences,
    logged_steps,
    run_starts,
    starts_of_steps,
    why_not_equal,
)
from pipeline.runs.event_log import Event, RunEvent

CPU = {"zero_stage": "1", "device": "CPU"}
GPU = {"zero_stage": "1", "device": "H200"}


def entry(event: Event, step: int, **facts: Any) -> RunEvent:
    return RunEvent("2026-01-01T00:00:00+0000", event, {"step": step, **facts})


def started(step: int, ranks: int, now: Mapping[str, str] | None = CPU) -> RunEvent:
    return entry(Event.RESUME if step else Event.START, step, ranks=ranks, computed_with=now)


def test_a_start_from_an_earlier_step_undoes_what_was_after_it() -> None:
    entries = [started(0, 2), entry(Event.SAVE, 5), started(5, 4), started(9, 8), started(5, 1, GPU), started(12, 2)]
    assert run_starts(entries) == [RunStart(0, 2, CPU), RunStart(5, 1, GPU), RunStart(12, 2, CPU)]


def test_a_start_without_what_it_computed_with_is_one_of_an_earlier_version() -> None:
    assert run_starts([entry(Event.START, 0, ranks=2), entry(Event.START, 3)]) == [RunStart(0, 2, None)]


def test_steps_are_those_of_the_starts_between_their_ends() -> None:
    found = [RunStart(0, 2, CPU), RunStart(5, 4, CPU), RunStart(9, 8, CPU)]
    assert starts_of_steps(found, 0, 5) == found[:1]
    assert starts_of_steps(found, 4, 6) == found[:2]
    assert starts_of_steps(found, 5, 9) == found[1:2]
    assert starts_of_steps(found, 5, 10) == found[1:]
    assert starts_of_steps(found, 20, 30) == found[2:]
    assert starts_of_steps([], 0, 5) == []


def test_differences_are_named_with_both_sides() -> None:
    assert differences(RunStart(0, 2, CPU), 2, CPU) == []
    assert differences(RunStart(0, 2, CPU), 1, GPU) == ["ranks: 2 then, 1 now", "device: CPU then, H200 now"]
    assert differences(RunStart(0, 1, CPU), 1, {"device": "CPU", "torch": "2.13"}) == [
        "torch: not recorded then, 2.13 now",
        "zero_stage: 1 then, none now",
    ]
    assert differences(RunStart(0, 2, None), 2, CPU) == ["the run did not record what it computed with"]


def test_gpus_that_add_in_any_order_are_a_difference_even_if_nothing_has_changed() -> None:
    any_order = {**GPU, "deterministic": "false"}
    assert differences(RunStart(0, 2, any_order), 2, any_order) == [
        "deterministic: false, with which GPUs add in another order each time"
    ]
    in_order = {**GPU, "deterministic": "true"}
    assert differences(RunStart(0, 2, in_order), 2, in_order) == []
    assert differences(RunStart(0, 2, in_order), 2, any_order) == ["deterministic: true then, false now"]


def test_steps_of_several_starts_have_the_reasons_of_all_of_them_once() -> None:
    entries = [started(0, 2), started(5, 4), started(9, 4)]
    assert why_not_equal(entries, 0, 4, 2, CPU) == []
    assert why_not_equal(entries, 0, 12, 2, CPU) == ["ranks: 4 then, 2 now"]
    assert why_not_equal([], 0, 4, 2, CPU) == ["the run has recorded no start of these steps"]


def test_logged_values_are_by_step_and_what_is_missing_is_none() -> None:
    points = {
        "train/loss": [CurvePoint(2, 0.5, 0.0), CurvePoint(1, 0.25, 0.0)],
        "train/learning_rate": [CurvePoint(2, 1e-3, 0.0)],
        "other": [CurvePoint(3, 1.0, 0.0)],
    }
    expected = {1: LoggedStep(loss=0.25), 2: LoggedStep(loss=0.5, learning_rate=1e-3)}
    assert logged_steps(RecordedEvents(points)) == expected
