"""Small recipes for nodes without GPUs, and their submission."""

from pathlib import Path
from typing import Any

import yaml

from jobs.scheduler.submissions import Submission, SubmissionFolder
from tests.support.command import coatnet
from tests.support.recipes import write_recipe

TWO_NODES = {"nodes": 2, "ranks": 2, "gpus_per_rank": 0, "cpus_per_rank": 1}


def write_chain(folder: Path, shards: Path, **changes: Any) -> Path:
    """`write_recipe` on two nodes without GPUs."""
    return write_recipe(folder, shards, resources=TWO_NODES, **changes)


def with_top_level(recipe: Path, **settings: Any) -> Path:
    """The recipe with settings beside its stages, such as `shards` and `runs`."""
    recipe.write_text(yaml.safe_dump({**settings, **yaml.safe_load(recipe.read_text())}, sort_keys=False))
    return recipe


def submit(recipe: Path, *arguments: str) -> str:
    """Run `coatnet submit`, which must succeed; returns its output."""
    done = coatnet("submit", recipe, *arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout


def submitted(runs: Path, name: str = "test") -> dict[str, Submission]:
    """The newest job of each stage of a recipe, shards included."""
    return SubmissionFolder(runs / name / "slurm").newest()
