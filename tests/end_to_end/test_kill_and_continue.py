"""Messages of a killed run of two ranks, and special cases of continuing it; test_faults.py kills at random moments."""

import json
import shutil
from pathlib import Path

import pytest

from tests.support.command import coatnet, kill, start, wait_until
from tests.support.recipes import checkpoint_bytes, scalars, write_recipe

pytestmark = pytest.mark.slow
SETTINGS = [
    # Enough steps that no kill below is near the end, however late it comes.
    "pretrain.steps=120", "pretrain.checkpoint.every_steps=10",
    # Everything random.
    "pretrain.data.random_augment={layers: 2, magnitude: 15}", "pretrain.mixup_alpha=0.8",
]  # fmt: skip
FINAL = "step-00000120"


@pytest.fixture(scope="module")
def undisturbed(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of an uninterrupted pretraining."""
    recipe = write_recipe(tmp_path_factory.mktemp("undisturbed"), shards)
    done = coatnet("train", recipe, "pretrain", *SETTINGS)
    assert done.returncode == 0, done.stderr
    return recipe.parent / "runs" / "test" / "pretrain"


def test_a_killed_rank_is_named_and_the_others_end(shards: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, shards)
    log = tmp_path / "runs" / "test" / "pretrain" / "logs" / "rank-00000.log"
    process = start("train", recipe, "pretrain", *SETTINGS, fresh=True)
    wait_until(lambda: log.exists() and "step 2/120" in log.read_text(), process)
    kill(process, "rank 1")
    message = process.stderr.read().decode()  # type: ignore[union-attr]
    assert process.returncode == 128 + 9
    assert "rank 1 was killed by SIGKILL, by a person or for lack of memory; the same command" in message
    # The other rank only failed as a consequence, in whichever collective it was; a scheduler should try again.
    last = log.read_text().splitlines()[-1]
    assert "exit 75: rank 0 lost another rank, whose log has the reason (" in last
    assert last.endswith("); the same command continues from the last checkpoint, if there is one")
    assert "Traceback" not in log.read_text()


def test_a_run_killed_after_its_last_save_only_repeats_the_evaluation(
    undisturbed: Path, shards: Path, tmp_path: Path
) -> None:
    recipe = write_recipe(tmp_path, shards)
    run = tmp_path / "runs" / "test" / "pretrain"
    shutil.copytree(undisturbed, run)
    result = json.loads((run / "result.json").read_text())
    (run / "result.json").unlink()
    done = coatnet("train", recipe, "pretrain", *SETTINGS)
    assert done.returncode == 0, done.stderr
    assert json.loads((run / "result.json").read_text()) == result | {"images_per_second": None}


def test_a_damaged_newest_checkpoint_is_skipped_with_the_same_result(
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
