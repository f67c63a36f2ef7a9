"""The chain of a recipe, without its ranks: how often stages are planned, and when they are checked."""

import io
import os
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NoReturn

import pytest
from rich.console import Console

from jobs import chain
from pipeline.errors import ConfigError, RunFailed
from pipeline.faults.preemption import StopSignals
from pipeline.plan import Plan, plan_stage
from pipeline.recipe.loader import load_recipe
from pipeline.recipe.schema import Recipe, Stage
from pipeline.runs.run_folder import RunFolder, run_folder, start_digest
from tests.support.recipes import write_recipe
from tests.support.records import stage_result


@pytest.fixture
def moments() -> list[float]:
    """From when the time limit of each stage counts, and when the stage ended; in order, seconds since the epoch."""
    return [time.time()]


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch, moments: list[float]) -> list[str]:
    """What the chain does, in order; its stages end at once, each with a checkpoint."""
    done: list[str] = []

    def plan(recipe: Recipe, name: str) -> Plan:
        done.append(f"plan {name}")
        return plan_stage(recipe, name)

    def launch(
        command: list[str],
        stage: Stage,
        folder: RunFolder,
        signals: StopSignals,
        variables: Mapping[str, str],
        memory_advice: Callable[[], str],
    ) -> None:
        name = command[2]
        done.append(f"launch {name}")
        moments.append(float(variables["COATNET_STARTED"]))
        recipe = load_recipe(Path(command[1]))
        folder.freeze(plan_stage(recipe, name), start_digest(recipe, name))
        checkpoint = folder.checkpoints / "step-00000001"
        checkpoint.mkdir(exist_ok=True)
        (checkpoint / "manifest.json").write_text("{}")
        folder.finish(stage_result(str(checkpoint), name, steps=1))
        moments.append(time.time())

    monkeypatch.setattr(chain, "plan_stage", plan)
    monkeypatch.setattr(chain, "launch_ranks", launch)
    return done


def run(recipe: Path) -> None:
    chain.run_chain(recipe, [], Console(quiet=True), StopSignals(_end))


def _end(code: int, message: str) -> NoReturn:
    raise SystemExit(f"{code}: {message}")


def run_stage(recipe: Path) -> None:
    chain.run_one(load_recipe(recipe), "pretrain", Console(quiet=True), StopSignals(_end))


