"""Spikes that were made on purpose are found, and their samples named: wrong labels, overflows, steps rolled back."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from data.building.build import build_shards
from models.coatnet import CoAtNet
from models.registry import create_model
from tests.conftest import write_pictures
from tests.jobs.replay.replays import NO_VARIABLES, ON_TWO, agreements, contents, replayed
from tests.pipeline.replay.brightness import detect_brightness
from tests.support.command import coatnet
from tests.support.recipes import curves, events, write_recipe

pytestmark = pytest.mark.slow(seconds=30)
WRONG = "dark/9999"
"""Key of a bright picture with the label of a dark one."""
BLACK = "dark/0005.jpg"
"""The only black picture among bright ones."""
BRIGHT = "bright/0007"
"""Key of the only bright picture among dark ones."""


def data_of(train: Path, shards: Path) -> dict[str, Any]:
    """The section of a recipe."""
    validation, crops = str(shards / "validation"), {"crop_area": [0.5, 1.0], "evaluation_crop": "whole"}
    return {"train": str(train), "validation": validation, "lanes": 4, "workers": 1, **crops}


def trained(recipe: Path, *settings: str, variables: Mapping[str, str] = NO_VARIABLES) -> Path:
    """The run folder of the pretraining."""
    done = coatnet("train", recipe, "pretrain", *settings, folder=None, fresh=False, **variables)
    assert done.returncode == 0, done.stderr
    return recipe.parent / "runs/test/pretrain"


def still_recipe(folder: Path, shards: Path, model: CoAtNet, data: dict[str, Any]) -> list[Any]:
    """What `trained` takes for four steps, one epoch, that hardly move the weights of `model`."""
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    save_file(tensors, folder / "weights.safetensors")
    options = {"name": "coatnet_debug", "convolution_norm": "layer"}
    recipe = write_recipe(folder, shards, resources=ON_TWO, data=data, model=options)
    rates = ["pretrain.optimizer.peak_learning_rate=1e-12", "pretrain.optimizer.warmup_steps=0"]
    saves = "pretrain.checkpoint.every_steps=2"
    return [recipe, "pretrain.steps=4", *rates, saves, "pretrain.start_from=./weights.safetensors"]


@pytest.fixture(scope="module")
def mislabelled(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on shards with one wrong label."""
    folder = tmp_path_factory.mktemp("mislabelled")
    pictures = write_pictures(folder / "pictures", per_class=20)
    shutil.copy(pictures / "bright/0003.jpg", pictures / f"{WRONG}.jpg")
    build_shards(pictures, folder / "wrong", samples_per_shard=7)
    model, batch = {"name": "coatnet_debug"}, {"global_size": 12, "micro_size": 6}
    recipe = write_recipe(
        folder, shards, resources=ON_TWO, data=data_of(folder / "wrong", shards), model=model, batch=batch
    )
    return trained(recipe, "pretrain.steps=25", "pretrain.checkpoint.keep_last=5")


@pytest.fixture(scope="module")
def spike(mislabelled: Path) -> dict[str, Any]:
    """The step of the last epoch with that sample, of a replay of some of its steps."""
    report = replayed(mislabelled.parent, "--step=16", "--until=24")
    assert report["start"] == "step-00000015"
    assert set(agreements(report).values()) == {"equal"}
    with_it = [row for row in report["steps"] if any(one["key"] == WRONG for one in row["samples"])]
    return {"folder": report["folder"], "rows": report["steps"], **with_it[-1]}


def test_a_mislabelled_sample_has_the_highest_loss_and_is_named(spike: dict[str, Any]) -> None:
    worst = max(spike["samples"], key=lambda one: one["loss"])
    assert (worst["key"], worst["labels"], worst["prediction"]) == (WRONG, ["dark"], "bright")
    assert worst["label_probability"] < 0.2
    others = [one["loss"] for one in spike["samples"] if one["key"] != WRONG]
    assert worst["loss"] > 2 * max(others)
    assert spike["gradient_norm"] == max(row["gradient_norm"] for row in spike["rows"])


