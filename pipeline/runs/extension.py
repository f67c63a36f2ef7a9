"""`--extend`: other settings for a training stage from its last checkpoint on. First all is checked, then recorded."""

import math
import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import yaml

from data.errors import raise_if_passing
from data.files.atomic_file import write_atomically
from data.files.json_records import to_json
from data.remote.web_address import without_secrets
from data.settings_diff import changed_settings
from pipeline.checkpoints.listing import list_checkpoints, stage_of_recipe
from pipeline.checkpoints.manifest import step_name
from pipeline.errors import ConfigError
from pipeline.plan import TrainPlan, open_stage_dataset, train_plan
from pipeline.recipe.schema import Recipe, TrainStage
from pipeline.runs.event_log import Event
from pipeline.runs.fixed_settings import why_fixed
from pipeline.runs.run_access import cannot_be_written
from pipeline.runs.run_folder import RunFolder, run_folder, start_digest
from pipeline.runs.settings_history import KEY, VERSION, SettingsChange, SettingsHistory, before
from pipeline.runs.stage_settings import may_change, stage_settings

NO_AVERAGE = "ema_decay: a moving average cannot begin or end under way; add a stage with start_from"


@dataclass(frozen=True, slots=True)
class Extension:
    """Other settings for a stage from a step on, which have been checked and not been recorded."""

    recipe: Recipe
    folder: RunFolder
    plan: TrainPlan
    """Of the stage with its history, this change included."""
    history: SettingsHistory
    content: dict[str, Any]
    """Of `recipe.yaml`, with that history."""
    checked: dict[str, Any]
    """The content of that file until now."""
    step: int
    """Steps taken before it."""
    changed: tuple[str, ...]
    """`key: old -> new`."""

    @property
    def lines(self) -> list[str]:
        """What it does, for a person."""
        rate, steps = self.plan.rate, self.plan.steps
        old = self.plan.earlier.rate.at(self.step) if self.plan.earlier else rate.at(self.step)
        now, end = rate.at(self.step), rate.at(steps)
        instead = "" if now == old else f" instead of {old:.6g}"
        then = "stays" if end == now else f"becomes {end:.6g} by step {steps:,}"
        return [
            f"goes on from step {self.step:,} to step {steps:,} with other settings: {'; '.join(self.changed)}",
            f"the learning rate of the next step is {now:.6g}{instead}, and {then}",
        ]

    def record(self, node: str) -> None:
        """Write it to the run folder: the next start, by this command or any other, follows it.

        A result is set aside first: if this is interrupted in between, the stage only evaluates again.

        Args:
            node: this machine, for the message of another process that waits for the folder.

        Raises:
            ConfigError: the stage runs, has gone on since this was checked, or its folder cannot be written.
            DiskFull: there is no room.
            RunInUse: another node runs it.
        """
        self.folder.create()  # names what cannot be written
        with closing(self.folder.lock(node)):
            frozen = self.folder.frozen()
            if frozen is None or frozen.content != self.checked or _newest(self.recipe, self.plan.name) != self.step:
                raise ConfigError(f"{self.folder.path}: the stage has gone on meanwhile; repeat the command")
            try:
                if self.folder.result() is not None:
                    aside = self.folder.path / f"result-{step_name(self.step)}.json"
                    (self.folder.path / "result.json").replace(aside)
                text = yaml.safe_dump(self.content, sort_keys=False, width=math.inf)
                write_atomically(self.folder.recipe, without_secrets(text))
            except OSError as error:
                raise_if_passing(error)
                raise cannot_be_written(self.folder.path, error) from None
            self.folder.events.record(
                Event.EXTEND, step=self.step, samples=self.plan.samples_before, steps=self.plan.steps,
                changed=list(self.changed),
            )  # fmt: skip


