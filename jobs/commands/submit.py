"""`coatnet submit`: a recipe, or a sweep over one, as Slurm jobs."""

import os
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from jobs.exit_codes import exit_on_error
from pipeline.errors import ConfigError

if TYPE_CHECKING:
    from jobs.scheduler.chain_jobs import Submitted
    from jobs.scheduler.submissions import SubmissionFolder
    from pipeline.recipe.schema import Recipe


def submit(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="A YAML file.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Settings that replace those of the recipe.")
    ] = None,
    sweep: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=VALUE,VALUE", help="A run for each value; several give all combinations."),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the exact sbatch commands, and do nothing.")
    ] = False,
    doctor: Annotated[
        bool, typer.Option(help="Look for mistakes first, as `coatnet doctor` does, and refuse them.")
    ] = True,
) -> None:
    """Submit all stages to Slurm; called again, leave done and running ones alone and submit what failed."""
    with exit_on_error("the same command goes on from there"):
        from jobs.bundled_recipes import load_recipe
        from jobs.scheduler.chain_jobs import chain_steps, script_of, submit_chain
        from jobs.scheduler.submissions import submission_folder
        from jobs.sweep import record, sweep_file, variations

        console = Console(highlight=False)
        base = load_recipe(recipe, overrides)
        runs = [base]
        if sweep:
            found = variations(base.name, sweep)
            runs = [load_recipe(recipe, [*(overrides or []), *variation.overrides]) for variation in found]
        if doctor:
            _refuse_mistakes(recipe, runs)
        shards = submission_folder(base)
        chains = [(run, submission_folder(run)) for run in runs]
        if dry_run:
            for run, folder in chains:
                print(f"# {run.name}, with the recipe as {str(folder.recipe)!r}")  # a comment is one line
                print(script_of(chain_steps(run, folder, (base, shards))))
            return
        with shards.lock():
            if sweep:
                record(sweep_file(base), found)
            for run, folder in chains:
                came = submit_chain(chain_steps(run, folder, (base, shards)), run, folder, shards)
                console.print(_table(run, came))
        _say_where(recipe, base, [folder for _, folder in chains], console)


def _refuse_mistakes(recipe: Path, runs: Sequence["Recipe"]) -> None:
    """Examine each run; warnings are shown, errors refused."""
    from jobs.preflight import examine

    aside = Console(stderr=True, highlight=False)
    found = dict.fromkeys(finding for run in runs for finding in examine(run, list(run.stages), slurm=True))
    for finding in found:
        if finding.level == "warning":
            aside.print(Text.assemble(("warning: ", "yellow"), finding.line), soft_wrap=True)
    errors = [finding.line for finding in found if finding.level == "error"]
    if errors:
        more = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
        raise ConfigError(
            f"{errors[0]}{more}; nothing was submitted. coatnet doctor {shlex.quote(str(recipe))} tells all; "
            "--no-doctor submits it all the same"
        )


def _table(recipe: "Recipe", came: Sequence["Submitted"]) -> Table:
    table = Table(title=Text(recipe.name, "bold"), title_justify="left")
    for heading in ("stage", "job", "after", ""):
        table.add_column(heading, overflow="fold")
    for one in came:
        what = f"{one.what}: {one.remark}" if one.remark else one.what
        table.add_row(one.step.name, one.job or "-", one.step.waits_for or "-", what)
    return table


def _say_where(recipe: Path, base: "Recipe", folders: Sequence["SubmissionFolder"], console: Console) -> None:
    first = folders[0].path
    one = recipe if len(folders) == 1 else os.path.relpath(first.parent)
    for what, where in (
        ("Watch them", f"coatnet status --watch {shlex.quote(str(recipe))}"),
        ("What they say", f"coatnet logs -f {shlex.quote(str(one))}"),
        ("Curves", f"tensorboard --logdir {shlex.quote(base.runs)}"),
        ("Logs of jobs", str(first)),
    ):
        console.print(f"{what + ':':15}{where}", soft_wrap=True, markup=False)
