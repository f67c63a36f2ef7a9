"""Writes what a plan recommends into the recipe."""

from collections.abc import Sequence
from operator import attrgetter
from pathlib import Path
from typing import Any

from data.text.printable import printable
from jobs.recipe_edit import write_settings
from pipeline.errors import ConfigError
from pipeline.planner.stage_plan import StagePlan
from pipeline.recipe.loader import load_recipe
from pipeline.recipe.schema import Recipe
from pipeline.runs.run_folder import run_folder

MAKES_ANOTHER_RUN = ("batch.micro_size", "data.lanes", "precision")
"""Settings that a stage cannot change once it has begun."""


def check_recommended(recipe: Recipe, stage: str) -> None:
    """Check what needs no plan, before anybody waits for one.

    Raises:
        ConfigError: the stage has begun with a recipe that cannot be read, or its ranks have no GPUs.
    """
    run_folder(recipe, stage).frozen()
    if recipe.stages[stage].resources.gpus_per_rank == 0:
        raise ConfigError(
            f"--write: the ranks of stage {stage} have no GPUs, and what is recommended is for GPUs; set "
            "resources.gpus_per_rank=1 first, or leave --write out"
        )


def write_recommended(path: Path, recipe: Recipe, plan: StagePlan, overrides: Sequence[str] = ()) -> list[str]:
    """Write the recommended settings that differ from those of the file at `path`, each with where it is from.

    Args:
        path: of the recipe.
        recipe: as it was planned, with `overrides`.
        plan: of one of its stages.
        overrides: what was planned otherwise than the file has it, as `key=value`.

    Returns:
        What was written, and what was not and why, in lines for people.

    Raises:
        ConfigError: nothing fits, nor does anything that the stage may still change to, or the recipe cannot be edited;
            it is unchanged.
    """
    recommended = plan.recommended
    if not recommended.fits:
        raise ConfigError(
            f"--write: nothing was written to {path}, since not even one image of stage {plan.name} fits; plan other "
            "GPUs"
        )
    own = load_recipe(path).stages[plan.name]
    changes = {key: value for key, value in recommended.settings.items() if value != attrgetter(key)(own)}
    lines = []
    if run_folder(recipe, plan.name).frozen() is not None:
        if "batch.micro_size" in recommended.changes:
            raise ConfigError(
                f"--write: nothing was written to {path}, since only a smaller micro-batch fits and stage {plan.name} "
                "has begun with its own; plan other GPUs"
            )
        for key in MAKES_ANOTHER_RUN:
            if key in changes:
                value = changes.pop(key)
                lines.append(f"not written: {key}={value}, since stage {plan.name} has begun and would be another run")
    if not changes:
        return [*lines, f"nothing to write: stage {plan.name} of {path} has what is recommended"]
    cluster = plan.cluster
    kind = "measured" if plan.is_measured else "estimate"
    comment = f"by coatnet plan for {cluster.gpus} x {cluster.gpu.kind} of {cluster.memory / 1e9:g} GB, {kind}"
    if overrides:
        comment += f", with {', '.join(overrides)}"
    write_settings(path, plan.name, changes, printable(comment))
    written = ", ".join(f"{key}: {_shown(value)}" for key, value in changes.items())
    return [*lines, f"wrote to stage {plan.name} of {path}: {written}"]


def _shown(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
