"""`coatnet demo`, shortened to less than an epoch."""

from pathlib import Path

import numpy as np
import pytest

from data.images.decode import decode
from data.index import read_index
from jobs.commands.demo import CLASSES
from tests.support.command import coatnet
from tests.support.recipes import scalars

pytestmark = pytest.mark.slow(seconds=40)


def test_the_demo_writes_its_images_builds_shards_runs_its_recipe_continues_when_called_again_and_is_proved(
    tmp_path: Path,
) -> None:
    short = [
        "pretrain.epochs=0.7", "pretrain.optimizer.warmup_epochs=0.2", "finetune.epochs=0.2",
        "finetune.optimizer.warmup_epochs=0",
    ]  # fmt: skip
    done = coatnet("demo", "demo", *short, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert f"shards  builds {tmp_path}/demo/shards from {tmp_path}/demo/images" in done.stdout
    assert "demo/shards/validation: 1,000 images of 10 classes" in done.stdout
    assert "$ coatnet run demo/recipe.yaml" in done.stdout
    assert "coatnet tensorboard demo/runs/demo" in done.stdout
    # Ten classes; the full demo's figures are in the README.
    assert max(scalars(tmp_path / "demo/runs/demo/finetune", "validation/top1").values()) > 0.6

    files = sorted((tmp_path / "demo/images").rglob("*.jpg"))
    assert len(files) == 10_000
    assert {file.parent.name for file in files} == set(CLASSES)
    assert decode(files[0].read_bytes()).shape == (28, 28, 3)
    shards = [read_index(tmp_path / "demo/shards" / split) for split in ("train", "validation")]
    assert [index.samples for index in shards] == [9_000, 1_000]
    labels = np.load(tmp_path / "demo/shards/validation/labels.npy")
    assert np.bincount(labels.ravel()).tolist() == [100] * len(CLASSES)

    again = coatnet("demo", "demo", *short, folder=tmp_path)
    assert again.returncode == 0, again.stderr
    assert again.stdout.count("done before") == 3
    assert "builds" not in again.stdout

    proved = coatnet("verify", tmp_path / "demo/runs/demo", "finetune", "--sample=3")
    assert proved.returncode == 0, proved.stderr
    assert "the log holds" in proved.stdout


def test_a_url_is_not_taken_for_a_local_folder(tmp_path: Path) -> None:
    done = coatnet("demo", "s3://bucket/demo", folder=tmp_path)
    assert (done.returncode, list(tmp_path.iterdir())) == (78, [])
    assert "is a URL, and the demo writes to a local folder" in done.stderr
