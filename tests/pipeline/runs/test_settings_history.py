"""The history of a stage's settings in its run folder, and which settings it may have other values of."""

from typing import Any

import pytest

from data.files.json_records import to_record
from pipeline.recipe.schema import TrainStage
from pipeline.recipe.section import changeable_settings
from pipeline.runs.fixed_settings import EXTENDABLE, FIXED, why_fixed
from pipeline.runs.settings_history import SettingsChange, SettingsHistory, before, settings_as_of
from tests.support.recipes import settings_of


def is_below(key: str, names: Any) -> bool:
    return any(key == name or key.startswith(f"{name}.") for name in names)


def test_every_setting_may_change_at_any_start_or_by_extending_or_has_a_reason_why_not() -> None:
    changeable = changeable_settings(TrainStage)
    settings = {key for key in settings_of(TrainStage) if not is_below(key, changeable)}
    assert {key for key in settings if not is_below(key, EXTENDABLE) and not is_below(key, FIXED)} == set()
    assert {name for name in EXTENDABLE if not any(is_below(key, {name}) for key in settings)} == set()
    assert why_fixed("model.drop_path_rate") is None
    assert (
        why_fixed("model.name") == "model: its weights would not fit another architecture; add a stage with start_from"
    )
    assert why_fixed("new_setting") == "new_setting: it is not known to be one that a stage under way can do without"


def test_the_past_has_its_own_settings_apart_from_what_any_start_may_change() -> None:
    past = {"steps": 4, "data": {"workers": 1, "flip": True}, "augment": None, "log": {"every": 1}}
    now = {"steps": 9, "data": {"workers": 8, "flip": False, "new": 1}, "augment": {"layers": 2}, "log": {"every": 7}}
    assert settings_as_of(past, now, lambda key: key in ("log", "data.workers")) == {
        "steps": 4, "data": {"workers": 8, "flip": True}, "augment": None, "log": {"every": 7},
    }  # fmt: skip


def test_a_run_that_stands_before_a_change_does_not_have_it_behind_it() -> None:
    changes = [SettingsChange(step, "2026", (), {}) for step in (4, 8)]
    assert [len(before(changes, step)) for step in (3, 4, 5, 8, 9)] == [0, 0, 1, 1, 2]


@pytest.mark.parametrize(
    ("version", "steps", "message"),
    [
        (2, [4], "version 2 is not 1: another version of this program wrote it"),
        (1, [8, 4], r"entries: their steps must ascend, and are \[8, 4\]"),
        (1, [0], "step: must be at least 1, not 0"),
    ],
)
def test_a_history_that_cannot_be_is_refused(version: int, steps: list[int], message: str) -> None:
    entries = [{"step": step, "time": "2026", "changed": [], "settings": {}} for step in steps]
    with pytest.raises(ValueError, match=message):
        to_record(SettingsHistory, {"version": version, "entries": entries})
