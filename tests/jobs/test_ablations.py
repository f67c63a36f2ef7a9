"""The ablation recipes, each run whole: all its arms, for two steps at small widths, as a person would start it."""

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.recipe_file import load_recipe
from tests.command import environment

pytestmark = pytest.mark.slow

RECIPES = sorted((Path(__file__).parents[2] / "jobs" / "recipes").glob("ablation-*.yaml"))
SMALL = [
    "model.widths=[8,8,32,64,64]", "resolution=32", "epochs=null", "steps=2", "optimizer.warmup_steps=0",
    "batch.global_size=12", "batch.micro_size=6", "data.lanes=4", "precision=fp32", "resources.ranks=1",
]  # fmt: skip


@pytest.fixture(scope="module")
def finished(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, tuple[int, str, Path]]]:
    """Exit code, output and run folder of each recipe; they run side by side."""
    folder = tmp_path_factory.mktemp("ablations")
    (folder / "shards").symlink_to(shards)
    processes = {}
    for recipe in RECIPES:
        shutil.copy(recipe, folder)
        widths = ["vit_rel.model.widths=[64,64]"] if recipe.stem == "ablation-layouts" else []
        processes[recipe.stem] = subprocess.Popen(
            [sys.executable, "-m", "jobs", "run", recipe.name, *SMALL, *widths],
            cwd=folder,
            env=environment() | {"PYTHONPATH": str(Path(__file__).parents[2])},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
    try:
        outputs = {name: process.communicate(timeout=600)[0] for name, process in processes.items()}
        yield {name: (processes[name].returncode, outputs[name], folder / "runs" / name) for name in processes}
    finally:
        for process in processes.values():
            process.kill()


def test_every_ablation_of_the_paper_has_its_recipe() -> None:
    assert [recipe.stem.removeprefix("ablation-") for recipe in RECIPES] == [
        "head-size", "layouts", "norm", "relative-attention", "split", "stride",
    ]  # fmt: skip


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_all_arms_train_and_are_told_apart(path: Path, finished: dict[str, tuple[int, str, Path]]) -> None:
    code, output, folder = finished[path.stem]
    assert code == 0, output
    arms = load_recipe(path).stages
    results = [json.loads((folder / arm / "result.json").read_text()) for arm in arms]
    assert [result["steps"] for result in results] == [2] * len(arms)
    variants = [stage.model.variant for stage in arms.values()]
    assert len(set(variants)) == len(arms) >= 2


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_arms_differ_in_what_is_compared_alone(path: Path) -> None:
    """In the model, that is, and in the stochastic depth that goes with its size."""
    stages = [stage.model_dump(exclude={"model"}) for stage in load_recipe(path).stages.values()]
    assert all(stage == stages[0] for stage in stages)
