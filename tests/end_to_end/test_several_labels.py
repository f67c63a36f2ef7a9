"""Samples with several labels, merged by a label map, through training and evaluation."""

import json
from pathlib import Path

import pytest

from data.index import read_index
from tests.support.command import coatnet
from tests.support.recipes import scalars, write_recipe

pytestmark = pytest.mark.slow


def test_a_run_on_samples_with_several_labels_through_a_label_map(pictures: Path, tmp_path: Path) -> None:
    files = sorted(pictures.rglob("*.jpg"))
    lines = [f"{file},{file.parent.name}{',picture' if number % 2 else ''}" for number, file in enumerate(files)]
    (tmp_path / "list.csv").write_text("\n".join(lines) + "\n")
    built = coatnet(
        "shards", "build", "list.csv", "shards", "--validation-fraction", "0.2", "--samples-per-shard", "7",
        folder=tmp_path,
    )  # fmt: skip
    assert built.returncode == 0, built.stderr
    (tmp_path / "map.yaml").write_text("rename: {bright: plain, dark: plain}\n")
    write_recipe(tmp_path, tmp_path / "shards", loss={"kind": "sigmoid", "label_smoothing": 1e-4})
    done = coatnet(
        "train", "recipe.yaml", "pretrain", "data.label_map=map.yaml", "data.validation_label_map=map.yaml",
        "pretrain.steps=25", "pretrain.mixup_alpha=0.2", "resources.ranks=1", folder=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    run = tmp_path / "runs/test/pretrain"
    losses = scalars(run, "train/loss")
    assert losses[25] < losses[1]
    result = json.loads((run / "result.json").read_text())
    assert result["validation"]["samples"] == read_index(tmp_path / "shards/validation").samples >= 12
    assert result["validation"]["top1"] > 0.6
    refused = coatnet("evaluate", run, "shards/validation", folder=tmp_path)
    assert refused.returncode == 78
    assert f"the stage of the model was evaluated with --label-map {tmp_path}/" in refused.stderr
    done = coatnet("evaluate", run, "shards/validation", "--label-map=map.yaml", "--json", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["figures"] == result["validation"]
    assert 0.6 < report["average_precision"]["mean"] <= 1
    assert report["average_precision"]["classes"] == 3
