"""The ablation recipes run as a user would run them: all arms, for two steps at small widths."""

import json
import shutil
from pathlib import Path

import pytest

from pipeline.recipe.loader import load_recipe
from tests.support.command import coatnet
from tests.support.paths import ROOT

pytestmark = pytest.mark.slow

RECIPES = sorted((ROOT / "jobs" / "recipes").glob("ablation-*.yaml"))
SMALL = [
    "model.widths=[8,8,32,64,64]", "resolution=32", "epochs=null", "steps=2", "optimizer.warmup_steps=0",
    "batch.global_size=12", "batch.micro_size=6", "data.lanes=4", "precision=fp32", "resources.ranks=1",
]  # fmt: skip


@pytest.fixture(scope="module")
def folder(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the recipes and their runs."""
    folder = tmp_path_factory.mktemp("ablations")
    (folder / "shards").symlink_to(shards)
    return folder


def test_every_ablation_of_the_paper_has_its_recipe() -> None:
    assert [recipe.stem.removeprefix("ablation-") for recipe in RECIPES] == [
        "head-size", "layouts", "norm", "relative-attention", "split", "stride",
    ]  # fmt: skip


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_all_arms_train_and_differ(path: Path, folder: Path) -> None:
    shutil.copy(path, folder)
    widths = ["vit_rel.model.widths=[64,64]"] if path.stem == "ablation-layouts" else []
    done = coatnet("run", path.name, *SMALL, *widths, folder=folder)
    assert done.returncode == 0, done.stderr
    arms = load_recipe(path).stages
    results = [json.loads((folder / "runs" / path.stem / arm / "result.json").read_text()) for arm in arms]
    assert [result["steps"] for result in results] == [2] * len(arms)
    variants = [stage.model.variant for stage in arms.values()]
    assert len(set(variants)) == len(arms) >= 2


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_arms_differ_only_in_what_is_compared(path: Path) -> None:
    """That is the model and the stochastic depth that goes with its size."""
    stages = [stage.model_dump(exclude={"model"}) for stage in load_recipe(path).stages.values()]
    assert all(stage == stages[0] for stage in stages)
