"""Branches of a run with other settings: the steps of a run that was really extended with them, and runs of their own."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from jobs.commands.replay import _folder_name
from pipeline.errors import ConfigError
from pipeline.replay.recorded_stage import open_recorded_stage
from pipeline.replay.replay import ReplayRequest, _remarks
from pipeline.replay.report import SampleRow, StepRow
from pipeline.runs.run_folder import RunFolder
from tests.jobs.replay.replays import ON_TWO, agreements, contents, replayed
from tests.support.command import coatnet
from tests.support.recipes import checkpoint_bytes, curves, events, write_recipe

pytestmark = pytest.mark.slow(seconds=30)
SETTINGS = [
    "optimizer.peak_learning_rate=1e-3", "optimizer.gradient_clip=0.5", "precision=bf16_autocast",
    "data.random_augment={layers: 2, magnitude: 15}", "loss.label_smoothing=0.1",
]  # fmt: skip
FINAL = "checkpoints/step-00000008"
AT = 4
"""Steps taken before the branch."""


def of_pretrain(settings: list[str]) -> list[str]:
    return [f"pretrain.{setting}" for setting in settings]


@pytest.fixture(scope="module")
def folder(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a recipe of eight steps, a checkpoint after every second one, and the finished run of it."""
    folder = tmp_path_factory.mktemp("run")
    saves = {"every_steps": 2, "keep_every": 2}
    recipe = write_recipe(folder, shards, resources=ON_TWO)
    content = yaml.safe_load(recipe.read_text())
    content["stages"]["pretrain"] |= {"steps": 8, "checkpoint": saves}
    recipe.write_text(yaml.safe_dump(content, sort_keys=False))
    done = coatnet("train", recipe, "pretrain")
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def run(folder: Path) -> Path:
    return folder / "runs/test"


@pytest.fixture(scope="module")
def samples(folder: Path) -> list[str]:
    """Two samples of step 6, as `shard/key`, of which no other has the keys."""
    ordered = coatnet("order", folder / "recipe.yaml", "pretrain", "--step=5", "--json")
    return [f"{one['shard']}/{one['key']}" for one in json.loads(ordered.stdout)[:2]]


