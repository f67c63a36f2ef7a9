"""What a run has logged of its steps, and what the starts computed with that took them."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from pipeline.monitoring.event_reader import RecordedEvents
from pipeline.runs.event_log import Event, RunEvent

TAGS = {"loss": "train/loss", "gradient_norm": "train/gradient_norm", "learning_rate": "train/learning_rate"}
"""TensorBoard's tags of the values that a replay compares."""


@dataclass(frozen=True, slots=True)
class LoggedStep:
    """What TensorBoard has of a step, as float32; None for what it has not."""

    loss: float | None = None
    gradient_norm: float | None = None
    learning_rate: float | None = None


@dataclass(frozen=True, slots=True)
class RunStart:
    """What a start of a run computed its steps with."""

    first_step: int
    """Steps taken before it."""
    ranks: int
    computed_with: Mapping[str, str] | None
    """See `pipeline.runs.continuation.computed_with`; None where the log has it not."""


def logged_steps(recorded: RecordedEvents) -> dict[int, LoggedStep]:
    """The logged values by step, from 1."""
    values: dict[int, dict[str, float]] = {}
    for name, tag in TAGS.items():
        for point in recorded.scalars.get(tag, ()):
            values.setdefault(point.step, {})[name] = point.value
    return {step: LoggedStep(**found) for step, found in sorted(values.items())}


def run_starts(entries: Iterable[RunEvent]) -> list[RunStart]:
    """The starts that took the steps which count: a start from an earlier step undoes what was after it."""
    found: list[RunStart] = []
    for entry in entries:
        ranks, facts = entry.facts.get("ranks"), entry.facts.get("computed_with")
        if entry.event in (Event.START, Event.RESUME) and entry.step >= 0 and isinstance(ranks, int):
            found = [one for one in found if one.first_step < entry.step]
            found.append(RunStart(entry.step, ranks, facts if isinstance(facts, dict) else None))
    return found


def starts_of_steps(found: Sequence[RunStart], first: int, until: int) -> list[RunStart]:
    """Those of `run_starts` that took some of the steps after `first` and up to `until`."""
    ends = [*(one.first_step for one in found[1:]), until]
    return [one for one, end in zip(found, ends, strict=False) if one.first_step < until and end > first]


def why_not_equal(entries: Iterable[RunEvent], first: int, until: int, ranks: int, now: Mapping[str, str]) -> list[str]:
    """Why the steps after `first` up to `until` may have other bits than the logged ones; none if they must be equal.

    Args:
        entries: of the event log.
        first: steps taken before them.
        until: their last.
        ranks: that compute them now.
        now: `computed_with` of these.
    """
    taken_by = starts_of_steps(run_starts(entries), first, until)
    if not taken_by:
        return ["the run has recorded no start of these steps"]
    return list(dict.fromkeys(reason for one in taken_by for reason in differences(one, ranks, now)))


def differences(past: RunStart, ranks: int, now: Mapping[str, str]) -> list[str]:
    """Why steps that `past` has taken may have other bits if they are computed `now` on `ranks` ranks; none if not."""
    if past.computed_with is None:
        return ["the run did not record what it computed with"]
    before = {"ranks": str(past.ranks), **past.computed_with}
    current = {"ranks": str(ranks), **now}
    keys = [*current, *(key for key in before if key not in current)]
    found = [
        f"{key}: {before.get(key, 'not recorded')} then, {current.get(key, 'none')} now"
        for key in keys
        if before.get(key) != current.get(key)
    ]
    if before.get("deterministic") == current.get("deterministic") == "false":
        found.append("deterministic: false, with which GPUs add in another order each time")
    return found
