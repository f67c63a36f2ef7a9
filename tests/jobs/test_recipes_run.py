"""The paper's recipes run: every stage of each, in order, for two steps at small widths, on small images."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from data.building.build import build_shards
from pipeline.checkpoints.checkpoint import open_checkpoint
from pipeline.plan import plan_stage
from pipeline.recipe.loader import load_recipe
from pipeline.recipe.schema import TrainStage
from pipeline.runs.run_folder import final_checkpoint
from pipeline.weights import build_model
from tests.conftest import CLASSES
from tests.support.paths import ROOT
from tests.support.ranks import run_ranks

pytestmark = pytest.mark.slow

RECIPES = sorted((ROOT / "jobs" / "recipes").glob("coatnet-*.yaml"))
SIZES = {224: 32, 384: 64, 512: 96}
SMALL = [
    "model.head_size=8", "epochs=null", "steps=2", "optimizer.warmup_steps=0", "optimizer.warmup_epochs=null",
    "batch.global_size=4", "batch.micro_size=2", "data.lanes=2", "data.workers=1", "precision=fp32", "log.every_steps=1",
    "resources.nodes=1", "resources.ranks=1",
]  # fmt: skip


def small(path: Path) -> list[str]:
    """Overrides for two steps of the recipe: all its stages, its kinds of blocks, its ZeRO stages and recomputation."""
    stages = load_recipe(path).stages
    kinds = next(iter(stages.values())).model.variant.stages
    widths = [8, *(8 if kind.kind == "mbconv" else 16 for kind in kinds)]
    sizes = [f"{name}.resolution={SIZES[stage.resolution]}" for name, stage in stages.items()]
    return [*SMALL, f"model.depths={[1] * len(kinds)}", f"model.widths={widths}", *sizes]


@pytest.fixture(scope="module")
def folder(pictures: Path, shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the recipes, the shards that they name and their finished runs.

    ImageNet-1K stands for images with one of three classes. The others have five classes, and samples with two of them.
    """
    folder = tmp_path_factory.mktemp("recipes")
    (folder / "shards").mkdir()
    (folder / "shards/in1k").symlink_to(shards)
    files = sorted(pictures.rglob("*.jpg"))
    more = ("", "\tpicture", "\tphotograph")
    lines = [f"{file}\t{file.parent.name}{more[number % 3]}" for number, file in enumerate(files)]
    (folder / "list.tsv").write_text("\n".join(lines) + "\n")
    build_shards(folder / "list.tsv", folder / "shards/in21k", samples_per_shard=20, validation_fraction=0.2)
    for name in ("jft", "jft3b"):
        (folder / "shards" / name).symlink_to("in21k")
    arguments = []
    for path in RECIPES:
        shutil.copy(path, folder)
        arguments += [str(folder / path.name), *small(path), "--"]
    # Once more, with a fine-tuning that moves no weight: float32 takes this rate for zero.
    rates = [f"finetune_224.optimizer.{which}_learning_rate=1e-60" for which in ("peak", "minimum")]
    arguments += [str(folder / "coatnet-2-in21k.yaml"), *small(folder / "coatnet-2-in21k.yaml"), "name=still", *rates]
    run_ranks(1, Path(__file__).with_name("recipes_worker.py"), *arguments)
    return folder


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_stage_trains_on_its_own_shards_at_its_own_size(path: Path, folder: Path) -> None:
    recipe = load_recipe(folder / path.name, small(path))
    for name, stage in recipe.stages.items():
        result: dict[str, Any] = json.loads((folder / "runs" / recipe.name / name / "result.json").read_text())
        assert result["steps"] == 2
        assert result["validation"]["samples"] > 0
        assert isinstance(stage, TrainStage)
        shapes = open_checkpoint(final_checkpoint(recipe, name)).shapes
        assert shapes["head.classifier.bias"] == (5 if stage.loss.kind == "sigmoid" else len(CLASSES),)
        tables = {shape[1] for parameter, shape in shapes.items() if parameter.endswith("relative_bias.table")}
        # S3 strides 16, S4 32.
        assert tables == {2 * stage.resolution // stride - 1 for stride in (16, 32)}


def test_a_stage_with_other_classes_reinitializes_only_its_classifier(folder: Path) -> None:
    """From a sigmoid over five classes to a softmax over three, by a fine-tuning that moves no weight."""
    recipe = load_recipe(folder / "coatnet-2-in21k.yaml", [*small(folder / "coatnet-2-in21k.yaml"), "name=still"])
    ends = [open_checkpoint(final_checkpoint(recipe, stage)) for stage in ("pretrain", "finetune_224")]
    before, after = (end.parameters() for end in ends)
    fresh = dict(build_model(plan_stage(recipe, "finetune_224", 1)).named_parameters())
    anew = {"head.classifier.weight", "head.classifier.bias"}
    assert before.keys() == after.keys() == fresh.keys() > anew
    assert all(torch.equal(tensor, fresh[name] if name in anew else before[name]) for name, tensor in after.items())
    assert not any(torch.equal(before[name], fresh[name]) for name in ("head.hidden.weight", "stem.conv1.weight"))
