"""Which checkpoint a path or URL of a trained model means, and what the run folder around it knows. Needs no torch."""

import os
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import ValidationError

from data.classes.labels import read_label_map
from data.errors import CoatnetError
from data.files.digest import json_sha256
from data.index import read_index
from data.remote.storage import Storage, is_remote
from pipeline.checkpoints.listing import CheckpointedStage, checkpointed_stage
from pipeline.checkpoints.lost import refuse_lost_checkpoint
from pipeline.checkpoints.manifest import MANIFEST, RunFacts
from pipeline.errors import ConfigError
from pipeline.recipe.schema import TrainStage
from pipeline.runs.run_folder import RunFolder


@dataclass(frozen=True, slots=True)
class CheckpointLocation:
    """A checkpoint at the path or URL `location`, reached by `storage`, of the run in `folder` if that is known."""

    location: str
    storage: Storage = field(default_factory=Storage)
    folder: RunFolder | None = None

    def stage(self) -> TrainStage | None:
        """The settings of the stage that it is of, if they are known."""
        frozen = self.folder.frozen() if self.folder else None
        try:
            return TrainStage.model_validate(frozen.settings) if frozen and frozen.task == "train" else None
        except ValidationError:
            return None

    def classes_of_shards(self, run: RunFacts) -> tuple[str, ...] | None:
        """The classes of the stage's training shards, if they are still the ones that the model was trained for."""
        stage = self.stage()
        if stage is None or stage.data.train is None:
            return None
        try:
            classes = read_index(stage.data.train, Storage(**stage.data.storage.model_dump())).classes
            if stage.data.label_map is not None:
                classes = read_label_map(stage.data.label_map, classes).classes
        except (CoatnetError, OSError):
            return None
        return classes if json_sha256(classes) == run.digests.classes_digest else None


def find_model_checkpoint(location: str) -> CheckpointLocation:
    """The checkpoint that `location` means: itself, or that of a run folder: of the stage's result, or its newest.

    Of a run with several training stages it is the last one with a checkpoint: the one that no other starts from.

    Raises:
        ConfigError: there is none, or there are several last stages, or the one of the result no longer exists.
        StorageDown, StorageRefused: a remote store that cannot be read.
    """
    if is_remote(location):
        return CheckpointLocation(location.rstrip("/"))
    path = Path(location)
    if os.path.lexists(path / MANIFEST):
        return CheckpointLocation(str(path), folder=_around(path))
    if not path.is_dir():
        what = "no such file or folder" if not path.exists() else "a file, and no safetensors file"
        raise ConfigError(
            f"{location}: {what}; give the run folder of a stage, a checkpoint, or an exported model: its folder or "
            "its .safetensors file"
        )
    stage = checkpointed_stage(RunFolder(path)) or _last_stage(path)
    if stage.folder.result() is not None:
        refuse_lost_checkpoint(stage)
    checkpoint = stage.final_or_newest()
    if checkpoint is None:
        raise ConfigError(f"{location}: no checkpoint yet; train the stage until it has saved one")
    return CheckpointLocation(checkpoint, stage.stores[0].storage, stage.folder)


def _last_stage(run: Path) -> CheckpointedStage:
    """Of the training stages in the run folder `run`, the one with a checkpoint from which none such starts."""
    frozen = RunFolder(run).frozen()
    if frozen is not None:
        raise ConfigError(
            f"{run}: stage {frozen.stage} only evaluates and has no model of its own; give the folder of the stage "
            f"that it evaluates, {run.absolute().parent / str(frozen.settings.get('start_from'))}"
        )
    found = [
        stage for below in sorted(run.iterdir()) if below.is_dir() and (stage := checkpointed_stage(RunFolder(below)))
    ]
    trained = {stage.stage: stage for stage in found if stage.final_or_newest() is not None}
    if not trained:
        if found:
            names = ", ".join(stage.stage for stage in found)
            raise ConfigError(f"{run}: no checkpoint yet; train {names} until there is one")
        raise ConfigError(
            f"{run}: not a trained model: no run folder, checkpoint or exported model; `coatnet status` lists the "
            "runs below ./runs"
        )
    starts = {_start_of(stage) for stage in trained.values()}
    last = [stage for name, stage in trained.items() if name not in starts]
    if len(last) != 1:
        names = ", ".join(trained)
        raise ConfigError(f"{run}: has several trained stages ({names}); give the folder of one")
    return last[0]


def _start_of(stage: CheckpointedStage) -> str | None:
    frozen = stage.folder.frozen()
    return frozen.settings.get("start_from") if frozen else None


def _around(checkpoint: Path) -> RunFolder | None:
    """The run folder that the checkpoint lies in."""
    folder = RunFolder(checkpoint.absolute().parent.parent)
    return folder if folder.checkpoints == checkpoint.absolute().parent and folder.recipe.exists() else None
