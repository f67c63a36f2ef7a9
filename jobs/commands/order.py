"""`coatnet order`: which samples a step sees, on which rank."""

import json
from contextlib import closing
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from jobs.exit_codes import exit_on_error


def order(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="A YAML file.")],
    stage: str,
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Settings that replace those of the recipe.")
    ] = None,
    step: Annotated[
        int, typer.Option(min=0, help="Steps done before it, as in the names of checkpoints; 0 is the first.")
    ] = 0,
    world: Annotated[int | None, typer.Option(min=1, help="Ranks; by default those of the recipe.")] = None,
    rank: Annotated[int | None, typer.Option(min=0, help="Only this one; by default all.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Print the samples of one step: rank, position in the batch, shard, place in it, key.

    A sample that cannot be used is replaced when it is read; the run's event log names it.
    """
    from data.sample_reader import SampleReader
    from jobs.bundled_recipes import load_recipe
    from pipeline.errors import ConfigError
    from pipeline.plan import TrainPlan, plan_stage

    with exit_on_error():
        plan = plan_stage(load_recipe(recipe, overrides or []), stage, world, look_at_shards=False)
        if not isinstance(plan, TrainPlan):
            raise ConfigError(f"stage {stage} evaluates and has no steps; it reads all samples once, in their order")
        ranks = world or plan.stage.resources.ranks
        if rank is not None and rank >= ranks:
            raise ConfigError(f"--rank {rank}: of {ranks} ranks the last is {ranks - 1}")
        if step >= plan.steps:
            raise ConfigError(f"--step {step}: stage {stage} has {plan.steps} steps, so the last is {plan.steps - 1}")
        share = plan.order.batch // ranks
        first, last = (0, plan.order.batch) if rank is None else (rank * share, (rank + 1) * share)
        samples = plan.order.at(step, first, last)
        with closing(SampleReader(plan.train, plan.cache)) as reader:
            if reader.cached:
                reader.cached.request(sorted(set(samples.shard.tolist())), [])
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
        print(json.dumps(rows))
        return
    table = Table(title=f"{stage}: step {step} of {plan.steps}")
    for column in ("rank", "position", "shard", "index", "key"):
        table.add_column(column, justify="left" if column in ("shard", "key") else "right", overflow="fold")
    for row in rows:
        table.add_row(*(str(value) for value in row.values()))
    Console(highlight=False).print(table)
