"""Which checkpoints are kept, and why."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipeline.checkpoints.manifest import NonFiniteRecord, RollBack, step_name
from pipeline.checkpoints.resume import newest_intact
from pipeline.checkpoints.retention import not_returned_to, reasons_to_keep
from pipeline.recipe.intervals import CheckpointSettings
from pipeline.runs.event_log import Event
from pipeline.runs.run_folder import RunFolder
from tests.pipeline.checkpoints.small import ALONE, live, local, names, save, saver
from tests.support.records import checkpoint_facts

TOP1 = {10: 0.2, 20: 0.7, 30: 0.5, 40: 0.7, 45: 0.1}


@pytest.mark.parametrize(
    ("settings", "kept"),
    [
        ({"keep_last": 1}, {50: ["newest"]}),
        ({"keep_last": 2}, {50: ["newest"], 45: ["last 2"]}),
        ({"keep_last": 1, "keep_every": 20}, {50: ["newest"], 40: ["every 20"], 20: ["every 20"]}),
        ({"keep_last": 1, "keep_every": 50}, {50: ["newest", "every 50"]}),
        ({"keep_last": 1, "keep_best": 1}, {50: ["newest"], 40: ["best"]}),
        ({"keep_last": 1, "keep_best": 3}, {50: ["newest"], 40: ["best 3"], 30: ["best 3"], 20: ["best 3"]}),
        ({"keep_last": 9}, {50: ["newest"], **{step: ["last 9"] for step in (45, 40, 30, 20, 10)}}),
    ],
)
def test_the_last_the_multiples_and_the_best_are_kept(settings: dict[str, Any], kept: dict[int, list[str]]) -> None:
    reasons = reasons_to_keep([10, 20, 30, 40, 45, 50], CheckpointSettings(**settings), TOP1)
    assert list(reasons) == [50, 45, 40, 30, 20, 10]
    assert {step: why for step, why in reasons.items() if why} == kept


def test_those_that_no_roll_back_returns_to_are_not_among_the_last() -> None:
    """Of stops, and discarded by the roll-back of the newest: they must not displace the ones that it may return to."""
    facts = [replace(checkpoint_facts(step), for_stop=step in (15, 60)) for step in (10, 15, 20, 30, 40, 50, 60)]
    facts[-1] = replace(facts[-1], non_finite=NonFiniteRecord(roll_backs=(RollBack(to=20, at=50),)))
    aside = not_returned_to(facts)
    assert aside == {15, 30, 40, 60}
    reasons = reasons_to_keep([one.step for one in facts], CheckpointSettings(keep_last=2), {}, aside)
    assert {step: why for step, why in reasons.items() if why} == {60: ["newest"], 50: ["last 2"], 20: ["last 2"]}


def test_old_checkpoints_are_removed_after_each_save(tmp_path: Path) -> None:
    with saver(tmp_path, keep_last=2, keep_every=20, keep_best=1) as one:
        for step in (5, 10, 15, 20, 25, 30, 35):
            one.save(live(step))
            RunFolder(tmp_path).events.record(Event.EVALUATION, step=step, top1=1 / step)
        assert one.finish()
    assert names(tmp_path / "checkpoints") == [step_name(step) for step in (5, 20, 30, 35)]


def test_none_is_removed_before_a_newer_one_is_published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 1, keep_last=1)
    seen: list[list[str]] = []
    store = local(tmp_path)
    real = type(store).remove

    def noted(self: Any, step: int, *arguments: Any) -> None:
        seen.append([name for name in names(tmp_path / "checkpoints") if name[0] != "."])
        real(self, step, *arguments)

    monkeypatch.setattr(type(store), "remove", noted)
    save(tmp_path, 2, keep_last=1)
    assert seen == [["step-00000001", "step-00000002"]]


@pytest.mark.parametrize("file", ["buffers.safetensors", "manifest.json"])
def test_damaged_checkpoints_do_not_count_as_kept(tmp_path: Path, file: str) -> None:
    """They would displace the only intact ones."""
    save(tmp_path, 10, 20, 30, keep_last=9)
    for step in (20, 30):
        (tmp_path / "checkpoints" / step_name(step) / file).unlink()
    save(tmp_path, 40, keep_last=2)
    assert names(tmp_path / "checkpoints") == [step_name(step) for step in (10, 20, 30, 40)]
    save(tmp_path, 50, keep_last=2)
    assert names(tmp_path / "checkpoints") == [step_name(step) for step in (20, 30, 40, 50)]


def test_checkpoints_set_aside_do_not_count_either(tmp_path: Path) -> None:
    save(tmp_path, 10, 20, 30, keep_last=9)
    for step in (20, 30):
        (tmp_path / "checkpoints" / step_name(step) / "buffers.safetensors").unlink()
    checkpoint, _ = newest_intact([local(tmp_path)], ALONE)
    assert checkpoint is not None
    assert checkpoint.step == 10
    save(tmp_path, 15, keep_last=2)
    assert names(tmp_path / "checkpoints") == [
        "damaged-step-00000020", "damaged-step-00000030", "step-00000010", "step-00000015",
    ]  # fmt: skip


def test_a_removal_that_fails_is_recorded_and_the_new_checkpoint_remains(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server that permits writing but not removing, which the one here cannot be configured to do."""
    save(tmp_path, 1, keep_last=1)

    def refused(*arguments: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(type(local(tmp_path)), "remove", refused)
    save(tmp_path, 2, keep_last=1)
    events = RunFolder(tmp_path).events.of(Event.REMOVAL_FAILED)
    assert [entry.facts["reason"] for entry in events] == ["[Errno 13] Permission denied"]
    assert names(tmp_path / "checkpoints") == ["step-00000001", "step-00000002"]


def test_an_event_log_whose_last_line_was_cut_short_is_read(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    assert run.events.entries() == []
    run.events.record(Event.EVALUATION, step=3, top1=0.5)
    with open(tmp_path / "events.jsonl", "a") as events:
        events.write('{"time": "2026-')
    assert [entry.step for entry in run.events.entries()] == [3]


def test_a_removal_that_is_killed_leaves_nothing_that_looks_like_a_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in (1, 2):
        save(tmp_path, step, keep_last=9)

    def killed(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(type(local(tmp_path)), "empty", killed)
        with pytest.raises(KeyboardInterrupt):
            local(tmp_path).remove(1)
    assert [name for name in names(tmp_path / "checkpoints") if name[0] != "."] == ["step-00000002"]
    save(tmp_path, 3, keep_last=9)
    assert names(tmp_path / "checkpoints") == ["step-00000002", "step-00000003"]
