"""The recipe with which a branch of a run goes on."""

import shlex
from pathlib import Path
from typing import Any

from data.files.atomic_file import write_atomically
from jobs.console import make_console, print_line, print_warning
from jobs.frozen_recipe import FOLDER, frozen_content, recipe_text
from pipeline.monitoring.console import PrintableConsole
from pipeline.recipe.schema import Recipe
from pipeline.runs.run_folder import RunFolder


def write_branch_recipe(path: Path, origin: RunFolder, *, as_json: bool) -> Path:
    """Write a recipe for the branch in `path`, with the stages that start from it, and say how it goes on.

    Args:
        path: `runs/NAME`.
        origin: the run folder of the stage that the branch has left.
        as_json: whether standard output is for a program.
    """
    name, stage = path.name, origin.path.name
    frozen = RunFolder(path / stage).frozen()
    assert frozen is not None
    stages: dict[str, Any] = {stage: frozen.settings}
    recorded = _recorded_stages(origin.path.parent)
    for other, settings in recorded.items():
        if settings.get("start_from") in stages and other not in stages:
            stages[other] = settings
    recipe = Recipe.model_validate({"name": name, "runs": str(path.parent), "seed": frozen.seed, "stages": stages})
    file = path / FOLDER / f"{name}.yaml"  # not beside the folders of stages, which it names
    file.parent.mkdir(exist_ok=True)
    write_atomically(file, recipe_text(recipe))
    if not recorded:
        missing = f"{origin.path.parent / FOLDER} holds no readable recipe, so the branch has no stage after {stage}"
        print_warning(PrintableConsole(stderr=True), missing)
    if not as_json:
        console = make_console()
        print_line(console, f"{file}: the recipe of the branch, with the stages {', '.join(stages)}")
        print_line(console, f"{path}: the branch; it goes on with: coatnet run {shlex.quote(str(file))}")
    return file


def _recorded_stages(run: Path) -> dict[str, Any]:
    """The stages of the newest recipe that the run was started with; none if there is none left."""
    files = sorted((run / FOLDER).glob("*.yaml"), key=lambda file: file.stat().st_mtime, reverse=True)
    for file in files:
        content = frozen_content(file)
        if content is not None and isinstance(content.get("stages"), dict):
            return dict(content["stages"])
    return {}
