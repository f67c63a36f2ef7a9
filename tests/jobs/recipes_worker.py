"""The only rank of the recipes' test: `python recipes_worker.py RECIPE [KEY=VALUE]... [-- RECIPE [KEY=VALUE]...]...`.

Trains all stages of each recipe in order, as `coatnet run` does with processes of their own for each stage.
"""

import itertools
import sys
from pathlib import Path

from pipeline.plan import TrainPlan, plan_stage
from pipeline.ranks.distributed import Ranks, join_ranks, leave_ranks
from pipeline.recipe.loader import load_recipe
from pipeline.runs.run_folder import final_checkpoint, run_folder, start_digest
from tests.support.training import train_here


def run(path: Path, overrides: list[str], ranks: Ranks) -> None:
    recipe = load_recipe(path, overrides)
    for name, stage in recipe.stages.items():
        folder, plan = run_folder(recipe, name), plan_stage(recipe, name, ranks.world_size)
        assert isinstance(plan, TrainPlan)
        folder.create()
        folder.freeze(plan, start_digest(recipe, name))
        start_from = final_checkpoint(recipe, stage.start_from) if stage.start_from else None
        train_here(plan, folder, ranks, start_from)


def main(arguments: list[str]) -> None:
    ranks = join_ranks(1)
    for is_end, words in itertools.groupby(arguments, key=lambda word: word == "--"):
        if not is_end:
            path, *overrides = words
            run(Path(path), overrides, ranks)


if __name__ == "__main__":
    main(sys.argv[1:])
    leave_ranks()
