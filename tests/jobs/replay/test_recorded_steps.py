"""Steps of a run recomputed as they were: to the bit, whatever happened to the run, and without touching it."""

import json
from pathlib import Path

import pytest

from tests.jobs.replay.replays import ON_TWO, agreements, contents, replayed
from tests.support.command import coatnet, kill, start, wait_until
from tests.support.recipes import curves, write_recipe

pytestmark = pytest.mark.slow(seconds=30)
FIRST = ["pretrain.steps=8", "pretrain.zero_stage=2", "pretrain.checkpoint={every_steps: 3, keep_every: 3}"]
EXTENDED = [
    "pretrain.steps=11", *FIRST[1:], "pretrain.precision=bf16_autocast", "pretrain.optimizer.weight_decay=0.2",
    "pretrain.optimizer.peak_learning_rate=1e-3", "pretrain.optimizer.gradient_clip=0.5",
    "pretrain.data.random_augment={layers: 2, magnitude: 15}",
]  # fmt: skip
FINETUNED = ["finetune.steps=3", "finetune.zero_stage=3", "finetune.precision=bf16"]


@pytest.fixture(scope="module")
def folder(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a recipe, and a run of it that was killed, continued, extended with other settings, and fine-tuned."""
    folder = tmp_path_factory.mktemp("run")
    recipe = write_recipe(folder, shards, resources=ON_TWO, ema_decay=0.9, mixup_alpha=0.2)
    first = folder / "runs/test/pretrain/checkpoints/step-00000003"
    process = start("train", recipe, "pretrain", *FIRST)
    wait_until(first.exists, process)
    kill(process, "everyone")
    for arguments in (["pretrain", *FIRST], ["pretrain", *EXTENDED, "--extend"], ["finetune", *EXTENDED, *FINETUNED]):
        done = coatnet("train", recipe, *arguments)
        assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def run(folder: Path) -> Path:
    return folder / "runs/test"


def test_steps_from_the_beginning_over_a_kill_are_equal_to_the_bit(run: Path) -> None:
    before = contents(run)
    report = replayed(run, "pretrain", "--step=2", "--until=3", "--curves-only")
    assert report["start"] == "the beginning of the stage"
    assert agreements(report) == {1: "equal", 2: "equal", 3: "equal"}
    assert report["why_not_bits"] == []
    assert report["verdict"] == "equal to the bit: all 9 logged values"
    assert contents(run) == before


def test_steps_from_a_checkpoint_over_a_change_of_settings_are_equal_to_the_bit(run: Path) -> None:
    before = contents(run)
    report = replayed(run, "pretrain", "--step=8", "--until=10")
    assert (report["start"], report["start_step"]) == ("step-00000006", 6)
    assert agreements(report) == dict.fromkeys(range(7, 11), "equal")
    assert (report["changed"], report["branched"], report["remarks"]) == ([], [], [])
    assert contents(run) == before
    out = Path(report["folder"])
    assert out == run / "pretrain/replays/step-00000008-00000010"
    ours, logged = curves(out), curves(run / "pretrain")
    for tag in ("train/loss", "train/gradient_norm", "train/learning_rate"):
        assert ours[tag] == {step: logged[tag][step] for step in range(7, 11)}
    assert {"replay_gradient_norm/stem", "replay_output_norm/blocks.3"} <= ours.keys()
    assert not (out / ".scratch").exists()


def test_every_sample_of_the_step_is_reported_once_and_the_picture_exists(folder: Path, run: Path) -> None:
    report = replayed(run, "pretrain", "--step=10")
    (row,) = [row for row in report["steps"] if row["step"] == 10]
    ordered = coatnet("order", folder / "recipe.yaml", "pretrain", *EXTENDED, "--step=9", "--json")
    expected = [(one["shard"], one["key"]) for one in json.loads(ordered.stdout)]
    assert [(one["shard"], one["key"]) for one in row["samples"]] == expected
    assert [one["position"] for one in row["samples"]] == list(range(12))
    assert {one["labels"][0] for one in row["samples"]} <= {"bright", "dark", "striped"}
    assert sum(one["loss"] for one in row["samples"]) / 12 == pytest.approx(row["loss"], rel=1e-6)
    assert all(0 < one["probability"] <= 1 and one["prediction"] for one in row["samples"])
    # With three samples in a micro-batch, the one in the middle is mixed with itself.
    assert [one["position"] for one in row["samples"] if one.get("mixed_with") is None] == [1, 4, 7, 10]
    assert (Path(report["folder"]) / row["picture"]).read_bytes().startswith(b"\x89PNG")
    assert [block["name"] for block in row["blocks"]] == ["stem", *(f"blocks.{n}" for n in range(4)), "head"]
    assert sum(block["gradient"] ** 2 for block in row["blocks"]) ** 0.5 == pytest.approx(row["gradient_norm"], 1e-6)
    assert all(block["update"] > 0 and block["output"] > 0 for block in row["blocks"])


def test_a_stage_that_starts_from_another_one_is_equal_to_the_bit(run: Path) -> None:
    before = contents(run)
    report = replayed(run, "finetune", "--step=2")
    assert report["start"] == "the beginning of the stage"
    assert agreements(report) == {1: "equal", 2: "equal"}
    assert contents(run) == before


def test_a_branch_of_a_stage_that_starts_from_another_one_goes_on_without_that_one(run: Path) -> None:
    arguments = ["--step=2", "optimizer.weight_decay=0.5", "--as=tuned", "--curves-only", "--ranks=2"]
    done = coatnet("replay", run, "finetune", *arguments)
    assert done.returncode == 0, done.stderr
    recipe = run.parent / "tuned/recipes/tuned.yaml"
    assert done.stdout.endswith(f"the branch; it goes on with: coatnet run {recipe}\n")
    assert f"{recipe}: the recipe of the branch, with the stages finetune, evaluate\n" in done.stdout
    done = coatnet("train", recipe, "finetune")
    assert done.returncode == 0, done.stderr
    assert "finetune  continues from checkpoint step-00000002" in done.stdout
    assert list(curves(run.parent / "tuned/finetune")["train/loss"]) == [1, 2, 3]


def test_another_number_of_ranks_is_within_rounding_and_says_why(run: Path) -> None:
    report = replayed(run, "pretrain", "--step=5", "--curves-only", ranks=1)
    assert report["why_not_bits"] == ["ranks: 2 then, 1 now", "micro-batches per rank: 2 then, 4 now"]
    assert set(agreements(report).values()) <= {"equal", "rounding"}
    assert report["holds"]


def test_another_zero_stage_holds_throughout_and_is_named(run: Path) -> None:
    done = coatnet("replay", run, "pretrain", "--step=5", "zero_stage=1", "--ranks=2", "--curves-only")
    assert done.returncode == 0, done.stderr
    assert "computes with zero_stage: 2 -> 1\n" in done.stdout
    assert "values may differ by rounding: zero_stage: 2 then, 1 now\n" in done.stdout
    assert "branch" not in done.stdout


def test_the_forward_alone_equals_the_step_if_a_checkpoint_is_exactly_there(run: Path) -> None:
    report = replayed(run, "pretrain", "--step=7", "--without-optimizer")
    assert (report["start_step"], report["verdict"]) == (6, "equal to the bit: all 1 logged values")
    (row,) = report["steps"]
    assert row["agreement"] == "equal"
    assert (row["gradient_norm"], len(row["samples"])) == (None, 12)


def test_the_forward_alone_says_how_old_its_weights_are(run: Path) -> None:
    done = coatnet("replay", run, "pretrain", "--step=6", "--without-optimizer", "--ranks=1", fresh=True)
    assert done.returncode == 0, done.stderr
    assert (
        "looks at the forward of step 6 with the weights of step-00000003, 2 steps older than those of the step\n"
        in done.stdout
    )
    assert "not compared with the log: the weights are 2 steps older than those of the step\n" in done.stdout
    assert "step 6: samples by loss\n" in done.stdout


def test_a_setting_without_effect_is_named(run: Path) -> None:
    arguments = ["--step=7", "--without-optimizer", "--ranks=1"]
    done = coatnet("replay", run, "pretrain", *arguments, "checkpoint.keep_last=4")
    assert "warning: checkpoint.keep_last: 2 -> 4: without effect, as a replay does not evaluate, save," in done.stdout
    done = coatnet("replay", run, "pretrain", *arguments, "optimizer.weight_decay=0.05", "zero_stage=2")
    assert (
        "warning: optimizer.weight_decay=0.05, zero_stage=2: as the run had it, so nothing is different" in done.stdout
    )
