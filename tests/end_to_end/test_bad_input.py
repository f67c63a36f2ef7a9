"""Mistakes of users: one message that names the mistake and the fix, exit code 78, no traceback, nothing overwritten."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from data.index import read_index
from tests.conftest import write_pictures
from tests.support.command import coatnet, start, wait_until
from tests.support.damage import flip_a_pixel
from tests.support.recipes import checkpoint_bytes, sign_again, write_recipe

pytestmark = pytest.mark.slow(seconds=2)


def tree(folder: Path) -> dict[str, bytes]:
    """Every file below `folder`, with its contents."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def assert_refused(folder: Path, message: str, *arguments: str | Path, lines: int = 1) -> None:
    before = tree(folder)
    done = coatnet(*arguments, folder=folder)
    assert done.returncode == 78, done.stdout + done.stderr
    assert done.stderr.startswith("error: ")
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == lines, done.stderr
    assert tree(folder) == before


def test_shards_from_a_source_that_does_not_exist(tmp_path: Path) -> None:
    assert_refused(tmp_path, "error: absent: no such file or folder", "shards", "build", "absent", "out")


@pytest.mark.parametrize("arguments", [("shards", "build", "source", "/proc/out"), ("demo", "/proc/demo")])
def test_a_folder_that_cannot_be_written(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    write_pictures(tmp_path / "source", per_class=1)
    assert_refused(tmp_path, "error: /proc/", *arguments)


def test_an_unknown_model_is_refused_before_the_shards_of_a_recipe_are_built(tmp_path: Path) -> None:
    write_recipe(tmp_path, tmp_path / "new")
    write_pictures(tmp_path / "source", per_class=1)
    settings = ("shards.source=source", "shards.folder=new", "model.name=coatnet_8")
    assert_refused(tmp_path, "unknown model coatnet_8", "run", "recipe.yaml", *settings)


def test_shards_from_a_source_with_a_broken_image(tmp_path: Path) -> None:
    source = write_pictures(tmp_path / "source", per_class=2)
    (source / "dark" / "0001.jpg").rename(source / "dark" / "[red].jpg")
    (source / "dark" / "[red].jpg").write_text("no image")
    message = "1 of 6 images cannot be decoded: dark/[red].jpg (neither JPEG, PNG nor WebP). Replace or remove"
    assert_refused(tmp_path, message, "shards", "build", "source", "out")
    done = coatnet("shards", "build", "source", "out", "--skip-broken", folder=tmp_path)
    assert done.returncode == 0
    assert "left out dark/[red].jpg: neither JPEG, PNG nor WebP" in done.stdout


def test_a_recipe_with_an_unknown_key(shards: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, shards)
    recipe.write_text(recipe.read_text().replace("steps: 6", "stpes: 6"))
    line = recipe.read_text()[: recipe.read_text().index("stpes")].count("\n") + 1
    message = f"recipe.yaml:{line}: unknown key stages.finetune.stpes; did you mean steps?"
    assert_refused(tmp_path, message, "run", "recipe.yaml")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("resources.ranks=3", "stage pretrain: 3 ranks do not divide the 4 micro-batches of a step"),
        ("data.lanes=5", "stage pretrain: data.lanes: 5 lanes do not divide the global batch of 12; 4 would"),
        ("data.train=nowhere", "nowhere: no index.json there; build shards with"),
        ("model.name=coatnet_8", "stage pretrain: model: unknown model coatnet_8; did you mean coatnet_"),
        ("finetune.resolution=50", "stage finetune: resolution: 50 is no multiple of 16"),
        (
            "model.head_size=12",
            "stage pretrain: model: head_size 12 does not divide the width 32 of a Transformer stage",
        ),
        ("model.depths=[1,1]", "stage pretrain: model: depths [1, 1]"),
        (
            "model.drop_path_rate=-0.1",
            "stages.pretrain.model.drop_path_rate: input should be greater than or equal to 0",
        ),
        ("model.drop_path_rate=1", "stages.pretrain.model.drop_path_rate: input should be less than 1"),
        ("model.pool=median", "stages.pretrain.model.pool: input should be 'max' or 'average', not 'median'"),
        ("activation_checkpointing=0", "0 is not one of none, every_block, mbconv, or a number k for every k-th block"),
        (
            "finetune.model.head_size=8",
            "stage finetune: model: coatnet_debug (head_size 8) cannot start from stage pretrain",
        ),
        ("finetune.model.name=coatnet_nano", "cannot start from stage pretrain, which trains coatnet_debug"),
        ("pretrain.optimizer.warmup_steps=40", "the warm-up of 40 steps fills the stage's 40"),
        ("runs=/proc/nowhere", "run folder /proc/nowhere/test/pretrain: "),
    ],
)
def test_impossible_settings(shards: Path, tmp_path: Path, override: str, message: str) -> None:
    write_recipe(tmp_path, shards)
    assert_refused(tmp_path, message, "run", "recipe.yaml", override)


def test_a_stage_whose_predecessor_is_not_done(shards: Path, tmp_path: Path) -> None:
    write_recipe(tmp_path, shards)
    assert_refused(tmp_path, "stage pretrain is not done", "train", "recipe.yaml", "finetune")