def test_the_table_begins_with_it(mislabelled: Path, spike: dict[str, Any]) -> None:
    done = coatnet("replay", mislabelled, f"--step={spike['step']}", "--ranks=2")
    lines = done.stdout.splitlines()
    table = lines[lines.index(f"step {spike['step']}: samples by loss") + 3 :]
    assert f"/{WRONG} " in table[0]
    assert "%" in table[1]
    assert "equal to the bit" in done.stdout
    assert all(len(line) <= 120 for line in lines if not line.startswith("/"))


def test_the_picture_shows_it_first(spike: dict[str, Any]) -> None:
    with Image.open(Path(spike["folder"]) / spike["picture"]) as picture:
        first = np.asarray(picture)[60:140, 60:120]
        second = np.asarray(picture)[60:140, 236:296]
    assert first.mean() > 150  # a bright one
    assert first.mean() > second.mean()


def test_without_it_the_loss_is_small(mislabelled: Path, spike: dict[str, Any]) -> None:
    step = spike["step"]
    report = replayed(mislabelled.parent, f"--step={step}", f"--without={WRONG}", "--curves-only")
    (row,) = [row for row in report["steps"] if row["step"] == step]
    assert row["logged"]["loss"] == pytest.approx(spike["loss"])
    assert row["loss"] < 0.6 * row["logged"]["loss"]
    (skipped,) = row["skipped"]
    assert f"/{WRONG}: " in skipped
    assert "data.excluded_samples" in skipped


