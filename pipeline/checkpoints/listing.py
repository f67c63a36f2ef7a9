"""The checkpoints of a run, listed for a person: without ranks or DeepSpeed, also while the run is training."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace

from pydantic import ValidationError

from data.remote.storage import Storage, join
from pipeline.checkpoints.locations import CheckpointLocations, known_stores
from pipeline.checkpoints.manifest import Manifest, read_manifest
from pipeline.checkpoints.retention import accuracies, not_returned_to, reasons_to_keep
from pipeline.checkpoints.store import CheckpointStore, Contents, checkpoint_store, store_below
from pipeline.checkpoints.verification import reason_at
from pipeline.errors import ConfigError
from pipeline.recipe.intervals import CheckpointSettings
from pipeline.recipe.schema import Recipe, TrainStage
from pipeline.runs.event_log import Event
from pipeline.runs.run_folder import RunFolder, absolute_location, relative_location, run_folder

_GIVE_UP_AFTER = 60.0  # seconds
_STEP = re.compile(r"step-(\d+)")


@dataclass(frozen=True, slots=True)
class CheckpointedStage:
    """The run folder of a training stage, where its checkpoints are stored, and which of them are kept."""

    folder: RunFolder
    stores: list[CheckpointStore]
    settings: CheckpointSettings

    @property
    def stage(self) -> str:
        return self.folder.path.name

    def final_or_newest(self) -> str | None:
        """The location of the checkpoint of its result or, before it is done, of its newest; None if it has none.

        Raises:
            ConfigError: the result or its checkpoint is damaged, or another run has written that checkpoint since.
            StorageDown, StorageRefused: a remote store that cannot be read.
        """
        result = self.folder.result()
        if result is not None:
            location = absolute_location(result.checkpoint, self.folder)
            manifest = read_manifest(location, self.stores[0].storage)
            self.folder.refuse_other_run(location, manifest.facts.run.run_id)
            return location
        steps = [(step, store) for store in self.stores for step in store.contents().steps]
        step, store = max(steps, key=lambda found: found[0], default=(0, None))
        return store.at(step) if store else None


@dataclass(frozen=True, slots=True)
class ListedCheckpoint:
    """One checkpoint, or what is left of one; None where something is not known."""

    stage: str
    location: str
    state: str
    """`published`, `unfinished` or `damaged`: set aside."""
    step: int | None
    samples: int | None
    bytes: int
    world_size: int | None
    when: str | None
    """From the event log, in ISO 8601."""
    top1: float | None
    """Of the evaluation after that step, 0 to 1."""
    problem: str | None
    """What is wrong, as far as it was checked."""
    kept: list[str]
    """Why it is kept."""


def stage_of_recipe(recipe: Recipe, name: str) -> CheckpointedStage:
    """The training stage `name` with the settings of the recipe."""
    folder, stage = run_folder(recipe, name), recipe.stages[name]
    assert isinstance(stage, TrainStage)
    return _checkpointed(folder, checkpoint_store(folder, stage), stage.checkpoint)


def checkpointed_stage(folder: RunFolder) -> CheckpointedStage | None:
    """The training stage in `folder` with the settings of its last start; None if there is none.

    Raises:
        ConfigError: the record of the stage or of its checkpoints is damaged.
    """
    frozen = folder.frozen()
    if frozen is None or frozen.task != "train":
        return None
    try:
        stage = TrainStage.model_validate(frozen.settings)
    except ValidationError as error:
        raise folder.damaged_recipe(error) from None
    settings, storage = stage.checkpoint, Storage(**stage.data.storage.model_dump())
    last_start = CheckpointLocations.load(folder)
    if last_start is not None:
        kept = {name: getattr(last_start, name) for name in ("keep_last", "keep_every", "keep_best")}
        settings, storage = settings.model_copy(update=kept), last_start.storage
    return _checkpointed(folder, store_below(folder, settings.folder, storage), settings)


def list_checkpoints(stage: CheckpointedStage) -> Iterator[ListedCheckpoint]:
    """All checkpoints of a stage in each of its stores: published ones, newest first, then damaged and unfinished ones.

    Of their files only the manifests are read.

    Raises:
        ConfigError: the result of the stage is damaged.
        StorageDown, StorageRefused: a remote store that cannot be read.
    """
    for store in stage.stores:
        contents = store.contents()
        yield from _published(stage, store, contents)
        for state, folders in (("damaged", contents.damaged), ("unfinished", contents.unfinished)):
            for name, files in sorted(folders.items()):
                why = "set aside" if state == "damaged" else "not a checkpoint yet, or left by an unfinished save"
                yield ListedCheckpoint(
                    stage=stage.stage,
                    location=join(store.location, name),
                    state=state,
                    step=int(digits.group(1)) if (digits := _STEP.search(name)) else None,
                    samples=None,
                    bytes=sum(files.values()),
                    world_size=None,
                    when=None,
                    top1=None,
                    problem=why,
                    kept=[],
                )


def _checkpointed(folder: RunFolder, store: CheckpointStore, settings: CheckpointSettings) -> CheckpointedStage:
    # Someone may be waiting for the answer.
    patient = store.storage
    store = replace(store, storage=replace(patient, give_up_after=min(patient.give_up_after, _GIVE_UP_AFTER)))
    return CheckpointedStage(folder, known_stores(folder, store), settings)


def _published(stage: CheckpointedStage, store: CheckpointStore, contents: Contents) -> Iterator[ListedCheckpoint]:
    events, result = stage.folder.events.entries(), stage.folder.result()
    top1 = accuracies(events)
    saved = {event.step: event.time for event in events if event.event is Event.SAVE}
    checked = {step: _check(store, step, contents.published[step]) for step in contents.steps}
    intact = [step for step, (_, problem) in checked.items() if problem is None]
    facts = [manifest.facts for manifest, problem in checked.values() if manifest and problem is None]
    kept = reasons_to_keep(intact, stage.settings, top1, not_returned_to(facts))
    for step, (manifest, problem) in checked.items():
        location = store.at(step)
        is_final = result is not None and result.checkpoint == relative_location(location, stage.folder)
        yield ListedCheckpoint(
            stage=stage.stage,
            location=location,
            state="published",
            step=step,
            samples=manifest.facts.samples if manifest else None,
            bytes=sum(contents.published[step].values()),
            world_size=manifest.facts.world_size if manifest else None,
            when=saved.get(step),
            top1=top1.get(step),
            problem=problem,
            kept=(["final"] if is_final else []) + kept.get(step, []),
        )


def _check(store: CheckpointStore, step: int, sizes: dict[str, int]) -> tuple[Manifest | None, str | None]:
    """The manifest, and what is wrong with it or with the sizes of the files."""
    try:
        manifest = read_manifest(store.at(step), store.storage)
    except ConfigError as error:
        return None, reason_at(store.at(step), error)
    return manifest, manifest.missing_or_cut(sizes)
