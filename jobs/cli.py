"""The `coatnet` command."""

import os
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from jobs.commands.bench import bench
from jobs.commands.cancel import cancel
from jobs.commands.checkpoints import checkpoints
from jobs.commands.doctor import doctor
from jobs.commands.export import export
from jobs.commands.logs import logs
from jobs.commands.models import models
from jobs.commands.order import order
from jobs.commands.recipes import recipes
from jobs.commands.shards.build import shards
from jobs.commands.shards.inspect import index, show, verify
from jobs.commands.status import status
from jobs.commands.submit import submit
from jobs.exit_codes import end_process, exit_on_error
from pipeline.faults.preemption import StopSignals

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Pretrain and fine-tune CoAtNet.",
)
for command in (index, verify, show):
    shards.command()(command)
app.add_typer(shards, name="shards")
app.add_typer(bench, name="bench")
app.add_typer(recipes, name="recipes")
app.add_typer(checkpoints, name="checkpoints")
app.command()(models)
app.command()(order)
app.command()(export)
app.command()(status)
app.command()(cancel)
app.command()(logs)
app.command()(doctor)
app.command()(submit)

RecipePath = Annotated[Path, typer.Argument(metavar="RECIPE", help="A YAML file.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Settings that replace those of the recipe.")
]


@app.command()
def run(recipe: RecipePath, overrides: Overrides = None) -> None:
    """Run all stages of a recipe on this machine; called again, continue where it stopped."""
    with StopSignals(end_process) as signals, exit_on_error():
        from jobs.chain import run_chain

        run_chain(recipe, overrides or [], Console(highlight=False), signals)


@app.command()
def train(recipe: RecipePath, stage: str, overrides: Overrides = None) -> None:
    """Run one stage: as its ranks on this machine, or as one rank where RANK and WORLD_SIZE are set."""
    with StopSignals(end_process) as signals, exit_on_error():
        from jobs.bundled_recipes import load_recipe
        from jobs.launch import die_with_launcher, is_rank, launch_time

        if is_rank():
            die_with_launcher()
            from jobs.scheduler.job_end import job_end_time, node_name
            from pipeline.stage import run_stage

            run_stage(
                load_recipe(recipe, overrides),
                stage,
                signals,
                node=node_name(os.environ),
                started=launch_time(signals.started),
                job_end_time=lambda: job_end_time(os.environ),
            )
        else:
            from jobs.chain import result_table, run_one

            loaded, console = load_recipe(recipe, overrides), Console(highlight=False)
            run_one(loaded, stage, recipe, overrides or [], console, signals)
            console.print(result_table(loaded))


@app.command()
def demo(
    folder: Annotated[Path, typer.Argument(help="Folder for images, shards and runs.")] = Path("demo"),
    overrides: Overrides = None,
) -> None:
    """Pretrain, fine-tune and evaluate a small CoAtNet on 10,000 real product photos; minutes on two CPU cores."""
    with StopSignals(end_process) as signals, exit_on_error():
        from jobs.commands.demo import run_demo

        run_demo(folder, overrides or [], Console(highlight=False), signals)


def main() -> None:
    """Entry point of the `coatnet` command."""
    app()
