"""What a message says that the same command does after an early end: it promises no checkpoint that is not there."""

from pathlib import Path

import pytest

from data.remote.storage import Storage
from pipeline.checkpoints.locations import CheckpointLocations
from pipeline.checkpoints.saved import STARTS_STAGE_OVER, if_repeated
from pipeline.checkpoints.store import CheckpointStore
from pipeline.recipe.intervals import CheckpointSettings
from pipeline.runs.event_log import Event
from pipeline.runs.run_folder import RunFolder
from pipeline.runs.run_identity import establish_identity


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    folder = RunFolder(tmp_path / "run")
    folder.create()
    establish_identity(folder.path)
    return folder


def publish(place: Path, step: int, file: str = "manifest.json") -> None:
    checkpoint = place / f"step-{step:08d}"
    checkpoint.mkdir(parents=True)
    (checkpoint / file).touch()


def place_at(location: str, folder: RunFolder) -> None:
    """Let the run have its checkpoints at `location`."""
    CheckpointLocations.save(folder, CheckpointStore(location, Storage(), folder.checkpoints), CheckpointSettings())


def test_the_newest_checkpoint_with_a_manifest_is_named(folder: RunFolder, tmp_path: Path) -> None:
    assert if_repeated(folder) == STARTS_STAGE_OVER
    publish(folder.checkpoints, 20, "rank-00000.safetensors")
    assert if_repeated(folder) == STARTS_STAGE_OVER
    publish(folder.checkpoints, 5)
    publish(folder.checkpoints, 15)
    publish(folder.checkpoints, 10)
    assert if_repeated(folder) == "the same command continues from step-00000015"
    place_at(str(tmp_path / "elsewhere"), folder)
    publish(tmp_path / "elsewhere", 30)
    assert if_repeated(folder) == "the same command continues from step-00000030"


def test_of_a_remote_place_the_event_log_knows_the_last_save(folder: RunFolder) -> None:
    place_at("s3://bucket/run", folder)
    assert if_repeated(folder) == STARTS_STAGE_OVER
    for step in (5, 10):
        folder.events.record(Event.SAVE, step=step)
    assert if_repeated(folder) == "the same command continues from step-00000010"
