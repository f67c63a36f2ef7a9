"""The event log: what is read back, and when a stage that makes no progress is no longer started."""

import json
import time
from pathlib import Path

import pytest

from pipeline.errors import RunFailed
from pipeline.runs.event_log import Event, EventLog


@pytest.fixture
def events(tmp_path: Path) -> EventLog:
    return EventLog(tmp_path / "events.jsonl")


def test_three_starts_without_progress_are_followed_by_a_refusal_and_then_by_three_more(events: EventLog) -> None:
    for _ in range(2):
        for _ in range(3):
            events.begin(2)
            events.record(Event.START, step=0)
        with pytest.raises(RunFailed, match=r"3 starts in a row ended without a new checkpoint.*makes 3 more attempts"):
            events.begin(2)
    assert len(events.of(Event.BEGIN)) == 6


@pytest.mark.parametrize(
    ("reason", "checkpoint"),
    [
        ("the time limit", "step-00000003"),  # during an evaluation, when the save is an old one
        ("SIGUSR1", "step-00000003"),
        ("SIGUSR2", "step-00000003"),
        ("SIGTERM", None),
    ],
)
def test_starts_that_a_time_limit_or_a_failed_save_ended_are_counted(
    events: EventLog, reason: str, checkpoint: str | None
) -> None:
    for _ in range(3):
        events.begin(2)
        events.record(Event.STOP, reason=reason, step=3, checkpoint=checkpoint)
    with pytest.raises(RunFailed, match=r"3 starts in a row"):
        events.begin(2)


def test_starts_that_were_ended_on_request_are_not_counted(events: EventLog) -> None:
    """A preempted evaluation has no checkpoint to show for it."""
    for reason in ("SIGTERM", "SIGHUP", "SIGINT", "SIGTERM"):
        events.begin(2)
        events.record(Event.STOP, reason=reason)
    for _ in range(4):
        events.begin(2)
        events.record(Event.STOP, reason="SIGTERM", step=3, checkpoint="step-00000003")
    for _ in range(3):
        events.begin(2)
    with pytest.raises(RunFailed, match=r"3 starts in a row"):
        events.begin(2)


@pytest.mark.parametrize("event", [Event.SAVE, Event.FINISH])
def test_a_save_and_the_end_are_progress(events: EventLog, event: Event) -> None:
    for _ in range(3):
        events.begin(2)
        events.begin(2)
        events.record(event, step=3)
        events.record(Event.EVALUATION, step=3)


def test_lines_that_are_no_entries_are_passed_over_with_a_warning(
    events: EventLog, caplog: pytest.LogCaptureFixture
) -> None:
    events.record(Event.START, step=0)
    with open(events.path, "ab") as file:
        file.write(
            b'{"time": "2026-\n\xff\n[1]\n3\n{}\n\n{"time": 7, "event": "save"}\n{"time": "noon", "event": "save"}\n'
        )
        file.write(b'{"time": "2026-11-22T13:12:39+0000", "event": "unheard-of"}\n{"event": "save"}\n')
    events.record(Event.SAVE, step=5)
    assert [entry.event for entry in events.entries()] == [Event.START, Event.SAVE]
    assert f"{events.path}: 9 lines (2, 3, 4, 5, 6, ...) are cut short or no entry, and skipped" in caplog.text


def test_an_entry_after_one_that_a_full_disk_has_cut_is_not_lost(
    events: EventLog, caplog: pytest.LogCaptureFixture
) -> None:
    events.record(Event.START, step=0)
    events.record(Event.SAVE, step=5)
    with open(events.path, "rb+") as file:
        file.truncate(events.path.stat().st_size - 7)
    events.record(Event.SAVE, step=10)
    assert [(entry.event, entry.step) for entry in events.entries()] == [(Event.START, 0), (Event.SAVE, 10)]
    assert events.entries()
    assert caplog.text.count(f"{events.path}: line 2 is cut short or no entry, and skipped") == 1


def test_evaluations_are_found_by_step(events: EventLog) -> None:
    assert not events.evaluated(7)
    events.record(Event.EVALUATION, step=7, top1=0.5)
    assert events.evaluated(7)
    assert not events.evaluated(8)


def test_an_evaluation_no_longer_counts_when_the_run_resumed_before_it(events: EventLog) -> None:
    events.record(Event.START, step=0)
    events.record(Event.EVALUATION, step=6, top1=0.5)
    events.record(Event.RESUME, step=6)
    assert events.evaluated(6)
    events.record(Event.RESUME, step=3)
    assert not events.evaluated(6)
    events.record(Event.EVALUATION, step=6, top1=0.5)
    assert events.evaluated(6)


def test_if_the_log_cannot_be_written_the_entry_is_lost_and_the_run_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    EventLog(Path("/dev/full")).record(Event.SAVE, step=5)
    assert "No space left on device" in caplog.text
    assert "'step': 5" in caplog.text


def test_an_entry_has_time_event_and_facts(events: EventLog) -> None:
    before = time.time()
    events.record(Event.EVALUATION, step=3, top1=0.5)
    events.record(Event.STOP, reason="SIGTERM")
    evaluation, stop = events.entries()
    assert (evaluation.step, evaluation.top1, evaluation.facts) == (3, 0.5, {"step": 3, "top1": 0.5})
    assert before - 1 <= evaluation.seconds <= time.time()
    assert (stop.step, stop.top1, stop.facts["reason"]) == (-1, None, "SIGTERM")
    assert json.loads(events.path.read_text().splitlines()[0]).keys() == {"time", "event", "step", "top1"}


def test_facts_of_another_type_are_no_facts(events: EventLog) -> None:
    events.path.write_text('{"time": "2026-11-22T13:12:39+0000", "event": "evaluation", "step": "x", "top1": "y"}\n')
    (entry,) = events.entries()
    assert (entry.step, entry.top1) == (-1, None)
