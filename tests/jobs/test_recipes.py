"""The bundled recipes, and the document that describes their settings."""

from pathlib import Path
from typing import get_args

import pytest
from pydantic import BaseModel

from pipeline.recipe.loader import load_recipe
from pipeline.recipe.schema import EvaluateStage, Recipe, TrainStage
from tests.support.paths import ROOT

RECIPES = sorted((ROOT / "jobs" / "recipes").glob("*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_bundled_recipe_is_valid(path: Path) -> None:
    recipe = load_recipe(path)
    assert recipe.name == path.stem
    for stage in recipe.stages.values():
        # The steps of a stage split evenly over its ranks.
        assert isinstance(stage, EvaluateStage) or stage.batch.micro_batches % stage.resources.ranks == 0
        assert stage.batch.global_size % (stage.data.lanes or 1) == 0


def settings(section: type[BaseModel], prefix: str = "") -> set[str]:
    names = set()
    for name, field in section.model_fields.items():
        kinds = (field.annotation, *get_args(field.annotation))
        below = [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)]
        names |= settings(below[0], f"{prefix}{name}.") if below else {prefix + name}
    return names


def test_the_document_has_every_setting_and_no_other() -> None:
    text = (ROOT / "docs" / "recipe.md").read_text()
    rows = [line.split("|")[1] for line in text.splitlines() if line.startswith("| `")]
    documented = {name for row in rows for name in row.split("`")[1::2]}
    assert documented == settings(TrainStage) | settings(EvaluateStage)
    assert all(f"{name}:" in text for name in Recipe.model_fields)