@pytest.mark.parametrize("command", [run, run_stage])
def test_ranks_do_not_get_the_variables_of_other_ranks(
    command: Callable[[Path], None], shards: Path, tmp_path: Path, steps: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    command(write_recipe(tmp_path, shards))
    assert "launch pretrain" in steps
    assert "TORCHELASTIC_USE_AGENT_STORE" not in os.environ


def test_all_stages_are_planned_once_before_the_first_starts(shards: Path, tmp_path: Path, steps: list[str]) -> None:
    run(write_recipe(tmp_path, shards))
    stages = ("pretrain", "finetune", "evaluate")
    assert steps == [*(f"plan {name}" for name in stages), *(f"launch {name}" for name in stages)]


def test_the_time_limit_of_each_stage_counts_from_the_start_of_that_stage(
    shards: Path, tmp_path: Path, steps: list[str], moments: list[float]
) -> None:
    run(write_recipe(tmp_path, shards))
    assert len(moments) == 7
    assert moments == sorted(moments)


def test_settings_that_only_jobs_of_slurm_have_are_named(shards: Path, tmp_path: Path, steps: list[str]) -> None:
    console = Console(file=io.StringIO())
    overrides = ["pretrain.resources.partition=gpu", "pretrain.data.crop=whole"]
    chain.run_chain(write_recipe(tmp_path, shards), overrides, console, StopSignals(_end))
    assert isinstance(console.file, io.StringIO)
    lines = console.file.getvalue().splitlines()
    assert lines[0] == "pretrain  resources.partition: gpu has no effect without Slurm, as in `coatnet run`"
    assert not any("no effect" in line for line in lines[1:])  # what else has none is for the ranks to say


def test_a_stage_whose_checkpoint_is_gone_is_neither_done_nor_trained_again(
    shards: Path, tmp_path: Path, steps: list[str]
) -> None:
    path = write_recipe(tmp_path, shards)
    run(path)
    folder = run_folder(load_recipe(path), "finetune")
    shutil.rmtree(folder.checkpoints / "step-00000001")
    del steps[:]
    with pytest.raises(ConfigError, match=r"stage finetune: done, but its checkpoint .*step-00000001 no longer exists"):
        run(path)
    assert not any(step.startswith("launch") for step in steps)


@pytest.mark.parametrize("gone", ["checkpoints", "folder"])
def test_a_stage_continues_from_its_own_checkpoints_without_the_stage_that_it_started_from(
    gone: str, shards: Path, tmp_path: Path, steps: list[str]
) -> None:
    path = write_recipe(tmp_path, shards)
    run(path)
    recipe = load_recipe(path)
    (run_folder(recipe, "finetune").path / "result.json").unlink()
    shutil.rmtree(run_folder(recipe, "evaluate").path)
    start = run_folder(recipe, "pretrain")
    shutil.rmtree(start.checkpoints if gone == "checkpoints" else start.path)
    del steps[:]
    run(path)
    assert [step for step in steps if step.startswith("launch")] == ["launch finetune", "launch evaluate"]
    assert start.path.exists() == (gone == "checkpoints")


def test_a_stage_without_checkpoints_of_its_own_needs_the_stage_that_it_starts_from(
    shards: Path, tmp_path: Path, steps: list[str]
) -> None:
    path = write_recipe(tmp_path, shards)
    run(path)
    recipe = load_recipe(path)
    folder = run_folder(recipe, "finetune")
    (folder.path / "result.json").unlink()
    shutil.rmtree(folder.checkpoints / "step-00000001")
    shutil.rmtree(run_folder(recipe, "pretrain").checkpoints)
    with pytest.raises(ConfigError, match="stage pretrain: done, but its checkpoint .* no longer exists"):
        run(path)


def test_the_data_of_a_stage_that_is_done_is_not_needed(shards: Path, tmp_path: Path, steps: list[str]) -> None:
    shutil.copytree(shards, tmp_path / "first")
    path = write_recipe(tmp_path, shards)
    settings = path.read_text().replace("  pretrain:\n", "  pretrain:\n    data: {train: first/train}\n")
    path.write_text(settings)
    run(path)
    shutil.rmtree(tmp_path / "first")
    shutil.rmtree(run_folder(load_recipe(path), "finetune").path)
    shutil.rmtree(run_folder(load_recipe(path), "evaluate").path)
    del steps[:]
    run(path)
    assert [step for step in steps if step.startswith("launch")] == ["launch finetune", "launch evaluate"]
    path.write_text(settings.replace("    steps: 40\n", "    steps: 50\n"))
    with pytest.raises(ConfigError, match="steps: 40 -> 50"):
        run(path)


def test_an_evaluation_on_other_classes_is_refused_before_anything_is_trained(
    shards: Path, tmp_path: Path, steps: list[str]
) -> None:
    path = write_recipe(tmp_path, shards)
    (tmp_path / "map.yaml").write_text("rename: {bright: Bright}\n")
    with pytest.raises(ConfigError, match="stage evaluate: data.validation has other classes than stage finetune"):
        chain.run_chain(path, ["evaluate.data.validation_label_map=map.yaml"], Console(quiet=True), StopSignals(_end))
    assert not any(step.startswith("launch") for step in steps)


def test_a_stage_is_checked_against_its_folder_once_the_stage_before_is_done(
    shards: Path, tmp_path: Path, steps: list[str]
) -> None:
    path = write_recipe(tmp_path, shards)
    recipe = load_recipe(path)
    folder = run_folder(recipe, "finetune")
    folder.create()
    folder.freeze(plan_stage(recipe, "finetune"), "digest of the checkpoint of another run")
    # Without pretrain's result there is no digest yet, which differs, too: the run is refused before it starts.
    with pytest.raises(ConfigError, match="start_digest"):
        run(path)
    assert "launch pretrain" not in steps
    # As if the folder came from a start before pretrain had a result.
    (folder.path / "recipe.yaml").unlink()
    folder.freeze(plan_stage(recipe, "finetune"), None)
    with pytest.raises(ConfigError, match="start_digest: not given -> "):
        run(path)
    assert steps[-1] == "launch pretrain"


def test_a_stage_whose_ranks_leave_no_result_is_not_done(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chain, "launch_ranks", lambda *arguments: None)
    with pytest.raises(RunFailed, match="stage pretrain: its ranks ended without a result in .*runs/test/pretrain;"):
        run(write_recipe(tmp_path, shards))


def test_a_result_without_its_settings_counts_for_nothing(shards: Path, tmp_path: Path, steps: list[str]) -> None:
    path = write_recipe(tmp_path, shards)
    folder = run_folder(load_recipe(path), "finetune")
    folder.create()
    folder.finish(stage_result("finetune/checkpoints/step-00000006", "finetune", steps=6))
    with pytest.raises(ConfigError, match="finetune: has a result and no recipe.yaml"):
        run(path)
    assert "launch pretrain" not in steps
