"""Damaged checkpoints are detected, passed over and reported; unfinished ones are ignored."""

import errno
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import pytest

from data.errors import StorageDown
from data.remote.storage import list_files
from pipeline.checkpoints import verification
from pipeline.checkpoints.locations import known_stores
from pipeline.checkpoints.manifest import step_name
from pipeline.checkpoints.resume import newest_intact, open_verified
from pipeline.checkpoints.store import checkpoint_store
from pipeline.errors import ConfigError
from pipeline.ranks.distributed import Ranks
from pipeline.recipe.intervals import CheckpointSettings
from pipeline.recipe.loader import load_recipe
from pipeline.recipe.schema import TrainStage
from pipeline.runs.run_folder import RunFolder, run_folder, start_digest
from tests.pipeline.checkpoints.small import ALONE, STAGE, holds, local, names, save, together
from tests.support.recipes import write_recipe
from tests.support.records import stage_result


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flipped(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-20] ^= 1
    path.write_bytes(data)


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (Path.unlink, "{} is missing"),
    "cut": (cut, "{} has "),
    "flipped": (flipped, "{} does not have "),
    "empty": (lambda path: path.write_bytes(b""), "{} has 0 bytes"),
}
FILES = ["rank-00000.safetensors", "rank-00001.safetensors", "buffers.safetensors", "manifest.json"]


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("damage", DAMAGE)
def test_the_newest_intact_checkpoint_is_taken_and_the_reason_for_passing_over_others_is_given(
    tmp_path: Path, file: str, damage: str
) -> None:
    save(tmp_path, 1, 2, 3, count=2, keep_last=9)
    do, message = DAMAGE[damage]
    do(tmp_path / "checkpoints/step-00000003" / file)

    def work(ranks: Ranks) -> tuple[int, list[str]]:
        checkpoint, skipped = newest_intact([local(tmp_path)], ranks)
        assert checkpoint is not None
        assert holds(checkpoint, 2)
        return checkpoint.step, skipped

    found = together(2, work)
    (reason,) = found[0][1]
    assert found[1][1] == [reason]
    assert "step-00000003: damaged: " in reason
    assert message.format(file) in reason or file == "manifest.json"
    assert names(tmp_path / "checkpoints") == ["damaged-step-00000003", "step-00000001", "step-00000002"]


def test_every_file_is_hashed_by_some_rank_whatever_their_number(tmp_path: Path) -> None:
    save(tmp_path, 3, count=3)
    path = tmp_path / "checkpoints/step-00000003"
    for file in ["buffers.safetensors", *(f"rank-0000{rank}.safetensors" for rank in range(3))]:
        shutil.copytree(path, tmp_path / file)
        flipped(tmp_path / file / file)
        for count in (1, 2, 3, 5):
            with pytest.raises(ConfigError, match="damaged"):
                together(count, lambda ranks, file=file: open_verified(tmp_path / file, ranks))  # type: ignore[misc]


def test_the_leader_alone_lists_the_files_for_all_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 3, count=3)
    listed = []

    def listing(location: str, *arguments: Any) -> dict[str, int]:
        listed.append(location)
        return list_files(location, *arguments)

    monkeypatch.setattr(verification, "list_files", listing)
    for count in (1, 3, 4):
        together(count, lambda ranks: open_verified(local(tmp_path).at(3), ranks))
    assert listed == 3 * [local(tmp_path).at(3)]


def test_an_unfinished_save_is_not_a_checkpoint_however_complete_it_looks(tmp_path: Path) -> None:
    save(tmp_path, 1, 2)
    folder = tmp_path / "checkpoints"
    shutil.copytree(folder / "step-00000002", folder / ".step-00000003.0000000000ab.writing")
    checkpoint, skipped = newest_intact([local(tmp_path)], ALONE)
    assert checkpoint is not None
    assert (checkpoint.step, skipped) == (2, [])


def test_an_extra_file_is_not_damage(tmp_path: Path) -> None:
    save(tmp_path, 1)
    (tmp_path / "checkpoints/step-00000001/rank-00001.0000000000ab.json").write_text("{}")
    checkpoint, skipped = newest_intact([local(tmp_path)], ALONE)
    assert checkpoint is not None
    assert skipped == []


