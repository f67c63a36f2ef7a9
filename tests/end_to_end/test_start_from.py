"""Fine-tuning from another run's folder, a URL and a file, killed and continued; what is wrong is refused beforehand."""

import json
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from pipeline.checkpoints.checkpoint import open_checkpoint
from tests.servers.web import WebServer
from tests.support.command import coatnet, kill, start, wait_until
from tests.support.recipes import checkpoint_bytes, events, write_recipe
from tests.support.trained import save_trained, trained_model

pytestmark = pytest.mark.slow
CLASSES = ("bright", "dark", "striped")
MODEL = {"name": "coatnet_debug", "depths": [1, 1, 2, 1]}
STEPS = ["pretrain.steps=60", "pretrain.checkpoint.every_steps=5", "resources.ranks=1"]
FINAL = "runs/test/pretrain/checkpoints/step-00000060"


def weights(path: Path, seed: int) -> Path:
    save_file({name: tensor.contiguous() for name, tensor in trained_model(seed).state_dict().items()}, path)
    return path


def _has_checkpoint(folder: Path) -> bool:
    return any(folder.glob("step-*"))


def test_a_run_starts_from_another_ones_folder_and_ends_with_its_classifier_and_one_table(
    shards: Path, tmp_path: Path
) -> None:
    save_trained(tmp_path / "runs/big/pretrain", 7, averaged=True, classes=CLASSES)
    recipe = write_recipe(tmp_path, shards, model=MODEL)
    # So small a learning rate that the weights stay what they were.
    still = ["pretrain.start_from=runs/big", "pretrain.steps=1", "pretrain.resolution=48", "optimizer.warmup_steps=0"]
    still.append("optimizer.peak_learning_rate=1e-12")
    said = coatnet("doctor", recipe, *still)
    run = coatnet("train", recipe, "pretrain", *still)
    assert run.returncode == 0, run.stderr
    count = len(list(trained_model(8).parameters()))
    location = "big/pretrain/checkpoints/step-00000007"
    lines = [
        f"starts from the moving average of the weights in {tmp_path}/runs/{location}, with new optimizer state",
        "starts with the classifier of stage pretrain of another run: the same classes (class list ",
        f"weights taken       {count - 3 + 14}  {count - 3} parameters and 14 statistics of BatchNorm",
        "weights resized      3  relative position tables are resized for 48 pixels: 3 from 3 x 3 to 5 x 5",
    ]
    for line in lines:
        assert f"pretrain  {line}" in run.stdout
        assert "".join(f"start_from: {line}".split()) in "".join(said.stdout.split())
    result = json.loads((tmp_path / "runs/test/pretrain/result.json").read_text())["starting_weights"]
    (event,) = [entry for entry in events(tmp_path / "runs/test/pretrain") if entry["event"] == "weights"]
    assert result == {key: value for key, value in event.items() if key not in ("time", "event")}
    assert [(row["what"], row["tensors"]) for row in result["table"]] == [("taken", count + 11), ("resized", 3)]
    found = open_checkpoint(tmp_path / "runs/test/pretrain/checkpoints/step-00000001").parameters()
    wanted = dict(trained_model(8).named_parameters())
    for name, tensor in found.items():
        if not name.endswith(".table"):
            torch.testing.assert_close(tensor, wanted[name].detach())


def test_a_killed_run_goes_on_without_the_weights_it_started_from_and_ends_as_if_undisturbed(
    shards: Path, tmp_path: Path
) -> None:
    runs = {}
    for name in ("undisturbed", "killed"):
        recipe = write_recipe(tmp_path / name, shards, model=MODEL)
        source = weights(tmp_path / name / "weights.safetensors", 3)
        arguments: list[str | Path] = ["train", recipe, "pretrain", "pretrain.start_from=weights.safetensors", *STEPS]
        if name == "killed":
            process = start(*arguments)
            folder = recipe.parent / "runs/test/pretrain/checkpoints"
            wait_until(partial(_has_checkpoint, folder), process)
            kill(process, "rank 0")
            source.unlink()
        done = coatnet(*arguments)
        assert done.returncode == 0, done.stderr
        runs[name] = recipe.parent
    assert "continues from checkpoint" in done.stdout
    one, other = (checkpoint_bytes(folder / FINAL) for folder in runs.values())
    del one["manifest.json"], other["manifest.json"]  # with the digest of settings that name two places
    assert one == other
    result = json.loads((runs["killed"] / "runs/test/pretrain/result.json").read_text())
    assert result["starting_weights"]["checkpoint"] == str(runs["killed"] / "weights.safetensors")


def test_weights_that_were_replaced_before_the_first_save_are_noticed(shards: Path, tmp_path: Path) -> None:
    recipe, source = write_recipe(tmp_path, shards, model=MODEL), weights(tmp_path / "weights.safetensors", 3)
    arguments = [
        "pretrain.start_from=./weights.safetensors",
        "pretrain.steps=600",
        "pretrain.checkpoint.every_steps=600",
    ]
    process = start("train", recipe, "pretrain", *arguments)
    log = tmp_path / "runs/test/pretrain/logs/rank-00000.log"
    wait_until(lambda: log.exists() and "step 1/600" in log.read_text(), process)
    kill(process, "rank 0")
    weights(source, 4)
    for command in (("train", recipe, "pretrain"), ("doctor", recipe)):
        done = coatnet(*command, *arguments)
        assert done.returncode in (1, 78)
        text = "".join((done.stdout + done.stderr).split())
        assert "".join(f"since the weights at {source} were replaced".split()) in text
    shutil.rmtree(tmp_path / "runs")
    assert (
        coatnet("train", recipe, "pretrain", *arguments[:1], "pretrain.steps=1", "optimizer.warmup_steps=0").returncode
        == 0
    )


def test_a_model_at_a_url_is_evaluated_and_one_of_another_architecture_is_refused(shards: Path, tmp_path: Path) -> None:
    weights(tmp_path / "weights.safetensors", 3)
    recipe = write_recipe(tmp_path / "mine", shards, model=MODEL)
    with WebServer(tmp_path) as server:
        start_from = f"evaluate.start_from={server.url}/weights.safetensors"
        done = coatnet("train", recipe, "evaluate", start_from, "evaluate.resolution=32")
        assert done.returncode == 0, done.stderr
        result = json.loads((tmp_path / "mine/runs/test/evaluate/result.json").read_text())
        assert (result["steps"], result["checkpoint"]) == (0, f"{server.url}/weights.safetensors")
        other = ["evaluate.start_from=" + f"{server.url}/weights.safetensors", "evaluate.model.depths=[1,1,1,1]"]
        refused = coatnet("train", recipe, "evaluate", *other, "evaluate.resolution=32", "name=other")
        assert refused.returncode == 78
        assert "has blocks.4.attention.out.bias and 12 more that this model does not" in " ".join(
            refused.stderr.split()
        )
        assert not (tmp_path / "mine/runs/other").exists()
