"""What checkpoints a run has, for a person: without ranks or DeepSpeed, also while the run goes on."""

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from data.storage import Storage, is_remote, join, list_files, pieces
from pipeline.checkpoints.manifest import missing_or_cut, read_manifest
from pipeline.checkpoints.retention import accuracies, reasons_to_keep
from pipeline.checkpoints.store import CheckpointStore, checkpoint_store, known_stores, remembered, store_below
from pipeline.errors import ConfigError
from pipeline.recipe.loader import load_recipe
from pipeline.recipe.schema import TrainStage
from pipeline.recipe.sections import CheckpointSettings
from pipeline.run_folder import RunFolder, relative_location, run_folder

_GIVE_UP_AFTER = 60.0  # seconds
_STEP = re.compile(r"step-(\d+)")


@dataclass(frozen=True, slots=True)
class Run:
    """The run folder of a training stage, where its checkpoints lie, and which of them are kept."""

    folder: RunFolder
    places: list[CheckpointStore]
    settings: CheckpointSettings

    @property
    def stage(self) -> str:
        return self.folder.path.name


@dataclass(frozen=True, slots=True)
class Listed:
    """One checkpoint, or what is left of one; None where that is not known."""

    stage: str
    location: str
    state: str
    """`published`, `unfinished` or `damaged`: set aside."""
    step: int | None
    samples: int | None
    bytes: int
    world_size: int | None
    when: str | None
    """As the event log has it, in ISO 8601."""
    top1: float | None
    """Of the evaluation after that step, 0 to 1."""
    problem: str | None
    """What is wrong, as far as was looked."""
    kept: list[str]
    """Why it is kept."""


def find_runs(path: Path) -> list[Run]:
    """The training stages of a recipe file, of a folder of run folders, or of one run folder.

    Raises:
        ConfigError: it is none of these.
    """
    if path.is_file():
        recipe = load_recipe(path)
        stages = [(name, stage) for name, stage in recipe.stages.items() if isinstance(stage, TrainStage)]
        runs = []
        for name, stage in stages:
            folder = run_folder(recipe, name)
            place = checkpoint_store(folder, stage)
            place = replace(place, storage=_impatient(place.storage))
            runs.append(Run(folder, known_stores(folder, place), stage.checkpoint))
        return runs
    found = [below for below in [path, *path.glob("*/")] if (below / "recipe.yaml").is_file()] if path.is_dir() else []
    found.sort(key=lambda below: (below / "recipe.yaml").stat().st_mtime)  # in the order of the chain
    frozen = [(RunFolder(below.resolve()), yaml.safe_load((below / "recipe.yaml").read_text())) for below in found]
    runs = [_of_folder(folder, content) for folder, content in frozen if _is_of_training(content)]
    if not runs:
        raise ConfigError(
            f"{path}: no run folder of a training stage, no folder of such, and no recipe file; give one of these"
        )
    return runs


def list_checkpoints(run: Run) -> Iterator[Listed]:
    """All that lies where the run keeps its checkpoints, newest first, those that are no checkpoints last.

    No files are read but the manifests.

    Raises:
        StorageDown, StorageRefused: a remote place that cannot be read.
    """
    events = run.folder.events.entries()
    top1 = accuracies(events)
    when = {entry["step"]: entry["time"] for entry in events if entry.get("event") == "save"}
    for place in run.places:
        contents = place.contents()
        listed = [_published(run, place, step, contents.published[step], top1, when) for step in contents.steps]
        kept = reasons_to_keep(
            [one.step for one in listed if one.step is not None and not one.problem], run.settings, top1
        )
        for one in listed:
            final = ["final"] if _is_final(run.folder, one.location) else []
            yield replace(one, kept=final + kept.get(one.step or 0, []))
        for state, folders in (("damaged", contents.damaged), ("unfinished", contents.unfinished)):
            for name, files in sorted(folders.items()):
                why = "set aside" if state == "damaged" else "no checkpoint yet, or left by a save that did not end"
                step = int(digits.group(1)) if (digits := _STEP.search(name)) else None
                yield Listed(
                    run.stage,
                    join(place.location, name),
                    state,
                    step,
                    None,
                    sum(files.values()),
                    None,
                    None,
                    None,
                    why,
                    [],
                )


def damage(location: str, storage: Storage) -> str | None:
    """What is wrong with the checkpoint at `location`, every file read and hashed; None if it is whole.

    Raises:
        StorageDown, StorageRefused: a remote place that cannot be read.
    """
    try:
        manifest = read_manifest(location, storage)
        problem = missing_or_cut(manifest, list_files(location, storage))
        if problem is not None:
            return problem
        for name, expected in sorted(manifest["files"].items()):
            if _sha256(join(location, name), expected["bytes"], storage) != expected["sha256"]:
                return f"{name} does not have the checksum of the manifest"
    except (ConfigError, OSError) as error:
        return str(error).removeprefix(f"{location}: ")
    return None


def _of_folder(folder: RunFolder, frozen: dict[str, Any]) -> Run:
    """From what the run folder itself tells; the settings are those of its last start."""
    settings, last_start = CheckpointSettings(**frozen["checkpoint"]), remembered(folder)
    last = {name: value for name, value in last_start.items() if name in CheckpointSettings.model_fields}
    storage = Storage(**last_start.get("storage", frozen["data"]["storage"]))
    place = store_below(folder, settings.folder, _impatient(storage))
    return Run(folder, known_stores(folder, place), settings.model_copy(update=last))


def _impatient(storage: Storage) -> Storage:
    """Someone may be waiting for the answer."""
    return replace(storage, give_up_after=min(storage.give_up_after, _GIVE_UP_AFTER))


def _is_of_training(frozen: object) -> bool:
    """Whether it is what a training stage wrote into its run folder, rather than a recipe."""
    return isinstance(frozen, dict) and frozen.get("task") == "train" and "index_digests" in frozen


def _published(
    run: Run, place: CheckpointStore, step: int, sizes: dict[str, int], top1: dict[int, float], when: dict[int, str]
) -> Listed:
    location = place.at(step)
    facts: dict[str, Any] = {}
    try:
        facts = read_manifest(location, place.storage)
        problem = missing_or_cut(facts, sizes)
    except ConfigError as error:
        problem = str(error).removeprefix(f"{location}: ")
    return Listed(
        run.stage, location, "published", step, facts.get("samples"), sum(sizes.values()), facts.get("world_size"),
        when.get(step), top1.get(step), problem, [],
    )  # fmt: skip


def _is_final(folder: RunFolder, location: str) -> bool:
    result = folder.result()
    return result is not None and result["checkpoint"] == relative_location(location, folder)


def _sha256(location: str, size: int, storage: Storage) -> str:
    if not is_remote(location):
        with open(location, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    digest = hashlib.sha256()
    for piece in pieces(location, size, storage):
        digest.update(piece)
    return digest.hexdigest()