def test_if_no_checkpoint_is_intact_the_run_stops_and_they_stay_where_they_are(tmp_path: Path) -> None:
    save(tmp_path, 1, 2)
    for step in (1, 2):
        (tmp_path / "checkpoints" / step_name(step) / "buffers.safetensors").unlink()
    with pytest.raises(ConfigError, match="none of its 2 checkpoints is intact .*step-00000002: damaged: buffers"):
        newest_intact([local(tmp_path)], ALONE)
    assert names(tmp_path / "checkpoints") == ["step-00000001", "step-00000002"]


def test_without_checkpoints_the_run_starts_from_scratch(tmp_path: Path) -> None:
    assert newest_intact([local(tmp_path)], ALONE) == (None, [])


def test_checkpoints_are_found_where_earlier_starts_stored_them(tmp_path: Path) -> None:
    """Another `checkpoint.folder` must not make the run start over."""
    run = RunFolder(tmp_path / "runs/recipe/stage")
    stage = TrainStage.model_validate(STAGE)
    elsewhere = [
        stage.model_copy(update={"checkpoint": CheckpointSettings(folder=str(tmp_path / name))})
        for name in ("one", "two")
    ]
    save(run.path, 4, store=checkpoint_store(run, elsewhere[0]))
    assert (tmp_path / "one/recipe/stage/step-00000004/manifest.json").exists()
    for now in (stage, *elsewhere):
        checkpoint, _ = newest_intact(known_stores(run, checkpoint_store(run, now)), ALONE)
        assert checkpoint is not None
        assert holds(checkpoint, 4)
    save(run.path, 6)
    for now in (stage, *elsewhere):
        checkpoint, _ = newest_intact(known_stores(run, checkpoint_store(run, now)), ALONE)
        assert checkpoint is not None
        assert holds(checkpoint, 6)
    flipped(run.checkpoints / "step-00000006/buffers.safetensors")
    checkpoint, _ = newest_intact(known_stores(run, checkpoint_store(run, elsewhere[1])), ALONE)
    assert checkpoint is not None
    assert checkpoint.step == 4
    assert names(run.checkpoints) == ["damaged-step-00000006"]


def test_a_missing_starting_checkpoint_is_reported_with_the_fix(shards: Path, tmp_path: Path) -> None:
    recipe = load_recipe(write_recipe(tmp_path, shards))
    run = run_folder(recipe, "pretrain")
    save(run.path, 4)
    assert start_digest(recipe, "finetune") is None
    run.finish(stage_result("pretrain/checkpoints/step-00000004"))
    assert start_digest(recipe, "finetune") is not None
    shutil.rmtree(run.checkpoints)
    with pytest.raises(
        ConfigError,
        match="stage pretrain: done, but its checkpoint .* no longer exists, and there is no other intact one; restore it, or remove .*test/pretrain to",
    ):
        start_digest(recipe, "finetune")


@pytest.mark.parametrize("where", ["verification.location_sha256", "manifest.read_regular"])
def test_a_file_system_that_fails_for_a_while_says_nothing_about_a_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    save(tmp_path, 1, 2)

    def failed(*arguments: Any) -> NoReturn:
        raise OSError(errno.ESTALE, "Stale file handle")

    monkeypatch.setattr(f"pipeline.checkpoints.{where}", failed)
    with pytest.raises(OSError, match="Stale file handle"):
        newest_intact([local(tmp_path)], ALONE)
    assert names(tmp_path / "checkpoints") == ["step-00000001", "step-00000002"]


def test_a_place_whose_file_system_fails_is_no_mistake_in_the_recipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failed(*arguments: Any) -> NoReturn:
        raise OSError(errno.ETIMEDOUT, "Connection timed out")

    monkeypatch.setattr("pipeline.checkpoints.store.check_writable", failed)
    with pytest.raises(StorageDown, match="checkpoints cannot be written"):
        local(tmp_path).check()
