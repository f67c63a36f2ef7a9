"""Messages of a killed run of two ranks, and special cases of continuing it; test_faults.py kills at random moments."""

import json
import shutil
from pathlib import Path

import pytest

from pipeline.checkpoints.checkpoint import open_checkpoint
from tests.support.command import coatnet, kill, start, wait_until
from tests.support.recipes import checkpoint_bytes, scalars, write_recipe

pytestmark = pytest.mark.slow
SETTINGS = [
    # Enough steps that no kill below is near the end, however late it comes.
    "pretrain.steps=120", "pretrain.checkpoint.every_steps=10",
    # Everything random.
    "pretrain.data.random_augment={layers: 2, magnitude: 15}", "pretrain.mixup_alpha=0.8",
    "pretrain.cutmix_alpha=1.0", "pretrain.data.color_jitter={brightness: 0.4, contrast: 0.4, hue: 0.1}",
    "pretrain.data.random_erasing={probability: 0.5, max_count: 2}",
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
    assert "rank 1 was killed by SIGKILL, by a person or for lack of memory; " in message
    # The other rank only failed as a consequence, in whichever collective it was; a scheduler should try again.
    last = log.read_text().splitlines()[-1]
    assert "exit 75: rank 0 lost another rank, whose log has the reason (" in last
    assert last.endswith(
        f"); the same command continues from {sorted(saved)[-1].name}"
        if (saved := list((log.parents[1] / "checkpoints").glob("step-*")))
        else "); nothing of this stage has been saved, so the same command starts it over"
    )
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


def test_a_run_that_resumes_at_its_last_step_ends_with_a_checkpoint_in_the_folder_of_its_recipe(
    undisturbed: Path, shards: Path, tmp_path: Path
) -> None:
    recipe = write_recipe(tmp_path, shards)
    run = tmp_path / "runs" / "test" / "pretrain"
    shutil.copytree(undisturbed, run)
    (run / "result.json").unlink()
    done = coatnet("train", recipe, "pretrain", *SETTINGS, "pretrain.checkpoint.folder=other", "resources.ranks=1")
    assert done.returncode == 0, done.stderr
    assert "pretrain  ranks: 2 at step 120, now 1\n" in done.stdout
    final = tmp_path / "other/test/pretrain" / FINAL
    assert json.loads((run / "result.json").read_text())["checkpoint"] == str(final)
    one, other = (open_checkpoint(path).parameters() for path in (final, undisturbed / "checkpoints" / FINAL))
    assert one.keys() == other.keys()
    assert all(one[name].equal(other[name]) for name in one)


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
