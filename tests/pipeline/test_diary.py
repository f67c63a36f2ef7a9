"""The diary: what is read back, and when a stage that never gets on is no longer started."""

from pathlib import Path

import pytest

from pipeline.diary import Diary
from pipeline.errors import RunFailed


@pytest.fixture
def diary(tmp_path: Path) -> Diary:
    return Diary(tmp_path / "diary.jsonl")


def test_three_starts_without_progress_are_followed_by_a_refusal_and_then_by_three_more(diary: Diary) -> None:
    for _ in range(2):
        for _ in range(3):
            diary.begin(2)
            diary.note("start", step=0)
        with pytest.raises(RunFailed, match=r"3 starts in a row ended without a new checkpoint.*tries 3 more times"):
            diary.begin(2)
    assert [entry["event"] for entry in diary.entries()].count("begin") == 6


def test_stops_that_save_nothing_are_no_progress(diary: Diary) -> None:
    for _ in range(3):
        diary.begin(2)
        diary.note("stop", reason="the time limit", step=3, checkpoint=None)
    with pytest.raises(RunFailed, match=r"3 starts in a row"):
        diary.begin(2)


@pytest.mark.parametrize("event", ["save", "finish"])
def test_a_save_and_an_end_are_progress(diary: Diary, event: str) -> None:
    for _ in range(3):
        diary.begin(2)
        diary.begin(2)
        diary.note(event, step=3)
        diary.note("evaluation", step=3)


def test_a_line_cut_short_is_passed_over(diary: Diary) -> None:
    diary.note("start", step=0)
    diary.path.write_bytes(diary.path.read_bytes() + b'{"time": "2026-')
    diary.path.write_bytes(diary.path.read_bytes() + b"\n\xff\n")
    diary.note("save", step=5)
    assert [entry["event"] for entry in diary.entries()] == ["start", "save"]


def test_evaluations_are_found_by_step(diary: Diary) -> None:
    assert not diary.evaluated(7)
    diary.note("evaluation", step=7, top1=0.5)
    assert diary.evaluated(7)
    assert not diary.evaluated(8)


def test_an_evaluation_does_not_stand_when_the_run_went_back_before_it(diary: Diary) -> None:
    diary.note("start", step=0)
    diary.note("evaluation", step=6, top1=0.5)
    diary.note("resume", step=6)
    assert diary.evaluated(6)
    diary.note("resume", step=3)
    assert not diary.evaluated(6)
    diary.note("evaluation", step=6, top1=0.5)
    assert diary.evaluated(6)


def test_a_diary_that_cannot_be_written_costs_the_entry_and_not_the_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    Diary(Path("/dev/full")).note("save", step=5)
    assert "No space left on device" in caplog.text
    assert "'step': 5" in caplog.text
