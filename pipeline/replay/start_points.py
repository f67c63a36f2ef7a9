"""From where a step can be recomputed: checkpoints and first weights of a run, and what roll-backs make of them."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from pipeline.checkpoints.listing import CheckpointedStage
from pipeline.checkpoints.manifest import RollBack, read_manifest, step_name
from pipeline.errors import ConfigError
from pipeline.runs.event_log import Event


@dataclass(frozen=True, slots=True)
class ReplayStart:
    """A state of a run that is known."""

    step: int
    """Steps taken before it."""
    location: str | None = None
    """Path or URL of the checkpoint that has it; None for the weights that the stage began with."""
    saved_at: int = 0
    """Steps taken when that was saved: fewer after a roll-back, which goes on with older weights."""

    @property
    def text(self) -> str:
        """What it is, for a person."""
        if self.location is None:
            return "the beginning of the stage"
        name = self.location.rpartition("/")[2]
        return name if self.saved_at == self.step else f"{name}, to which the run was rolled back at step {self.step:,}"


def possible_starts(
    before: int, checkpoints: Mapping[int, str], roll_backs: Iterable[RollBack] = ()
) -> list[ReplayStart]:
    """The states from which the step after `before` steps follows, nearest first.

    A roll-back replaces the weights after `at` steps by older ones: later steps follow from no checkpoint before it but
    the one that it returned to.

    Args:
        before: steps taken before the step that is recomputed.
        checkpoints: locations by the steps taken when they were saved.
        roll_backs: of the run.
    """
    last = max((one for one in roll_backs if one.at <= before), key=lambda one: one.at, default=None)
    floor = last.at if last else 0
    found = [ReplayStart(step, place, step) for step, place in checkpoints.items() if floor <= step <= before]
    if last is None:
        found += [] if 0 in checkpoints else [ReplayStart(0)]
    elif last.at not in checkpoints and last.to in checkpoints:
        found.append(ReplayStart(last.at, checkpoints[last.to], last.to))
    return sorted(found, key=lambda one: -one.step)


def known_starts(stage: CheckpointedStage, before: int) -> list[ReplayStart]:
    """`possible_starts` of a stage in its run folder and stores.

    Raises:
        ConfigError: a record of the run is damaged; or the step follows from a roll-back, and the checkpoint that it
            returned to and all later ones are gone.
        StorageDown, StorageRefused: a remote store that cannot be read.
    """
    checkpoints = published(stage)
    roll_backs = recorded_roll_backs(stage, checkpoints)
    found = possible_starts(before, checkpoints, roll_backs)
    if not found:
        raise ConfigError(
            f"{stage.folder.path}: step {before + 1:,} follows from a roll-back, and neither the checkpoint that it "
            "returned to nor a later one from before this step is left; replay a step from before the roll-back"
        )
    return found


def roll_backs_after(stage: CheckpointedStage, first: int, until: int) -> list[ReplayStart]:
    """The states with which the run went on after roll-backs between `first` and `until` steps.

    Raises:
        ConfigError: the checkpoint that one of them returned to is gone; or as for `known_starts`.
        StorageDown, StorageRefused: a remote store that cannot be read.
    """
    checkpoints, found = published(stage), list[ReplayStart]()
    for back in sorted(recorded_roll_backs(stage, checkpoints), key=lambda back: back.at):
        if not first < back.at < until:
            continue
        if back.to not in checkpoints:
            raise ConfigError(
                f"{stage.folder.path}: step {back.at + 1:,} follows from a roll-back to {step_name(back.to)}, which is "
                f"gone; replay up to step {back.at:,}, or steps after a later checkpoint"
            )
        found.append(ReplayStart(back.at, checkpoints[back.to], back.to))
    return found


def published(stage: CheckpointedStage) -> dict[int, str]:
    """The locations of its published checkpoints, by step."""
    found: dict[int, str] = {}
    for store in stage.stores:
        for step in store.contents().steps:
            found.setdefault(step, store.at(step))
    return found


def recorded_roll_backs(stage: CheckpointedStage, checkpoints: Mapping[int, str]) -> set[RollBack]:
    """The roll-backs of a run, as its event log and its newest readable manifest have them."""
    found = set()
    for event in stage.folder.events.of(Event.ROLL_BACK):
        to = event.facts.get("to")
        if isinstance(to, int) and 0 <= to <= event.step:
            found.add(RollBack(to, event.step))
    for step in sorted(checkpoints, reverse=True):
        try:
            return found | set(read_manifest(checkpoints[step], stage.stores[0].storage).facts.non_finite.roll_backs)
        except (ConfigError, FileNotFoundError):
            continue
    return found
