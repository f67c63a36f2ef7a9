"""The recipe with which a branch of a run goes on."""

import shlex
from pathlib import Path
from typing import Any

from data.files.atomic_file import write_atomically
from jobs.console import make_console, print_line
from jobs.frozen_recipe import FOLDER, frozen_content, recipe_text
from pipeline.recipe.schema import Recipe
from pipeline.runs.run_folder import RunFolder


def write_branch_recipe(path: Path, origin: RunFolder, *, as_json: bool) -> Path:
    """Write a recipe for the branch in `path`, with the stages that start from it, and say how it goes on.

    Args:
        path: `runs/NAME`.
        origin: the run folder of the stage that the branch has left.
        as_json: whether nothing is to be said, as standard output is for a program.
    """
    name, stage = path.name, origin.path.name
    frozen = RunFolder(path / stage).frozen()
    assert frozen is not None
    stages: dict[str, Any] = {stage: frozen.settings}
    for other, settings in _recorded_stages(origin.path.parent).items():
        if settings.get("start_from") in stages and other not in stages:
            stages[other] = settings
    recipe = Recipe.model_validate({"name": name, "runs": str(path.parent), "seed": frozen.seed, "stages": stages})
    file = path / FOLDER / f"{name}.yaml"  # not beside the folders of stages, which it names
    file.parent.mkdir(exist_ok=True)
    write_atomically(file, recipe_text(recipe))
    if not as_json:
        print_line(make_console(), f"{path}: the branch; it goes on with: coatnet run {shlex.quote(str(file))}")
    return file


def _recorded_stages(run: Path) -> dict[str, Any]:
    """The stages of the newest recipe that the run was started with; none if there is none left."""
    files = sorted((run / FOLDER).glob("*.yaml"), key=lambda file: file.stat().st_mtime, reverse=True)
    for file in files:
        content = frozen_content(file)
        if content is not None and isinstance(content.get("stages"), dict):
            return dict(content["stages"])
    return {}