@pytest.fixture(scope="module")
def overflowing(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose weights, which hardly move, overflow with the one bright picture of its data."""
    folder = tmp_path_factory.mktemp("overflowing")
    pictures = write_pictures(folder / "pictures", per_class=16)
    draws = np.random.default_rng(1)
    for file in [*pictures.glob("bright/*.jpg"), *pictures.glob("striped/*.jpg")]:
        if file != pictures / f"{BRIGHT}.jpg":
            Image.fromarray(draws.integers(0, 80, (24, 24, 3)).astype(np.uint8)).save(file, quality=90)
    build_shards(pictures, folder / "dark", samples_per_shard=7)
    model = create_model("coatnet_debug", num_classes=3, image_size=32, convolution_norm="layer", seed=0)
    with torch.no_grad():
        stem, _ = detect_brightness(model, threshold=0.8)
        stem.conv2.weight.zero_()
        stem.conv2.weight[:, :4].fill_(1e32)  # of the other channels, gradients would overflow with any picture
    return trained(*still_recipe(folder, shards, model, data_of(folder / "dark", shards)))


def test_bisection_names_exactly_the_sample_that_makes_a_step_not_finite(overflowing: Path) -> None:
    (entry,) = [entry for entry in events(overflowing) if entry["event"] == "not_finite"]
    before = contents(overflowing)
    report = replayed(overflowing.parent, f"--step={entry['step']}", "--bisect")
    assert contents(overflowing) == before
    (row,) = [row for row in report["steps"] if row["step"] == entry["step"]]
    assert (row["applied"], row["agreement"], row["loss"]) == (False, "equal", "nan")
    assert row["logged"]["loss"] == "nan"
    (cause,) = row["causes"]
    assert [name.partition("/")[2] for name in cause["samples"]] == [BRIGHT]
    assert cause["explanation"] == "not finite because of these samples, none of which can be left out"
    assert cause["module"] == "output of stem.conv2"
    (found,) = row["not_finite"]
    assert (found["kind"], found["name"]) == ("output", "stem.conv2")
    assert found["samples"] == cause["samples"]
    assert cause["samples"][0] in str(entry["samples_of_micro_batches"][str(cause["micro_batch"])])


def test_the_cause_is_said_in_one_line(overflowing: Path) -> None:
    (entry,) = [entry for entry in events(overflowing) if entry["event"] == "not_finite"]
    done = coatnet("replay", overflowing, f"--step={entry['step']}", "--bisect", "--ranks=2")
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("cause: ")]
    assert f"/{BRIGHT} alone makes it not finite, first the output of stem.conv2 (" in line
    assert "the largest gradient" not in done.stdout  # it is not finite, as was said


def test_without_that_sample_the_step_is_applied(overflowing: Path) -> None:
    (entry,) = [entry for entry in events(overflowing) if entry["event"] == "not_finite"]
    arguments = [f"--step={entry['step']}", "--bisect", f"--without={BRIGHT}", "--ranks=2"]
    done = coatnet("replay", overflowing, *arguments)
    assert done.returncode == 0, done.stderr
    assert "not applied" not in done.stdout
    assert "not finite: " not in done.stdout
    assert "warning: --bisect: everything that was looked into is finite, so no sample is to blame" in done.stdout


def test_a_sample_with_an_enormous_gradient_and_a_usual_loss_is_named(shards: Path, tmp_path: Path) -> None:
    """A black picture, which is the same in all channels for these weights: LayerNorm amplifies its gradient."""
    pictures, draws = write_pictures(tmp_path / "pictures", per_class=16), np.random.default_rng(1)
    for file in pictures.glob("*/*.jpg"):
        pixels = draws.integers(150, 230, (24, 24, 3)) if file != pictures / BLACK else np.zeros((24, 24, 3))
        Image.fromarray(pixels.astype(np.uint8)).save(file, quality=90)
    build_shards(pictures, tmp_path / "bright", samples_per_shard=7)
    model = create_model("coatnet_debug", num_classes=3, image_size=32, convolution_norm="layer", seed=0)
    with torch.no_grad():
        _, shortcut = detect_brightness(model, threshold=0.8)
        shortcut.bias.zero_()
    data = data_of(tmp_path / "bright", shards)
    run = trained(*still_recipe(tmp_path, shards, model, data))
    norms = curves(run)["train/gradient_norm"]
    step = max(norms, key=lambda one: norms[one])
    assert norms[step] > 10 * sorted(norms.values())[1]
    report = replayed(run.parent, f"--step={step}")
    (row,) = [row for row in report["steps"] if row["step"] == step]
    largest = max(row["samples"], key=lambda one: one["gradient"])
    assert largest["key"] == BLACK.removesuffix(".jpg")
    assert largest["loss"] < 2 * row["loss"]
    done = coatnet("replay", run, f"--step={step}", "--ranks=2")
    assert f"the largest gradient at the stem is that of {largest['shard']}/{largest['key']}: " in done.stdout


def test_steps_before_over_and_after_a_roll_back_are_equal_to_the_bit(shards: Path, tmp_path: Path) -> None:
    broken = {"TEST_IMPORTS": "tests.support.not_finite", "TEST_STEPS_NOT_FINITE": "5 6 7"}
    recipe = write_recipe(tmp_path, shards, resources=ON_TWO)
    saves = "pretrain.checkpoint={every_steps: 2, keep_every: 2}"
    run = trained(
        recipe, "pretrain.steps=10", saves, "non_finite.in_a_row=3", "non_finite.roll_backs=1", variables=broken
    )
    (entry,) = [entry for entry in events(run) if entry["event"] == "roll_back"]
    assert (entry["to"], entry["step"]) == (4, 8)
    over = replayed(run.parent, "--step=5", "--until=10", "--curves-only", variables=broken)
    assert agreements(over) == dict.fromkeys(range(5, 11), "equal")
    assert [row["step"] for row in over["steps"] if not row["applied"]] == [6, 7, 8]
    assert [row["loss"] for row in over["steps"]][1:4] == ["nan"] * 3
    shutil.rmtree(run / "checkpoints/step-00000008")
    after = replayed(run.parent, "--step=10", "--curves-only", variables=broken)
    assert after["start"] == "step-00000004, to which the run was rolled back at step 8"
    assert agreements(after) == {9: "equal", 10: "equal"}
    assert curves(Path(after["folder"]))["train/loss"][10] == curves(run)["train/loss"][10]
    # A proof of the log does the same, and its report is JSON although some values are no numbers.
    done = coatnet("verify", run.parent, "--within=10", "--json", folder=None, fresh=False, **broken)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout, parse_constant=lambda constant: pytest.fail(constant))
    assert {one["step"]: one["agreement"] for one in report["steps"]} == dict.fromkeys(range(1, 11), "equal")
    assert [one["replayed"]["loss"] for one in report["steps"]][5:8] == ["nan"] * 3
    assert [(one["step"], one["holds"]) for one in report["states"]] == [(2, True), (4, True), (10, True)]
