"""`coatnet order`: which samples a step sees, on which rank."""

from contextlib import closing
from typing import Annotated

import typer

from data.sample_reader import SampleReader
from jobs.bundled_recipes import load_recipe
from jobs.commands.arguments import AsJson, Overrides, RecipePath, StageName
from jobs.console import make_console, make_table, print_json
from jobs.exit_codes import exit_on_error
from pipeline.errors import ConfigError
from pipeline.plan import TrainPlan, plan_stage


def order(
    recipe: RecipePath,
    stage: StageName,
    overrides: Overrides = None,
    step: Annotated[
        int, typer.Option(min=0, help="Number of steps completed before it, as in checkpoint names; 0 is the first.")
    ] = 0,
    world: Annotated[int | None, typer.Option(min=1, help="Number of ranks.", show_default="the recipe's")] = None,
    rank: Annotated[int | None, typer.Option(min=0, help="Show only this rank.", show_default="all")] = None,
    as_json: AsJson = False,
) -> None:
    """Print the samples of one step: rank, position in the batch, shard, index in the shard, key.

    A sample that cannot be used is replaced when it is read; the run's event log names it.
    """
    with exit_on_error():
        plan = plan_stage(load_recipe(recipe, overrides), stage, world, look_at_shards=False)
        if not isinstance(plan, TrainPlan):
            raise ConfigError(f"stage {stage} evaluates, so it has no steps; it reads all samples once, in index order")
        ranks = world or plan.stage.resources.ranks
        if rank is not None and rank >= ranks:
            raise ConfigError(f"--rank {rank}: there are {ranks} ranks, so the last is {ranks - 1}")
        if step >= plan.steps:
            raise ConfigError(f"--step {step}: stage {stage} has {plan.steps} steps, so the last is {plan.steps - 1}")
        order = plan.at(step).order
        share = order.batch // ranks
        first, last = (0, order.batch) if rank is None else (rank * share, (rank + 1) * share)
        samples = order.at(step, first, last)
        with closing(SampleReader(plan.train, plan.cache)) as reader:
            reader.request(sorted(set(samples.shard.tolist())))
            rows = [
                {
                    "rank": position // share,
                    "position": position,
                    "shard": plan.train.index.shards[shard].name,
                    "index": plan.train.place(shard, place),
                    "key": reader.key(shard, place),
                }
                for position, shard, place in zip(
                    range(first, last), samples.shard.tolist(), samples.place.tolist(), strict=True
                )
            ]
        if as_json:
            print_json(rows, indent=None)
            return
        table = make_table(*rows[0], right=("rank", "position", "index"), title=f"{stage}: step {step} of {plan.steps}")
        for row in rows:
            table.add_row(*map(str, row.values()))
        make_console().print(table)
