"""A run from a real S3 server: the same samples, losses and weights as from the local disk, whatever the server does."""

import os
import shutil
from pathlib import Path

import pytest

from tests.conftest import with_broken_member
from tests.servers.s3 import S3Server
from tests.support.command import coatnet, start, wait_until
from tests.support.recipes import checkpoint_bytes, events, scalars, write_recipe

pytestmark = pytest.mark.slow

STEPS = 12
CHANGES = [f"pretrain.steps={STEPS}", "pretrain.checkpoint.every_steps=4"]


@pytest.fixture(scope="module")
def local(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of a run from the local disk, with one broken sample in the training shards."""
    folder = tmp_path_factory.mktemp("local")
    shutil.copytree(shards / "validation", folder / "shards" / "validation")
    with_broken_member(shards, folder / "shards" / "train", broken=2)
    write_recipe(folder, folder / "shards")
    done = coatnet("train", "recipe.yaml", "pretrain", *CHANGES, folder=folder)
    assert done.returncode == 0, done.stderr
    return folder


def remote_recipe(local: Path, folder: Path, s3: S3Server, name: str) -> Path:
    write_recipe(folder, local / "shards")
    text = (folder / "recipe.yaml").read_text()
    url = s3.put(local / "shards", name)
    text = text.replace(str(local / "shards"), url).replace(
        "  data:\n", f"  data:\n    cache: {{folder: {folder / 'cache'}, gigabytes: 0.01, downloads: 2}}\n", 1
    )
    (folder / "recipe.yaml").write_text(text)
    return folder / "runs/test/pretrain"


def assert_equal_runs(run: Path, other: Path) -> None:
    for tag in ("train/loss", "train/gradient_norm", "train/skipped_samples"):
        assert scalars(run, tag) == scalars(other, tag)
    last = f"checkpoints/step-{STEPS:08d}"
    mine, others = checkpoint_bytes(run / last), checkpoint_bytes(other / last)
    assert {n: b for n, b in mine.items() if n.startswith("rank")} == {
        n: b for n, b in others.items() if n.startswith("rank")
    }


def test_skipped_samples_are_counted_in_tensorboard_and_named_in_the_diary(local: Path) -> None:
    run = local / "runs/test/pretrain"
    named = [entry for entry in events(run) if entry["event"] == "sample_skipped"]
    assert {(entry["shard"], entry["key"]) for entry in named} == {("train-000001.tar", named[0]["key"])}
    counts = scalars(run, "train/skipped_samples")
    assert counts[STEPS] == len(named) >= 3
    assert list(counts.values()) == sorted(counts.values())


def test_a_run_from_s3_that_is_killed_and_loses_its_server_equals_the_run_from_disk(
    local: Path, s3: S3Server, tmp_path: Path
) -> None:
    run = remote_recipe(local, tmp_path, s3, "killed")
    process = start("train", tmp_path / "recipe.yaml", "pretrain", *CHANGES)
    wait_until(lambda: (run / "checkpoints/step-00000004").exists(), process)
    os.killpg(process.pid, 9)
    process.wait(60)

    # All shards are gone from the cache, and the server is away for a while after the restart.
    shutil.rmtree(tmp_path / "cache" / "shards")
    s3.stop()
    away = coatnet("train", "recipe.yaml", "pretrain", *CHANGES, "data.storage.give_up_after=1", folder=tmp_path)
    assert away.returncode == 75, away.stderr
    assert "no answer in 1 s" in away.stderr
    assert "the same command continues" in away.stderr
    s3.start()

    done = coatnet("train", "recipe.yaml", "pretrain", *CHANGES, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "continues from checkpoint step-00000004" in done.stdout
    assert_equal_runs(run, local / "runs/test/pretrain")


def test_a_cache_too_small_is_refused_with_the_number_that_would_do(local: Path, s3: S3Server, tmp_path: Path) -> None:
    remote_recipe(local, tmp_path, s3, "small-cache")
    refused = coatnet("train", "recipe.yaml", "pretrain", *CHANGES, "data.cache.gigabytes=1e-5", folder=tmp_path)
    assert refused.returncode == 78
    assert (
        "data.cache.gigabytes: 1e-05 is too little for the shards that a node needs at the same time; set it to 0.1"
        in refused.stderr
    )


def test_refused_credentials_end_a_run_at_once_and_name_the_way_out(local: Path, s3: S3Server, tmp_path: Path) -> None:
    remote_recipe(local, tmp_path, s3, "refused")
    refused = coatnet("train", "recipe.yaml", "pretrain", *CHANGES, folder=tmp_path, AWS_SECRET_ACCESS_KEY="wrong")  # noqa: S106
    assert refused.returncode == 78
    assert "access refused (PermissionError" in refused.stderr
    assert "check them and the bucket's policy" in refused.stderr
