"""The findings about a small recipe, and those among them that a test is about."""

from pathlib import Path

from jobs.preflight import assess_recipe
from pipeline.host import Host
from pipeline.preflight.finding import Finding
from pipeline.preflight.machine import Machine
from pipeline.recipe.loader import load_recipe
from tests.support.recipes import write_recipe

LARGE = Machine(Host(cores=64, memory=10**12, limited=False), gpus=())
"""A machine on which every recipe of these tests fits."""
STAGES = ["pretrain", "finetune", "evaluate"]


def found(
    folder: Path, shards: Path, *overrides: str, stages: list[str] | None = None, machine: Machine = LARGE
) -> list[Finding]:
    """All findings on `machine`, of `pretrain` alone unless others are named."""
    recipe = load_recipe(write_recipe(folder, shards), list(overrides))
    return list(assess_recipe(recipe, stages or ["pretrain"], slurm=False, machine=machine))


def the_finding(findings: list[Finding], beginning: str, where: str | None = None) -> Finding:
    """The one finding whose text starts with `beginning`."""
    (one,) = [f for f in findings if f.what.startswith(beginning) and where in (None, f.where)]
    return one


def wrong(findings: list[Finding]) -> list[Finding]:
    return [finding for finding in findings if finding.level != "ok"]
