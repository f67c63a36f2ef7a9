"""The event log: what is read back, and when a stage that never gets on is no longer started."""

from pathlib import Path

import pytest

from pipeline.errors import RunFailed
from pipeline.event_log import EventLog


@pytest.fixture
def events(tmp_path: Path) -> EventLog:
    return EventLog(tmp_path / "events.jsonl")


def test_three_starts_without_progress_are_followed_by_a_refusal_and_then_by_three_more(events: EventLog) -> None:
    for _ in range(2):
        for _ in range(3):
            events.begin(2)
            events.record("start", step=0)
        with pytest.raises(RunFailed, match=r"3 starts in a row ended without a new checkpoint.*tries 3 more times"):
            events.begin(2)
    assert [entry["event"] for entry in events.entries()].count("begin") == 6


def test_stops_that_save_nothing_are_no_progress(events: EventLog) -> None:
    for _ in range(3):
        events.begin(2)
        events.record("stop", reason="the time limit", step=3, checkpoint=None)
    with pytest.raises(RunFailed, match=r"3 starts in a row"):
        events.begin(2)


@pytest.mark.parametrize("event", ["save", "finish"])
def test_a_save_and_an_end_are_progress(events: EventLog, event: str) -> None:
    for _ in range(3):
        events.begin(2)
        events.begin(2)
        events.record(event, step=3)
        events.record("evaluation", step=3)


def test_a_line_cut_short_is_passed_over(events: EventLog) -> None:
    events.record("start", step=0)
    events.path.write_bytes(events.path.read_bytes() + b'{"time": "2026-')
    events.path.write_bytes(events.path.read_bytes() + b"\n\xff\n")
    events.record("save", step=5)
    assert [entry["event"] for entry in events.entries()] == ["start", "save"]


def test_evaluations_are_found_by_step(events: EventLog) -> None:
    assert not events.evaluated(7)
    events.record("evaluation", step=7, top1=0.5)
    assert events.evaluated(7)
    assert not events.evaluated(8)


def test_an_evaluation_does_not_stand_when_the_run_went_back_before_it(events: EventLog) -> None:
    events.record("start", step=0)
    events.record("evaluation", step=6, top1=0.5)
    events.record("resume", step=6)
    assert events.evaluated(6)
    events.record("resume", step=3)
    assert not events.evaluated(6)
    events.record("evaluation", step=6, top1=0.5)
    assert events.evaluated(6)


def test_a_diary_that_cannot_be_written_costs_the_entry_and_not_the_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    EventLog(Path("/dev/full")).record("save", step=5)
    assert "No space left on device" in caplog.text
    assert "'step': 5" in caplog.text
