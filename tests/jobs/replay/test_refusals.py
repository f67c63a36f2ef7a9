"""What cannot be replayed is refused before ranks start; interrupted replays and running stages stand in nobody's way."""

import json
import os
import shutil
import signal
from pathlib import Path

import psutil
import pytest
import yaml

from tests.jobs.replay.replays import ON_TWO, agreements, contents, refused, replayed
from tests.support.command import Process, coatnet, ended, ranks, start, wait_until
from tests.support.recipes import sign_again, write_recipe

pytestmark = pytest.mark.slow(seconds=25)
BRANCH = "optimizer.peak_learning_rate=1e-4"


@pytest.fixture(scope="module")
def folder(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a recipe and a run of it: six steps, a fine-tuning and an evaluation, on a copy of the shards."""
    folder = tmp_path_factory.mktemp("run")
    shutil.copytree(shards, folder / "shards")
    recipe = write_recipe(folder, folder / "shards", resources=ON_TWO)
    content = yaml.safe_load(recipe.read_text())
    content["stages"]["pretrain"] |= {"steps": 6, "checkpoint": {"every_steps": 2, "keep_every": 2}}
    content["stages"]["finetune"]["steps"] = 1
    recipe.write_text(yaml.safe_dump(content, sort_keys=False))
    done = coatnet("run", recipe)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def run(folder: Path) -> Path:
    return folder / "runs/test"


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    """A copy of the run, which may be damaged."""
    return shutil.copytree(folder / "runs/test", tmp_path / "runs/test")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--step=2"], "several training stages have started; name one of them: pretrain, finetune"),
        (["pretrain", "--step=7"], "--step 7: stage pretrain has the steps 1 to 6"),
        (["pretrain", "--step=5", "--until=9"], "--step 5 --until 9: stage pretrain ends at step 6"),
        (["pretrain", "--step=3", "--until=2"], "--until 2: is before --step 3"),
        (["nothing", "--step=2"], "no stage nothing; there are: pretrain, finetune, evaluate"),
        (["evaluate", "--step=2"], "runs/test/evaluate: no training stage has started here"),
        (["pretrain", "--step=2", "--ranks=3"], "--ranks 3: does not divide the 4 micro-batches of a step; use one of 1, 2, 4"),
        (["pretrain", "--step=2", "--as=test", BRANCH], "runs/test exists already; give the branch another name"),
        (["pretrain", "--step=2", "--as=../x", BRANCH], "the name of a run has letters, digits, dots, dashes and"),
        (["pretrain", "--step=2", "--as=other"], "--as other: there is no branch; give it other settings, or --without"),
        (["pretrain", "--step=2", "--without=nobody"], "--without nobody: none of the steps 2 to 2 has a sample with this"),
        (["pretrain", "--step=2", "--without=other.tar/x/1"], "--without other.tar/x/1: none of the steps 2 to 2 has"),
        (["pretrain", "--step=2", "--without-optimizer", "--bisect"], "looks at one forward; leave --until, --without,"),
        (["pretrain", "--step=2", "--curves-only", "--bisect"], "--curves-only looks into no step, and --bisect does: leave one of"),
        (["pretrain", "--step=2", "--curves-only", "--without-optimizer"], "looks into no step, and --without-optimizer does"),
        (["pretrain", "--step=2", "--without-optimizer", BRANCH], "--without-optimizer looks at the step as it was"),
        (["pretrain", "--step=2", "optimizer.peak_rate=1"], "pretrain.optimizer.peak_rate; did you mean peak_learning_rate?"),
        (["pretrain", "--step=2", "batch.global_size=18"], "do not divide 18; set a multiple of 12, such as 24"),
        (["pretrain", "--step=2", "batch.micro_size=6"], "cannot be another one while the stage is under way, nor in a"),
    ],
)  # fmt: skip
def test_requests_that_cannot_be_met_name_the_fix(run: Path, arguments: list[str], message: str) -> None:
    assert message in refused(run, *arguments)
    assert not (run.parent / "other").exists()


def test_a_folder_with_something_else_is_not_used_for_results(run: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("")
    said = refused(run, "pretrain", "--step=2", f"--out={tmp_path}")
    assert f"--out {tmp_path}: holds something else than a replay; name an empty folder\n" in said
    assert (tmp_path / "mine").exists()


def test_a_run_without_a_started_stage_is_named(shards: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, shards)
    assert f"{tmp_path / 'runs/test'}: no training stage has started here\n" in refused(recipe, "--step=2")
    assert f"{tmp_path / 'runs/test/pretrain'}: no training stage has started" in refused(
        recipe, "pretrain", "--step=2"
    )


def test_other_shards_are_refused_and_shards_that_were_moved_are_found_there(copy: Path, folder: Path) -> None:
    moved = shutil.copytree(folder / "shards", copy.parent / "moved")
    other = refused(copy, "pretrain", "--step=2", f"data.train={moved / 'validation'}")
    assert "does not hold the shards that the run was trained on (digest" in other
    report = replayed(copy, "pretrain", "--step=1", f"data.train={moved / 'train'}", "--curves-only")
    assert agreements(report) == {1: "equal"}
    os.truncate(moved / "train/train-000001.tar", 512)
    said = refused(copy, "pretrain", "--step=1", f"data.train={moved / 'train'}")
    assert "train-000001.tar" in said


def test_a_damaged_checkpoint_is_passed_over_and_named(copy: Path) -> None:
    checkpoints = copy / "pretrain/checkpoints"
    file = checkpoints / "step-00000004/rank-00001.safetensors"
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)
    before = contents(copy)
    report = replayed(copy, "pretrain", "--step=6", "--curves-only")
    assert report["start"] == "step-00000002"
    (reason,) = report["passed_over"]
    assert reason.startswith(f"{file.parent}: damaged: rank-00001.safetensors does not have the checksum")
    assert agreements(report) == {3: "equal", 4: "equal", 5: "equal", 6: "equal"}
    assert contents(copy) == before


def test_a_checkpoint_of_another_model_is_passed_over_by_a_forward(copy: Path) -> None:
    """One that claims to be of this recipe: only its tensors tell."""
    checkpoints = copy / "pretrain/checkpoints"
    own = json.loads((checkpoints / "step-00000004/manifest.json").read_text())
    shutil.rmtree(checkpoints / "step-00000004")
    shutil.copytree(copy / "finetune/checkpoints/step-00000001", checkpoints / "step-00000004")
    kept = ("format", "version", "files", "fragments", "parameters", "sha256")
    sign_again(checkpoints / "step-00000004", **{key: value for key, value in own.items() if key not in kept})
    for option in ("--without-optimizer", "--curves-only"):
        report = replayed(copy, "pretrain", "--step=5", option, ranks=1)
        assert report["start"] == "step-00000002"
        (reason,) = report["passed_over"]
        assert str(checkpoints / "step-00000004") in reason
        assert "another model" in reason


def test_damaged_records_of_the_log_are_named(copy: Path) -> None:
    (file,) = (copy / "pretrain").glob("events.out.tfevents.*")
    content = file.read_bytes()
    damaged = content.index(b"train/loss")
    file.write_bytes(content[:damaged] + b"T" + content[damaged + 1 :])
    (remark,) = replayed(copy, "pretrain", "--step=6", "--curves-only")["remarks"]
    assert remark == f"pretrain/{file.name}: 1 record damaged and left out"


def test_a_branch_of_a_run_whose_recipes_are_gone_says_that_it_ends_with_its_stage(copy: Path) -> None:
    shutil.rmtree(copy / "recipes")
    done = coatnet("replay", copy, "pretrain", "--step=6", BRANCH, "--as=lone", "--curves-only", "--ranks=2")
    assert done.returncode == 0, done.stderr
    lone = copy.parent / "lone/recipes/lone.yaml"
    assert f"{copy / 'recipes'} holds no readable recipe, so the branch has no stage after pretrain\n" in done.stderr
    assert f"{lone}: the recipe of the branch, with the stages pretrain\n" in done.stdout


def stopped(process: Process, signal_: signal.Signals) -> None:
    for one in [psutil.Process(process.pid), *ranks(process)]:
        one.send_signal(signal_)


def test_a_run_that_trains_can_be_replayed_and_is_not_touched(shards: Path, tmp_path: Path) -> None:
    recipe, run = write_recipe(tmp_path, shards, resources=ON_TWO), tmp_path / "runs/test"
    checkpoint = run / "pretrain/checkpoints/step-00000005"
    process = start("train", recipe, "pretrain", "pretrain.steps=4000", "pretrain.checkpoint.keep_every=5")
    try:
        wait_until(checkpoint.exists, process)
        stopped(process, signal.SIGSTOP)  # so that it writes nothing itself
        before = contents(run)
        report = replayed(run, "--step=3", "--curves-only")
        assert agreements(report) == {1: "equal", 2: "equal", 3: "equal"}
        assert contents(run) == before
        stopped(process, signal.SIGCONT)
        assert process.poll() is None
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        ended(process)


def test_ctrl_c_ends_a_replay_at_once_and_the_next_one_begins_anew(run: Path) -> None:
    arguments = ("replay", run, "pretrain", "--step=3", "--until=6", BRANCH, "--as=interrupted", "--ranks=2")
    other = run.parent / "interrupted"
    process = start(*arguments)
    wait_until((other / "pretrain/checkpoints/step-00000002").exists, process)
    stopped(process, signal.SIGSTOP)  # it may be as fast as it likes
    assert not (other / "recipes").exists()
    os.kill(process.pid, signal.SIGINT)
    stopped(process, signal.SIGCONT)
    said = ended(process)
    assert process.returncode == 130
    assert "stopped by SIGINT; the same command starts over" in said
    assert (other / "pretrain/.run.json").exists()
    again = coatnet(*arguments)
    assert again.returncode == 0, again.stderr
    assert (other / "recipes/interrupted.yaml").exists()
    assert "give the branch another name" in refused(*arguments[1:])


def test_a_branch_that_another_process_makes_is_left_alone(run: Path) -> None:
    arguments = ("replay", run, "pretrain", "--step=3", "--until=6", BRANCH, "--as=both", "--ranks=2")
    process = start(*arguments)
    wait_until((run.parent / "both/pretrain/checkpoints/step-00000002").exists, process)
    stopped(process, signal.SIGSTOP)
    out = run / "elsewhere"
    assert "runs/both exists already; give the branch another name" in refused(*arguments[1:], f"--out={out}")
    stopped(process, signal.SIGCONT)
    assert ended(process) == ""
    assert process.returncode == 0