def test_a_run_folder_of_another_recipe_and_of_other_data(shards: Path, tmp_path: Path) -> None:
    write_recipe(tmp_path, shards)
    done = coatnet("train", "recipe.yaml", "pretrain", "pretrain.steps=5", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert_refused(
        tmp_path, "holds a run with other settings:\n    steps: 5 -> 6\n  Restore them",
        "train", "recipe.yaml", "pretrain", "pretrain.steps=6", lines=3,
    )  # fmt: skip
    shutil.copytree(shards, tmp_path / "other")
    index = read_index(tmp_path / "other/train")
    replace(index, shards=(replace(index.shards[0], sha256="0" * 64), *index.shards[1:])).write()
    assert_refused(
        tmp_path, "  index_digests.train: ",
        "train", "recipe.yaml", "pretrain", "pretrain.steps=5", "data.train=other/train", lines=3,
    )  # fmt: skip


def test_a_stage_that_started_from_weights_that_are_gone(shards: Path, tmp_path: Path) -> None:
    """A repeated pretraining must not keep the fine-tuning of the old weights as its result."""
    short = ["pretrain.steps=5", "finetune.steps=2", "resources.ranks=1"]
    write_recipe(tmp_path, shards)
    assert coatnet("run", "recipe.yaml", *short, folder=tmp_path).returncode == 0
    shutil.rmtree(tmp_path / "runs/test/pretrain")
    assert_refused(
        tmp_path, "runs/test/finetune holds a run with other settings:\n    start_digest: ",
        "run", "recipe.yaml", *short, lines=3,
    )  # fmt: skip


def test_a_flipped_bit_in_a_local_shard_ends_the_run_with_its_name(shards: Path, tmp_path: Path) -> None:
    """Of 2,000 steps: behind the run, and not after its end."""
    copied = shutil.copytree(shards, tmp_path / "shards")
    intact = (copied / "train/train-000002.tar").read_bytes()
    flip_a_pixel(copied / "train/train-000002.tar")
    write_recipe(tmp_path, copied)
    settings = ("pretrain.steps=2000", "pretrain.evaluation.every_steps=2000")
    damaged = coatnet("train", "recipe.yaml", "pretrain", *settings, folder=tmp_path)
    assert damaged.returncode == 78, damaged.stdout + damaged.stderr
    assert f"shard {copied}/train/train-000002.tar: read twice, and its sha256 is " in damaged.stderr
    assert "Traceback" not in damaged.stderr

    (copied / "train/train-000002.tar").write_bytes(intact)
    for name in ("verified", "unverified"):
        verify = f"data.verify_shards={str(name == 'verified').lower()}"
        short = ("pretrain.steps=2", "pretrain.optimizer.warmup_steps=1", "resources.ranks=1")
        done = coatnet("train", "recipe.yaml", "pretrain", *short, f"name={name}", verify, folder=tmp_path)
        assert done.returncode == 0, done.stderr
    verified, unverified = (tmp_path / f"runs/{name}/pretrain" for name in ("verified", "unverified"))
    log = (verified / "logs/rank-00000.log").read_text()
    assert "10 local shards to verify (0.0 GB), 0 verified by earlier starts" in log
    assert log.count("all local shards are verified") == 1
    last = "checkpoints/step-00000002"
    assert checkpoint_bytes(verified / last) == checkpoint_bytes(unverified / last)
    assert not (unverified / "verified_shards").exists()


def test_a_checkpoint_of_another_model(shards: Path, tmp_path: Path) -> None:
    """The ranks find it, long after the recipe was checked: still one message and nothing overwritten."""
    write_recipe(tmp_path, shards)
    done = coatnet("train", "recipe.yaml", "pretrain", "pretrain.steps=5", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    checkpoint = tmp_path / "runs/test/pretrain/checkpoints/step-00000005"
    parameters = json.loads((checkpoint / "manifest.json").read_text())["parameters"]
    sign_again(checkpoint, parameters=parameters | {"stem.conv1.weight": [4, 6, 3, 3]})
    before = tree(checkpoint)

    (tmp_path / "runs/test/pretrain/result.json").unlink()
    resumed = coatnet("train", "recipe.yaml", "pretrain", "pretrain.steps=5", folder=tmp_path)
    assert resumed.returncode == 78
    assert "a checkpoint of another model: stem.conv1.weight is (4, 6, 3, 3) there" in resumed.stderr
    assert "Traceback" not in resumed.stderr
    assert tree(checkpoint) == before


def test_buffers_of_another_model(shards: Path, tmp_path: Path) -> None:
    write_recipe(tmp_path, shards)
    done = coatnet("train", "recipe.yaml", "pretrain", "pretrain.steps=5", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    buffers = tmp_path / "runs/test/pretrain/checkpoints/step-00000005/buffers.safetensors"
    save_file(
        load_file(buffers) | {"stem.norm.running_mean": load_file(buffers)["stem.norm.running_mean"][:3]}, buffers
    )
    sign_again(buffers.parent)
    refused = coatnet("train", "recipe.yaml", "finetune", "pretrain.steps=5", folder=tmp_path)
    assert refused.returncode == 78
    assert "its BatchNorm statistics are another model's" in refused.stderr
    assert "Traceback" not in refused.stderr


def test_a_damaged_start_is_refused_before_it_is_trained_on(shards: Path, tmp_path: Path) -> None:
    write_recipe(tmp_path, shards)
    done = coatnet("train", "recipe.yaml", "pretrain", "pretrain.steps=5", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    file = tmp_path / "runs/test/pretrain/checkpoints/step-00000005/rank-00000.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    refused = coatnet("train", "recipe.yaml", "finetune", "pretrain.steps=5", folder=tmp_path)
    assert refused.returncode == 78
    assert "step-00000005: damaged: " in refused.stderr
    assert not (tmp_path / "runs/test/finetune/result.json").exists()


def test_a_checkpoint_of_another_recipe(shards: Path, tmp_path: Path) -> None:
    write_recipe(tmp_path, shards)
    done = coatnet("train", "recipe.yaml", "pretrain", "pretrain.steps=5", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    shutil.copytree(tmp_path / "runs/test/pretrain/checkpoints", tmp_path / "runs/other/pretrain/checkpoints")
    refused = coatnet("train", "recipe.yaml", "pretrain", "name=other", "pretrain.steps=9", folder=tmp_path)
    assert refused.returncode == 78
    assert "a checkpoint of another recipe or of other data" in refused.stderr


def test_a_rank_without_its_environment(shards: Path, tmp_path: Path) -> None:
    write_recipe(tmp_path, shards)
    done = coatnet("train", "recipe.yaml", "pretrain", folder=tmp_path, RANK="0")
    assert done.returncode == 78
    assert "the environment has no WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT" in done.stderr
    assert "Traceback" not in done.stderr


def test_two_processes_on_one_stage(shards: Path, tmp_path: Path) -> None:
    write_recipe(tmp_path, shards)
    first = start("train", tmp_path / "recipe.yaml", "pretrain", "pretrain.steps=3000")
    log = tmp_path / "runs/test/pretrain/logs/rank-00000.log"
    wait_until(lambda: log.exists() and "step 1/3000" in log.read_text(), first)
    second = coatnet("train", "recipe.yaml", "pretrain", "pretrain.steps=3000", folder=tmp_path)
    assert second.returncode == 78
    assert "another process is running this stage" in second.stderr
    assert first.poll() is None
    first.terminate()
    first.wait(60)


def test_too_many_samples_that_do_not_decode(shards: Path, tmp_path: Path) -> None:
    shutil.copytree(shards, tmp_path / "damaged")
    for shard in sorted((tmp_path / "damaged/train").glob("*.tar"))[:3]:
        data = shard.read_bytes()
        # Every other image loses its first bytes.
        parts = data.split(b"\xff\xd8\xff")
        shard.write_bytes(
            b"".join(part + (b"\xff\xd8\xff", b"\0\0\0")[i % 2] for i, part in enumerate(parts[:-1])) + parts[-1]
        )
    write_recipe(tmp_path, tmp_path / "damaged")
    done = coatnet("train", "recipe.yaml", "pretrain", "data.verify_shards=false", folder=tmp_path)
    assert done.returncode == 78
    assert "samples cannot be used (last: " in done.stderr
    assert "Traceback" not in done.stderr


def test_a_loss_that_is_not_finite_ends_the_run_with_70(shards: Path, tmp_path: Path) -> None:
    write_recipe(tmp_path, shards)
    done = coatnet("train", "recipe.yaml", "pretrain", "optimizer.peak_learning_rate=1e30", folder=tmp_path)
    assert done.returncode == 70
    assert "of 10 steps in a row, from step 2 on, is not finite" in done.stderr
    assert "Lower optimizer.peak_learning_rate" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_gradient_that_is_not_finite_ends_the_run_before_it_is_saved(shards: Path, tmp_path: Path) -> None:
    """With weights for which the loss is finite and the gradient is not."""
    write_recipe(tmp_path, shards)
    train = ["train", "recipe.yaml", "pretrain", "resources.ranks=1", "pretrain.steps=6", "checkpoint.every_steps=1"]
    train.append("non_finite.in_a_row=1")
    assert coatnet(*train, folder=tmp_path).returncode == 0
    run = tmp_path / "runs/test/pretrain"
    shutil.rmtree(run / "checkpoints/step-00000006")
    (run / "result.json").unlink()
    path = run / "checkpoints/step-00000005/rank-00000.safetensors"
    tensors = load_file(path)
    tensors["master.head.norm.weight"].fill_(1e30)
    tensors["master.head.norm.bias"].fill_(1e30)
    tensors["master.head.hidden.weight"].zero_()
    tensors["master.head.hidden.bias"].zero_()
    save_file(tensors, path)
    sign_again(path.parent)

    done = coatnet(*train, folder=tmp_path)
    assert done.returncode == 70, done.stdout + done.stderr
    assert "the loss or the gradient of step 6 is not finite" in done.stderr
    assert "gradient norm inf" in done.stderr
    assert not (run / "checkpoints/step-00000006").exists()
