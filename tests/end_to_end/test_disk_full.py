"""A run on a disk that is full for a while: a real file system, mounted for the test."""

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.checkpoints.checkpoint import open_checkpoint
from pipeline.runs.event_log import Event
from pipeline.runs.run_folder import RunFolder
from tests.support.command import start, wait_until
from tests.support.disk import small_file_system
from tests.support.recipes import write_recipe

pytestmark = pytest.mark.slow


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of four megabytes; a checkpoint takes one."""
    with small_file_system(tmp_path / "disk", "4m") as folder:
        yield folder


def test_a_run_survives_a_full_disk_and_saves_again_once_there_is_room(
    small_disk: Path, shards: Path, tmp_path: Path
) -> None:
    recipe = write_recipe(tmp_path, shards)
    run = small_disk / "runs/test/pretrain"
    ballast = small_disk / "ballast"
    process = start(
        "train", recipe, "pretrain", f"runs={small_disk / 'runs'}", "pretrain.steps=2000",
        "pretrain.checkpoint.every_steps=10", "pretrain.checkpoint.keep_last=1", "log.every_steps=100",
    )  # fmt: skip
    wait_until(lambda: (run / "checkpoints/step-00000010").exists(), process)
    room = os.statvfs(small_disk)
    # The rest is enough for the event log.
    ballast.write_bytes(bytes(max(0, room.f_bavail * room.f_frsize - 400_000)))

    def failures() -> list[int]:
        return [entry.step for entry in RunFolder(run).events.of(Event.SAVE_FAILED)]

    wait_until(lambda: len(failures()) >= 2, process)
    failed = failures()
    whole = [path for path in (run / "checkpoints").iterdir() if not path.name.startswith(".")]
    assert len(whole) == 1
    assert open_checkpoint(whole[0]).damage() is None
    assert open_checkpoint(whole[0]).step < failed[0]
    ballast.unlink()
    wait_until(lambda: any(save.step > failed[-1] for save in RunFolder(run).events.of(Event.SAVE)), process)
    os.killpg(process.pid, 9)
    process.wait(60)
    reasons = {entry.facts["reason"] for entry in RunFolder(run).events.of(Event.SAVE_FAILED)}
    assert all("No space left on device" in reason for reason in reasons)
    log = (run / "logs/rank-00000.log").read_text()
    assert f"the checkpoint of step {failed[0]} was not saved: " in log
    assert "the run continues" in log
    assert json.loads((run / ".checkpoints.json").read_text())["keep_last"] == 1