@pytest.fixture(scope="module")
def extended(folder: Path, samples: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of a copy of the stage that was really extended with other settings after four steps."""
    copy = shutil.copytree(folder, tmp_path_factory.mktemp("extended"), dirs_exist_ok=True)
    stage = copy / "runs/test/pretrain"
    (stage / "result.json").unlink()
    for step in (6, 8):
        shutil.rmtree(stage / f"checkpoints/step-{step:08d}")
    settings = of_pretrain([*SETTINGS, f"data.excluded_samples={json.dumps(samples)}"])
    done = coatnet("train", copy / "recipe.yaml", "pretrain", *settings, "--extend")
    assert done.returncode == 0, done.stderr
    assert "pretrain  settings changed after step 4" in done.stdout
    return stage


@pytest.fixture(scope="module")
def branch(run: Path, samples: list[str]) -> dict[str, Any]:
    """The report of a branch that became a run of its own: one sample is left out by its key alone, and one by shard."""
    (shard, key), other = samples[0].split("/", 1), samples[1]
    assert shard.endswith(".tar")
    before = contents(run)
    without = ["--without", key, "--without", other]
    report = replayed(run, "pretrain", "--step=5", "--until=6", *without, *SETTINGS, "--as=other", "--curves-only")
    assert contents(run) == before
    return report


def test_its_steps_are_those_of_a_run_that_was_extended(run: Path, branch: dict[str, Any], extended: Path) -> None:
    assert branch["start"] == "step-00000004"
    ours, theirs = curves(run.parent / "other/pretrain"), curves(extended)
    for tag in ("train/loss", "train/gradient_norm", "train/learning_rate"):
        assert {step: ours[tag][step] for step in (5, 6)} == {step: theirs[tag][step] for step in (5, 6)}
    original = curves(run / "pretrain")["train/loss"]
    assert ours["train/loss"][5] != original[5]


def test_what_is_different_is_named(branch: dict[str, Any], samples: list[str]) -> None:
    assert agreements(branch) == {5: None, 6: None}
    assert [row["branch"] for row in branch["steps"]] == [True, True]
    assert "optimizer.peak_learning_rate: 0.003 -> 0.001" in branch["branched"]
    assert 'precision: "fp32" -> "bf16_autocast"' in branch["branched"]
    (left_out,) = [change for change in branch["branched"] if change.startswith("data.excluded_samples")]
    assert all(name in left_out for name in samples)
    skipped = [text for row in branch["steps"] for text in row["skipped"]]
    assert {text.partition(": ")[0] for text in skipped} == set(samples)
    assert branch["remarks"] == []
    nothing = "the steps of a branch have no log to be compared with, and none before it was recomputed"
    assert branch["verdict"] == nothing


def test_it_goes_on_as_a_run_to_the_weights_of_the_extended_one(
    run: Path, branch: dict[str, Any], extended: Path
) -> None:
    other = run.parent / "other"
    assert branch["branch_run"] == str(other)
    state = json.loads(coatnet("status", other, "--json").stdout)
    assert "by coatnet replay after step 6" in str(state)
    recipe = other / "recipes/other.yaml"
    assert list(yaml.safe_load(recipe.read_text())["stages"]) == ["pretrain", "finetune", "evaluate"]
    done = coatnet("run", recipe, "finetune.steps=1")
    assert done.returncode == 0, done.stderr
    assert "pretrain  continues from checkpoint step-00000006" in done.stdout
    assert checkpoint_bytes(other / "pretrain" / FINAL) == checkpoint_bytes(extended / FINAL)
    ours, theirs = curves(other / "pretrain"), curves(extended)
    assert ours["train/loss"] == {step: theirs["train/loss"][step] for step in (5, 6, 7, 8)}
    assert ours["validation/loss"][8] == theirs["validation/loss"][8]
    assert json.loads((other / "evaluate/result.json").read_text())["stage"] == "evaluate"


def test_the_new_run_says_where_it_came_from(run: Path, branch: dict[str, Any]) -> None:
    stage = run.parent / "other/pretrain"
    identity, origin = (json.loads((path / ".run.json").read_text()) for path in (stage, run / "pretrain"))
    assert identity["branch_of"] == {"run": origin["id"], "folder": str(run / "pretrain"), "step": AT}
    assert identity["id"] != origin["id"]
    (entry,) = [entry for entry in events(stage) if entry["event"] == "branch"]
    assert (entry["step"], entry["of"], entry["changed"]) == (AT, str(run / "pretrain"), branch["branched"])


def test_a_branch_beside_settings_that_hold_throughout_follows_steps_as_they_were(run: Path) -> None:
    settings = ["optimizer.peak_learning_rate=1e-3", "zero_stage=2"]
    report = replayed(run, "pretrain", "--step=6", *settings, "--curves-only", ranks=1)
    assert report["changed"] == ["zero_stage: 1 -> 2"]
    assert report["branched"] == ["optimizer.peak_learning_rate: 0.003 -> 0.001"]
    assert [(row["step"], row["branch"]) for row in report["steps"]] == [(5, False), (6, True)]
    assert report["verdict"].startswith("before the branch: ")
    ours, logged = curves(Path(report["folder"])), curves(run / "pretrain")
    assert set(ours["train/learning_rate"]) == {5, 6}
    assert ours["train/learning_rate"][5] == logged["train/learning_rate"][5]
    assert ours["train/learning_rate"][6] == pytest.approx(1e-3)  # a new peak is the learning rate from there on


def test_a_sample_that_no_step_has_is_named(run: Path) -> None:
    report = replayed(run, "pretrain", "--step=7", "--without=train-000000.tar/nothing", "--curves-only", ranks=1)
    assert report["remarks"] == ["--without train-000000.tar/nothing: none of the steps 7 to 7 has it"]


def test_long_lists_of_settings_have_folders_of_their_own(branch: dict[str, Any]) -> None:
    assert len(Path(branch["folder"]).name) == 120
    long = [f"data.random_augment={{layers: 2, magnitude: {'1' * 100}}}"]
    names = {_folder_name(5, 6, [*long, f"steps={steps}"], ()) for steps in (9, 10)}
    assert len(names) == 2
    assert {len(name) for name in names} == {120}
    assert _folder_name(5, 5, ["steps=9"], ("a.tar/b/c",)) == "step-00000005-steps=9-without-a.tar_b_c"


def test_a_step_that_is_not_applied_with_everything_finite_is_explained(run: Path) -> None:
    row = StepRow(5, 1.0, "inf", 1e-3, False, 0.1, samples=(SampleRow(0, 0, "a.tar", "k", (), 1.0, "", 1.0, 1.0),))
    request = ReplayRequest(folder=run / "pretrain", step=5, until=5, out=run / "replays", bisect=True)
    (remark,) = _remarks(request, open_recorded_stage(RunFolder(run / "pretrain")), [row])
    assert remark.startswith(
        "step 5: not applied, though everything that was looked into is finite: the norm of its gra"
    )
    assert "is inf" in remark


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("batch.micro_size=6", "batch.micro_size: 3 -> 6: cannot be another one while the stage is under way, nor in a "
         "branch: BatchNorm and MixUp are defined on micro-batches of one size; change batch.global_size"),
        ("model.head_size=8", "model.head_size: not given -> 8: cannot be another one while .*: its weights would not fit"),
        ("resolution=48", "resolution: 32 -> 48: cannot be another one .*: the tables of relative positions have its size"),
        ("seed=1", "seed=1: not a setting of a stage; give settings of stage pretrain"),
        ("ema_decay=0.9", "ema_decay: a moving average cannot begin or end under way"),
        ("resources.ranks=4", "resources.ranks=4: a replay has all its ranks on this machine; give their number with --ra"),
        ("pretrain.resources.nodes=2", "a replay has all its ranks on this machine; give their number with --ranks"),
    ],
)  # fmt: skip
def test_what_a_branch_cannot_change_is_refused_with_the_reason(run: Path, settings: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        open_recorded_stage(RunFolder(run / "pretrain"), [settings], step=AT)
