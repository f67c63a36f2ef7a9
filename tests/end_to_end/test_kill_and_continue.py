"""A run of two ranks that is killed continues bit for bit with the same command."""

import json
import shutil
from pathlib import Path

import pytest

from tests.command import coatnet, kill, start, wait_until
from tests.recipes import checkpoint_bytes, diary, scalars, write_recipe

pytestmark = pytest.mark.slow
SETTINGS = [
    # Enough steps that none of the moments below is near the end, however slow the killer.
    "pretrain.steps=120", "pretrain.checkpoint.every_steps=10",
    # All that is random.
    "pretrain.data.random_augment={layers: 2, magnitude: 15}", "pretrain.mixup_alpha=0.8",
]  # fmt: skip
FINAL = "step-00000120"


@pytest.fixture(scope="module")
def undisturbed(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of a pretraining that nobody disturbed."""
    recipe = write_recipe(tmp_path_factory.mktemp("undisturbed"), shards)
    done = coatnet("train", recipe, "pretrain", *SETTINGS)
    assert done.returncode == 0, done.stderr
    return recipe.parent / "runs" / "test" / "pretrain"


@pytest.mark.parametrize(
    ("who", "moments"),
    [("everyone", ["step 1/120", "step 34/120", "step 72/120"]), ("launcher", ["save"]), ("rank 1", ["step 47/120"])],
    ids=["everyone", "launcher-during-a-save", "one-rank"],
)
def test_the_same_command_continues_to_the_same_losses_and_weights(
    who: str, moments: list[str], undisturbed: Path, shards: Path, tmp_path: Path
) -> None:
    recipe = write_recipe(tmp_path, shards)
    run = tmp_path / "runs" / "test" / "pretrain"
    log = run / "logs" / "rank-00000.log"

    def reached(moment: str, seen: int) -> bool:
        if moment == "save":
            return any((run / "checkpoints").glob(".step-000000[2-9]*.writing"))
        return log.exists() and moment in log.read_text()[seen:]

    for moment in moments:
        seen = len(log.read_text()) if log.exists() else 0
        process = start("train", recipe, "pretrain", *SETTINGS)
        wait_until(lambda moment=moment, seen=seen: reached(moment, seen), process)
        kill(process, who)
        assert not (run / "result.json").exists()
    done = coatnet("train", recipe, "pretrain", *SETTINGS)
    assert done.returncode == 0, done.stderr

    resumes = [entry for entry in diary(run) if entry["event"] == "resume"]
    assert resumes
    assert resumes[-1]["step"] > 0
    for tag in ("train/loss", "train/gradient_norm", "train/learning_rate", "validation/top1", "validation/loss"):
        assert scalars(run, tag) == scalars(undisturbed, tag)
    assert checkpoint_bytes(run / "checkpoints" / FINAL) == checkpoint_bytes(undisturbed / "checkpoints" / FINAL)


def test_a_killed_rank_is_named_and_the_others_end(shards: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, shards)
    log = tmp_path / "runs" / "test" / "pretrain" / "logs" / "rank-00000.log"
    process = start("train", recipe, "pretrain", *SETTINGS)
    wait_until(lambda: log.exists() and "step 2/120" in log.read_text(), process)
    kill(process, "rank 1")
    message = process.stderr.read().decode()  # type: ignore[union-attr]
    assert process.returncode not in (0, 70, 78)
    assert "rank 1 was killed by SIGKILL, by someone or by the system for want of memory; the same command" in message


def test_a_run_killed_after_its_last_save_only_evaluates_again(undisturbed: Path, shards: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, shards)
    run = tmp_path / "runs" / "test" / "pretrain"
    shutil.copytree(undisturbed, run)
    result = json.loads((run / "result.json").read_text())
    (run / "result.json").unlink()
    done = coatnet("train", recipe, "pretrain", *SETTINGS)
    assert done.returncode == 0, done.stderr
    assert json.loads((run / "result.json").read_text()) == result | {"images_per_second": None}


def test_a_damaged_newest_checkpoint_is_passed_over_with_the_same_end(
    undisturbed: Path, shards: Path, tmp_path: Path
) -> None:
    recipe = write_recipe(tmp_path, shards)
    run = tmp_path / "runs" / "test" / "pretrain"
    process = start("train", recipe, "pretrain", *SETTINGS)
    wait_until(lambda: (run / "checkpoints" / "step-00000020").exists(), process)
    kill(process, "everyone")
    newest = sorted((run / "checkpoints").glob("step-*"))[-1]
    file = newest / "rank-00001.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    done = coatnet("train", recipe, "pretrain", *SETTINGS)
    assert done.returncode == 0, done.stderr
    assert f"{newest.name}: damaged: rank-00001.safetensors does not have the checksum" in done.stdout
    assert scalars(run, "train/loss") == scalars(undisturbed, "train/loss")
    assert checkpoint_bytes(run / "checkpoints" / FINAL) == checkpoint_bytes(undisturbed / "checkpoints" / FINAL)
