"""`coatnet checkpoints` on run folders in every condition."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from jobs.checkpoint_discovery import find_training_stages
from jobs.cli import app
from pipeline.checkpoints.store import CheckpointStore, checkpoint_store
from pipeline.checkpoints.verification import find_damage
from pipeline.plan import plan_stage
from pipeline.recipe.loader import load_recipe
from pipeline.recipe.schema import TrainStage
from pipeline.runs.event_log import Event
from pipeline.runs.run_folder import RunFolder, run_folder
from tests.pipeline.checkpoints.small import save
from tests.servers.s3 import S3Server
from tests.support.recipes import write_recipe
from tests.support.records import stage_result


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, ["checkpoints", *map(str, arguments)])


def listed(*arguments: str | Path) -> list[dict[str, Any]]:
    result = run(*arguments, "--json")
    assert result.exit_code == 0, result.output
    rows: list[dict[str, Any]] = json.loads(result.stdout)
    return rows


def started(recipe: Path, stage: str, *overrides: str) -> tuple[RunFolder, CheckpointStore]:
    """The run folder of a stage after its first start."""
    loaded = load_recipe(recipe, list(overrides))
    folder = run_folder(loaded, stage)
    folder.create()
    folder.freeze(plan_stage(loaded, stage), None)
    settings = loaded.stages[stage]
    assert isinstance(settings, TrainStage)
    return folder, checkpoint_store(folder, settings)


@pytest.fixture
def recipe(shards: Path, tmp_path: Path) -> Path:
    """The recipe of a run with checkpoints of step 10, 20, 30 and 40 by two ranks, evaluated at 10 and 20."""
    path = write_recipe(tmp_path, shards)
    folder, _ = started(path, "pretrain")
    save(folder.path, 10, 20, 30, 40, count=2, keep_last=2, keep_every=20, keep_best=1)
    folder.events.record(Event.EVALUATION, step=20, top1=0.5)
    folder.events.record(Event.EVALUATION, step=40, top1=0.75)
    return path


def pretrain(recipe: Path) -> Path:
    return recipe.parent / "runs/test/pretrain"


@pytest.mark.parametrize("named", ["runs/test/pretrain", "runs/test", "recipe.yaml"])
def test_a_run_is_named_by_its_folder_the_folder_above_or_its_recipe(recipe: Path, named: str) -> None:
    rows = listed(recipe.parent / named)
    assert [(row["stage"], row["step"], row["samples"], row["world_size"]) for row in rows] == [
        ("pretrain", 40, 480, 2), ("pretrain", 30, 360, 2), ("pretrain", 20, 240, 2),
    ]  # fmt: skip
    assert [(row["top1"], row["problem"], row["state"]) for row in rows] == [
        (0.75, None, "published"), (None, None, "published"), (0.5, None, "published"),
    ]  # fmt: skip
    folder = pretrain(recipe) / "checkpoints"
    assert [row["location"] for row in rows] == [str(folder / f"step-000000{step}") for step in (40, 30, 20)]
    for row in rows:
        assert row["bytes"] == sum(file.stat().st_size for file in Path(row["location"]).iterdir())
        assert row["when"].startswith("20")


def test_why_each_is_kept_follows_the_settings_of_the_last_start(recipe: Path) -> None:
    assert [row["kept"] for row in listed(pretrain(recipe))] == [
        ["newest", "every 20", "best"], ["last 2"], ["every 20"],
    ]  # fmt: skip
    RunFolder(pretrain(recipe)).finish(stage_result("pretrain/checkpoints/step-00000040"))
    assert listed(pretrain(recipe))[0]["kept"] == ["final", "newest", "every 20", "best"]


def test_the_table_has_a_row_for_each(recipe: Path) -> None:
    result = run(pretrain(recipe))
    assert result.exit_code == 0
    lines = [line.split() for line in result.output.splitlines()]
    assert lines[0] == ["step", "samples", "MB", "ranks", "saved", "top-1", "verified", "kept", "as"]
    assert [line[0] for line in lines[2:]] == ["40", "30", "20"]
    assert lines[2][-6:] == ["75.00%", "yes", "newest,", "every", "20,", "best"]
    assert lines[3][-4:] == ["-", "yes", "last", "2"]


def test_unfinished_damaged_and_set_aside_checkpoints_are_named(recipe: Path) -> None:
    folder = pretrain(recipe) / "checkpoints"
    (folder / "step-00000040/manifest.json").unlink()
    (folder / "step-00000030/rank-00001.safetensors").unlink()
    (folder / "step-00000020").rename(folder / "damaged-step-00000020")
    unfinished = folder / ".step-00000050.0000000000ab.writing"
    unfinished.mkdir()
    (unfinished / "rank-00000.safetensors").write_bytes(b"1234567")
    rows = listed(pretrain(recipe))
    assert [(row["step"], row["state"], row["problem"]) for row in rows] == [
        (40, "published", "not a checkpoint (manifest.json is missing)"),
        (30, "published", "rank-00001.safetensors is missing"),
        (20, "damaged", "set aside"),
        (50, "unfinished", "not a checkpoint yet, or left by an unfinished save"),
    ]
    assert all(row["kept"] == [] for row in rows)
    assert rows[-1]["bytes"] == 7
    shown = run(pretrain(recipe)).output
    assert "damaged: set aside" in shown
    assert "unfinished: not a checkpoint yet" in shown


def test_verify_hashes_everything_and_says_which_are_damaged(recipe: Path) -> None:
    whole = run("verify", pretrain(recipe))
    assert whole.exit_code == 0
    assert whole.output.count(": intact\n") == 3
    assert whole.output.endswith("3 checkpoints, 0 damaged\n")
    file = pretrain(recipe) / "checkpoints/step-00000030/rank-00001.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    assert listed(pretrain(recipe))[1]["problem"] is None  # sizes are right
    found = run("verify", pretrain(recipe))
    assert found.exit_code == 78
    assert "step-00000030: rank-00001.safetensors does not have the checksum of the manifest\n" in found.output
    assert found.output.endswith("3 checkpoints, 1 damaged\n")
    assert run("verify", pretrain(recipe), "20").exit_code == 0
    assert run("verify", pretrain(recipe), "30").exit_code == 78
    missing = run("verify", pretrain(recipe), "35")
    assert missing.exit_code == 78
    assert "no checkpoint of step 35; there are: 40, 30, 20" in missing.output


def test_checkpoints_elsewhere_are_found_from_the_run_folder(shards: Path, tmp_path: Path) -> None:
    path = write_recipe(tmp_path, shards)
    folder, place = started(path, "pretrain", f"pretrain.checkpoint.folder={tmp_path / 'elsewhere'}")
    save(folder.path, 10, store=place)
    rows = listed(folder.path)
    assert [row["location"] for row in rows] == [str(tmp_path / "elsewhere/test/pretrain/step-00000010")]
    assert [row["location"] for row in listed(path)] == [row["location"] for row in rows]


def test_a_run_without_checkpoints_lists_none_and_other_folders_are_refused(shards: Path, tmp_path: Path) -> None:
    path = write_recipe(tmp_path / "recipe", shards)
    assert "no checkpoints yet" in run(path).output
    for wrong, message in (
        (tmp_path, "not a run folder, and contains none"),
        (tmp_path / "nothing", "not a recipe file or run folder"),
        (tmp_path / "recipe", "not a run folder, and contains none"),
    ):
        result = run(wrong)
        assert result.exit_code == 78, result.output
        assert message in result.output


def test_the_runs_of_a_sweep_are_listed_after_the_recipes_own(recipe: Path, shards: Path) -> None:
    folder, _ = started(recipe, "pretrain", "name=test-b")
    save(folder.path, 10)
    runs = recipe.parent / "runs"
    settings = {"test-b": {"seed": "1"}, "test-c": {"seed": "2"}}  # the second has yet to start
    (runs / "test.sweep.json").write_text(json.dumps({"runs": list(settings), "settings": settings}))
    for named in (runs / "test.sweep.json", runs / "test", recipe):
        assert [row["step"] for row in listed(named)] == [40, 30, 20, 10]
    shown = [line.split() for line in run(recipe).output.splitlines()]
    assert shown[0][:3] == ["run", "stage", "step"]
    assert [line[:3] for line in shown[2:]] == [
        ["test", "pretrain", "40"], ["test", "pretrain", "30"], ["test", "pretrain", "20"], ["test-b", "pretrain", "10"],
    ]  # fmt: skip
    assert run("verify", runs / "test.sweep.json").output.endswith("4 checkpoints, 0 damaged\n")


def test_a_run_in_which_nothing_trains_is_refused(recipe: Path) -> None:
    loaded = load_recipe(recipe, ["name=other"])
    stage = run_folder(loaded, "evaluate")
    stage.create()
    stage.freeze(plan_stage(loaded, "evaluate"), None)
    result = run(stage.path)
    assert (result.exit_code, result.output) == (78, f"error: {stage.path}: no training stage has started here\n")


@pytest.mark.slow
def test_checkpoints_in_an_object_store_are_listed_and_verified(s3: S3Server, shards: Path, tmp_path: Path) -> None:
    path = write_recipe(tmp_path, shards)
    name = f"s3://test/{tmp_path.name}-{os.getpid()}"
    folder, place = started(path, "pretrain", f"pretrain.checkpoint.folder={name}")
    save(folder.path, 10, 20, count=2, store=place)
    files = s3.files()
    files.pipe_file(f"{place.location}/step-00000030/rank-00000.safetensors".removeprefix("s3://"), b"123")
    rows = listed(folder.path)
    assert [(row["step"], row["state"], row["bytes"] > 3) for row in rows] == [
        (20, "published", True), (10, "published", True), (30, "unfinished", False),
    ]  # fmt: skip
    assert run("verify", folder.path).exit_code == 0
    there = f"{place.at(20)}/rank-00001.safetensors".removeprefix("s3://")
    data = files.cat_file(there)
    files.pipe_file(there, data[:-1] + bytes([data[-1] ^ 1]))
    found = run("verify", folder.path)
    assert found.exit_code == 78
    assert f"{place.at(20)}: rank-00001.safetensors does not have the checksum of the manifest" in found.output
    assert find_damage(place.at(10), place.storage) is None
    assert [stage.stage for _, stage in find_training_stages(folder.path)] == ["pretrain"]
