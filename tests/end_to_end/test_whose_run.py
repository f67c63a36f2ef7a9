"""Copied, moved and foreign run folders: each run reads and writes what is its own."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from data.remote.storage import Storage
from pipeline.checkpoints.manifest import read_manifest
from tests.support.command import coatnet
from tests.support.recipes import checkpoint_bytes, events, write_recipe

pytestmark = pytest.mark.slow(seconds=15)

SETTINGS: dict[str, Any] = {
    "resources": {"ranks": 1, "gpus_per_rank": 0},
    "checkpoint": {"keep_every": 2},
}
SHORT = ["pretrain.steps=6", "pretrain.optimizer.warmup_steps=1", "pretrain.checkpoint.every_steps=2"]
LAST = "step-00000006"


def train(recipe: Path, *overrides: str) -> Any:
    return coatnet("train", recipe, "pretrain", *SHORT, *overrides)


def stage(folder: Path) -> Path:
    return folder / "runs" / "test" / "pretrain"


def content(folder: Path) -> dict[str, tuple[float, int]]:
    return {
        str(path): (path.stat().st_mtime, path.stat().st_size) for path in sorted(folder.rglob("*")) if path.is_file()
    }


def run_id(checkpoint: Path) -> str | None:
    return read_manifest(str(checkpoint), Storage()).facts.run.run_id


def go_back(run: Path, checkpoints: Path, steps: int) -> None:
    """Make a finished run one that was stopped after `steps` steps."""
    (run / "result.json").unlink()
    for checkpoint in checkpoints.glob("step-*"):
        if checkpoint.name > f"step-{steps:08}":
            shutil.rmtree(checkpoint)


def write(folder: Path, shards: Path) -> Path:
    return write_recipe(folder, shards, **SETTINGS)


@pytest.fixture(scope="module")
def finished(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a recipe whose run has its checkpoints in its own folder; read-only."""
    folder = tmp_path_factory.mktemp("finished")
    done = train(write(folder, shards))
    assert done.returncode == 0, done.stderr
    return folder


def test_a_copy_continues_from_its_own_checkpoints_and_leaves_the_original_alone(
    shards: Path, finished: Path, tmp_path: Path
) -> None:
    original, copy = stage(finished), stage(tmp_path)
    shutil.copytree(finished / "runs", tmp_path / "runs")
    go_back(copy, copy / "checkpoints", 2)
    before = content(original)
    done = train(write(tmp_path, shards))
    assert done.returncode == 0, done.stderr
    assert [entry["step"] for entry in events(copy) if entry["event"] == "resume"] == [2]
    one, other = original / "checkpoints" / LAST, copy / "checkpoints" / LAST
    assert checkpoint_bytes(one) == checkpoint_bytes(other)
    assert run_id(one) == run_id(original / "checkpoints" / "step-00000002") != run_id(other)
    assert run_id(copy / "checkpoints" / "step-00000002") == run_id(one)
    assert content(original) == before


def test_a_moved_run_continues_as_the_same_run_wherever_its_checkpoints_are(shards: Path, tmp_path: Path) -> None:
    here, there, team = tmp_path / "here", tmp_path / "there", tmp_path / "team" / "test" / "pretrain"
    place = [f"pretrain.checkpoint.folder={tmp_path}/team"]
    done = train(write(here, shards), *place)
    assert done.returncode == 0, done.stderr
    before = run_id(team / LAST)
    here.rename(there)
    go_back(stage(there), team, 4)
    again = train(write(there, shards), *place)
    assert again.returncode == 0, again.stderr
    assert [entry["step"] for entry in events(stage(there)) if entry["event"] == "resume"] == [4]
    assert run_id(team / LAST) == before is not None
    assert json.loads((team / ".claim.json").read_text()) == {"run": before, "folder": str(stage(there))}

    # A copy of it, and a run of somebody else with the same name, are refused: nothing of theirs is in that place.
    exported = coatnet("export", stage(there), tmp_path / "before.safetensors")
    assert exported.returncode == 0, exported.stderr
    untouched = content(tmp_path / "team")
    copy, foreign = tmp_path / "copy", tmp_path / "foreign"
    shutil.copytree(there, copy)
    (stage(copy) / "result.json").unlink()
    for folder, command in ((copy, "train"), (foreign, "train"), (foreign, "run")):
        arguments = ["pretrain"] if command == "train" else []
        refused = coatnet(command, write(folder, shards), *arguments, *SHORT, *place)
        assert refused.returncode == 78
        assert refused.stderr == (
            f"error: checkpoint.folder: {team} is where another run, {stage(there)}, has its checkpoints; set another "
            "checkpoint.folder, or give the recipe another name\n"
        )
    assert not stage(foreign).exists()
    checked = coatnet("doctor", foreign / "recipe.yaml", "--stage=pretrain", *SHORT, *place, "--json")
    assert checked.returncode == 78
    assert f"{team} is where another run, {stage(there)}, has its checkpoints" in checked.stdout

    # With a place of its own, the copy says what it passes over.
    elsewhere = train(copy / "recipe.yaml", *place, f"pretrain.checkpoint.folder={tmp_path}/other")
    assert elsewhere.returncode == 0, elsewhere.stderr
    assert (
        f"pretrain  {team}: passed over, since the run that this folder was copied from has its checkpoints there\n"
        in elsewhere.stdout
    )
    assert content(tmp_path / "team") == untouched

    # Whoever reads a run folder never takes another run's checkpoint for its result.
    shutil.rmtree(team / LAST)
    shutil.copytree(tmp_path / "other" / "test" / "pretrain" / LAST, team / LAST)
    wrong = coatnet("export", stage(there), tmp_path / "after.safetensors")
    assert wrong.returncode == 78
    assert f"another run than {stage(there)} has written this checkpoint" in wrong.stderr
    assert "remove" not in wrong.stderr
