"""Settings that were changed on purpose while a stage was under way: which were in force before which step.

`recipe.yaml` of a run folder has the settings of now and, under `changes`, those of before. A run is then a function of
its recipes and its step: a start from an older checkpoint follows the same history.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from data.files.json_records import check_at_least

VERSION = 1
KEY = "changes"
"""Of the history in `recipe.yaml`."""


@dataclass(frozen=True, slots=True)
class SettingsChange:
    """One change, made at a checkpoint."""

    step: int
    """Steps taken before it: step `step`, from 0, is the first with other settings."""
    time: str
    """When it was made, in ISO 8601."""
    changed: tuple[str, ...]
    """`key: old -> new` for each setting that is another one."""
    settings: Mapping[str, Any]
    """Those of the stage before it, all of them."""

    def __post_init__(self) -> None:
        check_at_least(1, step=self.step)


@dataclass(frozen=True, slots=True)
class SettingsHistory:
    """The changes of a stage, oldest first."""

    version: int
    entries: tuple[SettingsChange, ...]

    def __post_init__(self) -> None:
        """
        Raises:
            ValueError: another program's version, or steps that do not ascend.
        """
        if self.version != VERSION:
            raise ValueError(f"version {self.version} is not {VERSION}: another version of this program wrote it")
        steps = [entry.step for entry in self.entries]
        if steps != sorted(set(steps)):
            raise ValueError(f"entries: their steps must ascend, and are {steps}")


NO_CHANGES = SettingsHistory(VERSION, ())


def settings_as_of(
    past: Mapping[str, Any], now: Mapping[str, Any], may_change: Callable[[str], bool], prefix: str = ""
) -> dict[str, Any]:
    """The settings to compute a step of the past with: `past`, apart from what any start may set anew.

    Args:
        past: nested settings of a stage, as they were.
        now: those of this start.
        may_change: whether the setting, or section, with this dotted key may change between two starts.
    """
    found: dict[str, Any] = {}
    for key in [*now, *(key for key in past if key not in now)]:
        dotted = f"{prefix}{key}"
        if may_change(dotted):
            if key in now:
                found[key] = now[key]
        elif isinstance(past.get(key), Mapping) and isinstance(now.get(key), Mapping):
            found[key] = settings_as_of(past[key], now[key], may_change, f"{dotted}.")
        elif key in past:
            found[key] = past[key]
    return found


def before(history: Sequence[SettingsChange], step: int) -> tuple[SettingsChange, ...]:
    """The changes that a run which stands at `step` has behind it; later ones led to weights that it no longer has."""
    return tuple(change for change in history if change.step < step)


def is_history(key: str) -> bool:
    """Whether a dotted key of `recipe.yaml` is of the history, and no setting of now."""
    return key == KEY or key.startswith(f"{KEY}.")