def extension(recipe: Recipe, name: str) -> Extension | None:
    """The change from the recorded settings of stage `name` to those of the recipe, at its newest checkpoint.

    None if the stage has not begun, or has these settings already. Nothing is written.

    Raises:
        ConfigError: it is not possible, and why; or the stage is running.
        DataError, StorageDown: data that cannot be read.
    """
    folder, stage = run_folder(recipe, name), recipe.stages[name]
    frozen = folder.frozen() if folder.recipe.exists() else None
    if frozen is None or frozen.task != "train" or not isinstance(stage, TrainStage):
        return None
    settings = stage.model_dump(mode="json")
    new = _changed({"seed": frozen.seed, **frozen.settings}, {"seed": recipe.seed, **settings})
    if not new:
        return None
    where = f"stage {name}: --extend: "
    _refuse_fixed(new, where)
    if frozen.settings.get("ema_decay") is None or settings["ema_decay"] is None:
        _refuse_fixed([change for change in new if change.startswith("ema_decay:")], where, NO_AVERAGE)
    if folder.held():
        raise ConfigError(f"{where}{folder.path}: the stage is running; stop it first (Ctrl-C, or coatnet cancel)")
    step = _newest(recipe, name)
    if step is None:
        raise ConfigError(
            f"{where}the stage has no checkpoint to go on from; remove {folder.path} to start it with these settings"
        )
    _refuse_stale_stages(recipe, name, step, where)
    past = frozen.changes.entries if frozen.changes else ()
    kept = before(past, step)
    old = past[len(kept)].settings if len(kept) < len(past) else frozen.settings
    changed = _changed(old, settings)
    made = [SettingsChange(step, time.strftime("%Y-%m-%dT%H:%M:%S%z"), changed, old)] if changed else []
    history = SettingsHistory(VERSION, (*kept, *made))
    train, validation = (open_stage_dataset(stage, part, f"stage {name}: ") for part in ("train", "validation"))
    plan = train_plan(recipe, name, train, validation, history)
    content = stage_settings(plan, start_digest(recipe, name, to_compare=True))
    _refuse_fixed(_changed(_facts(frozen.content), _facts(content)), where)
    if history.entries:
        content[KEY] = to_json(history)
    return Extension(recipe, folder, plan, history, content, dict(frozen.content), step, changed or new)


def _changed(old: Mapping[str, Any], new: Mapping[str, Any]) -> tuple[str, ...]:
    """`key: old -> new` for the settings that are another ones and may not be at any start."""
    return tuple(changed_settings(old, new, may_change))


def _facts(content: Mapping[str, Any]) -> dict[str, Any]:
    """What a run folder records of a stage besides its settings."""
    return {key: content.get(key) for key in ("index_digests", "start_digest")}


def _refuse_fixed(changed: Sequence[str], where: str, reason: str | None = None) -> None:
    """Refuse changes of what stays as it is as long as a stage is under way; all are named, and the first explained."""
    fixed = [(change, reason or why_fixed(change.partition(":")[0])) for change in changed]
    refused = [(change, why) for change, why in fixed if why]
    if refused:
        changes = "\n  ".join(change for change, _ in refused)
        raise ConfigError(f"{where}not while the stage is under way:\n  {changes}\n{refused[0][1]}")


def _refuse_stale_stages(recipe: Recipe, name: str, step: int, where: str) -> None:
    """Refuse to replace a result from which other stages have begun: what they hold would no longer follow from it."""
    if run_folder(recipe, name).result() is None:
        return
    after, begun = {name}, []
    for other, stage in recipe.stages.items():
        if stage.start_stage in after:
            after.add(other)
            begun += [str(run_folder(recipe, other).path)] if run_folder(recipe, other).recipe.exists() else []
    if begun:
        raise ConfigError(
            f"{where}{', '.join(begun)} began from the result of {name} at step {step:,}, and would be stale beside "
            "another one; move what you want to keep elsewhere and remove the rest, then repeat the command: these "
            "stages are done again from the new result"
        )


def _newest(recipe: Recipe, name: str) -> int | None:
    """The step of the newest checkpoint with a right manifest and files of the right sizes."""
    listed = list_checkpoints(stage_of_recipe(recipe, name))
    return max((one.step for one in listed if one.state == "published" and not one.problem and one.step), default=None)
