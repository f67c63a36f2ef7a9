"""A training stage as its run folder records it: what a replay recomputes, on whatever machine it runs."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from pydantic import ValidationError

from data.index import check_shards
from data.remote.storage import Storage
from data.settings_diff import changed_settings
from pipeline.checkpoints.listing import CheckpointedStage, checkpointed_stage
from pipeline.errors import ConfigError
from pipeline.initial_weights.content import content_digest
from pipeline.plan import TrainPlan, open_stage_dataset, train_plan
from pipeline.recipe.loader import overridden_stage
from pipeline.recipe.schema import Recipe, TrainStage
from pipeline.runs.event_log import Event
from pipeline.runs.extension import NO_AVERAGE
from pipeline.runs.fixed_settings import why_fixed
from pipeline.runs.frozen_stage import FrozenStage
from pipeline.runs.run_folder import RunFolder, absolute_location
from pipeline.runs.run_identity import identity_of
from pipeline.runs.settings_history import NO_CHANGES, VERSION, SettingsChange, SettingsHistory, before, settings_as_of
from pipeline.runs.stage_settings import index_digests, may_change


@dataclass(frozen=True)
class RecordedStage:
    """A training stage that has run, or runs."""

    folder: RunFolder
    frozen: FrozenStage
    stage: TrainStage
    """Its settings of now, with those that this replay has of its own."""
    changed: tuple[str, ...]
    """The latter, as `key: recorded -> own`: settings that decide where and how fast a step is computed."""
    branch: TrainStage | None
    """Settings that make another run of it; None if it is recomputed as it was."""
    branched: tuple[str, ...]
    """What is different in them, as `key: recorded -> other`."""
    checkpoints: CheckpointedStage

    @property
    def name(self) -> str:
        return self.frozen.stage

    @property
    def history(self) -> SettingsHistory:
        """Its settings before those of now."""
        return self.frozen.changes or NO_CHANGES

    @property
    def run_id(self) -> str | None:
        identity = identity_of(self.folder.path)
        return identity.id if identity else None

    def recipe(self, stage: TrainStage | None = None) -> Recipe:
        """A recipe of this stage alone, by default with its settings of now, without the one that it starts from."""
        return Recipe.model_construct(
            name=self.folder.path.parent.name,
            runs=str(self.folder.path.parent.parent),
            seed=self.frozen.seed,
            shards=None,
            stages={self.name: stage or self.stage},
        )

    def plan(self, stage: TrainStage | None = None, history: SettingsHistory | None = None) -> TrainPlan:
        """The plan of the stage, or of one with other settings and another history on the same data.

        Raises:
            ConfigError: the training shards are not those of the run, or the settings contradict each other.
            DataError, StorageDown: an index that cannot be read.
        """
        where, stage = f"stage {self.name}: ", stage or self.stage
        train, validation = (open_stage_dataset(stage, part, where) for part in ("train", "validation"))
        plan = train_plan(
            self.recipe(stage), self.name, train, validation, self.history if history is None else history
        )
        found, recorded = index_digests(plan)["train"], self.frozen.index_digests.get("train")
        if found != recorded:
            raise ConfigError(
                f"{where}data.train: {stage.data.train} does not hold the shards that the run was trained on (digest "
                f"{found[:16]} instead of {str(recorded)[:16]}); give their place here as data.train=FOLDER"
            )
        return plan

    def plans(self, first: int, until: int) -> tuple[TrainPlan, TrainPlan | None, SettingsHistory]:
        """The plan of the stage, that of its branch, which leaves it after `first` steps, and the branch's history.

        Raises:
            ConfigError: the stage, or its branch, has no step after `first` or ends before `until`; or as for `plan`.
            DataError, StorageDown: as for `plan`.
        """
        plan, history = self.plan(), self.branch_history(first)
        branch = None if self.branch is None else self.plan(self.branch, history)
        wanted = f"--step {first + 1:,}" + (f" --until {until:,}" if until > first + 1 else "")
        if first >= plan.steps:
            raise ConfigError(f"{wanted}: stage {self.name} has the steps 1 to {plan.steps:,}")
        steps = (branch or plan).steps
        if until > steps:
            raise ConfigError(f"{wanted}: {'the branch of ' if branch else ''}stage {self.name} ends at step {steps:,}")
        return plan, branch, history

    def branch_history(self, step: int) -> SettingsHistory:
        """The settings of the branch that leaves the run after `step` steps, before those of the branch."""
        changes = [*before(self.history.entries, step)]
        if step > 0:  # otherwise nothing was taken with other settings
            when = time.strftime("%Y-%m-%dT%H:%M:%S%z")
            changes.append(SettingsChange(step, when, self.branched, _in_force(self.frozen, step)))
        return SettingsHistory(VERSION, tuple(changes))

    def alone(self) -> "RecordedStage":
        """The same with a branch that names the weights that it began with by their place: the stage that has trained
        them is not in its run.

        Raises:
            ConfigError, StorageDown, StorageRefused: as for `starting_weights`.
        """
        if self.branch is None or self.branch.start_stage is None:
            return self
        return replace(self, branch=self.branch.model_copy(update={"start_from": self.starting_weights()}))

    def starting_weights(self) -> str | None:
        """Path or URL of the weights that the stage began with; None if it began with initial ones.

        Raises:
            ConfigError: they are not known, no longer there, or no longer those of the first start.
            StorageDown, StorageRefused: a remote store that cannot be read.
        """
        if self.stage.start_from is None:
            return None
        begun = self.folder.events.of(Event.WEIGHTS)
        recorded = begun[-1].facts.get("checkpoint") if begun else None
        location = self.stage.start_source or (
            absolute_location(recorded, self.folder) if isinstance(recorded, str) else ""
        )
        if not location:
            raise ConfigError(
                f"{self.folder.path}: the event log does not say which checkpoint of {self.stage.start_from} the stage "
                "began with, so its first steps cannot be recomputed"
            )
        found = content_digest(location, Storage(**self.stage.data.storage.model_dump()))
        if self.frozen.start_digest is not None and found != self.frozen.start_digest:
            raise ConfigError(
                f"{location}: not the weights that the stage began with, they were replaced since; restore them from a "
                "copy to recompute its first steps"
            )
        return location


def open_recorded_stage(
    folder: RunFolder, overrides: Sequence[str] = (), without: Sequence[str] = (), *, step: int = 0
) -> RecordedStage:
    """The training stage in `folder`.

    Args:
        folder: its run folder.
        overrides: `KEY=VALUE`. Settings that any start may change hold for all steps; others make a branch.
        without: samples that the branch leaves out, as `shard/key`.
        step: steps taken before the branch, whose settings are those of that step otherwise.

    Raises:
        ConfigError: no training stage has started there, its record is damaged, or a setting is wrong or cannot be
            another one while the stage is under way.
    """
    for override in overrides:
        key = override.partition("=")[0].strip()
        if key.endswith(("resources.ranks", "resources.nodes")):
            raise ConfigError(f"{override}: a replay has all its ranks on this machine; give their number with --ranks")
    checkpoints, frozen = checkpointed_stage(folder), folder.frozen()
    if checkpoints is None or frozen is None:
        raise ConfigError(f"{folder.path}: no training stage has started here; name the run folder of one")
    try:
        recorded = TrainStage.model_validate(frozen.settings)
        there = settings_as_of(_in_force(frozen, step), frozen.settings, may_change)
        wanted = overridden_stage(frozen.stage, there, overrides)
    except ValidationError as error:
        raise folder.damaged_recipe(error) from None
    if without:
        excluded = tuple(dict.fromkeys([*wanted.data.excluded_samples, *without]))
        data = wanted.data.model_copy(update={"excluded_samples": excluded})
        wanted = wanted.model_copy(update={"data": data})
    old, new = (one.model_dump(mode="json") for one in (recorded, wanted))
    stage = TrainStage.model_validate(settings_as_of(old, new, may_change))
    branched = changed_settings(there, new, may_change)
    for change in branched:
        if reason := why_fixed(change.partition(":")[0]):
            why = reason.partition(": ")[2]
            raise ConfigError(f"{change}: cannot be another one while the stage is under way, nor in a branch: {why}")
    if step and (recorded.ema_decay is None) != (wanted.ema_decay is None):
        raise ConfigError(NO_AVERAGE)
    return RecordedStage(
        folder,
        frozen,
        stage,
        tuple(changed_settings(old, stage.model_dump(mode="json"))),
        wanted if branched else None,
        tuple(branched),
        checkpoints,
    )


def _in_force(frozen: FrozenStage, step: int) -> Mapping[str, Any]:
    """The settings with which a run that stands at `step` took its last step."""
    past = frozen.changes.entries if frozen.changes else ()
    kept = before(past, step)
    return past[len(kept)].settings if len(kept) < len(past) else frozen.settings


def check_training_shards(plan: TrainPlan) -> None:
    """Check that every training shard is there.

    Raises:
        DataError: one is missing or truncated.
        StorageDown: remote shards that cannot be reached at present.
    """
    check_shards(plan.train.index, plan.train.storage)
