"""`coatnet submit`: a recipe, or a sweep over one, as Slurm jobs."""

import os
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from jobs.bundled_recipes import load_recipe
from jobs.commands.arguments import Extend, Overrides, RecipePath
from jobs.console import make_console, make_table, print_line, print_warning
from jobs.exit_codes import exit_on_error
from jobs.frozen_recipe import frozen_recipe
from jobs.packages import outside_environment
from jobs.scheduler import slurm
from jobs.scheduler.chain_jobs import SubmitResult, as_script, chain_jobs, refuse_living_jobs, submit_chain
from jobs.scheduler.environment import dropped_variables, submission_findings
from jobs.scheduler.faulty_nodes import faulty_nodes_of
from jobs.scheduler.submissions import SubmissionFolder, submission_folder
from jobs.sweep import record, sweep_file, variations
from pipeline.errors import ConfigError
from pipeline.monitoring.console import PrintableConsole
from pipeline.preflight.finding import Finding
from pipeline.recipe.schema import Recipe

if TYPE_CHECKING:  # of what takes a second to import, a plain submission needs nothing
    from pipeline.runs.extension import Extension


def submit(
    recipe: RecipePath,
    overrides: Overrides = None,
    sweep: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY=VALUE,VALUE", help="Submit a run for each value; given several times, for each combination."
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the exact sbatch commands without running them.")
    ] = False,
    extend: Extend = False,
    all_nodes: Annotated[
        bool, typer.Option("--all-nodes", help="Also use nodes that computed wrong values in this run.")
    ] = False,
    doctor: Annotated[
        bool, typer.Option(help="Check the recipe first as `coatnet doctor` does, and refuse one with errors.")
    ] = True,
) -> None:
    """Submit all stages to Slurm; run again, submit only those that failed or are new."""
    with exit_on_error("the same command submits the rest"):
        console = make_console()
        base = load_recipe(recipe, overrides)
        runs = [base]
        if sweep:
            found = variations(base.name, sweep)
            runs = [load_recipe(recipe, [*(overrides or []), *variation.overrides]) for variation in found]
        for finding in submission_findings(outside_environment()):
            _print_remark(finding)
        if doctor:
            if slurm.has_commands():  # without an answer, no recipe is wrong
                slurm.find_cluster()
            without_slurm = dry_run and not slurm.has_commands()
            _refuse_errors(recipe, runs, extend=extend, all_nodes=all_nodes, without_slurm=without_slurm)
        shards = submission_folder(base)
        chains = [(run, submission_folder(run)) for run in runs]
        changes = {run.name: _extensions(run) if extend else [] for run in runs}
        without = {run.name: _without_faulty(run, all_nodes=all_nodes) for run in runs}
        if dry_run:
            if dropped := dropped_variables(outside_environment()):
                print(f"unset {' '.join(dropped)}")
            for run, folder in chains:
                print(
                    f"# {run.name}, with the recipe as {str(frozen_recipe(run).path)!r}"
                )  # quoted: a comment is one line
                for change in changes[run.name]:
                    for line in change.lines:
                        print(f"# {change.plan.name} {line}")
                extended = [change.plan.name for change in changes[run.name]]
                print(as_script(chain_jobs(run, folder, (base, shards), extended, without[run.name])))
            return
        with shards.lock():
            if extend:
                from jobs.chain import record_extensions

                for run, folder in chains:
                    extended = [change.plan.name for change in changes[run.name]]
                    chain = chain_jobs(run, folder, (base, shards), extended, without[run.name])
                    refuse_living_jobs(chain, run, folder)
                record_extensions([change for run in runs for change in changes[run.name]], console)
            if sweep:
                record(sweep_file(base), found)
            for run, folder in chains:
                chain = chain_jobs(run, folder, (base, shards), without=without[run.name])
                results = submit_chain(chain, run, folder, shards)
                console.print(_table(run, results))
        _show_next_commands(recipe, base, [folder for _, folder in chains], console)


def _extensions(recipe: Recipe) -> list["Extension"]:
    from pipeline.runs.extension import extension

    found = (extension(recipe, name) for name in recipe.stages)
    return [change for change in found if change]


def _without_faulty(run: Recipe, *, all_nodes: bool) -> list[str]:
    """The nodes that new jobs of a run are not to use; says which, why, and how to use them again."""
    found = faulty_nodes_of(run)
    for node in found:
        taken = "may run on" if all_nodes else "are without"
        undo = "" if all_nodes else "; once it is repaired, --all-nodes submits jobs that may use it"
        print_line(PrintableConsole(stderr=True), f"{run.name}: new jobs {taken} {node.name}: {node.text}{undo}")
    return [] if all_nodes else [node.name for node in found]


def _refuse_errors(recipe: Path, runs: Sequence[Recipe], *, extend: bool, all_nodes: bool, without_slurm: bool) -> None:
    """Check each run: print warnings, refuse errors; `without_slurm`, say that Slurm was not asked."""
    from jobs.preflight import assess_recipe  # torch, which --no-doctor does without
    from jobs.scheduler.dry_run import NO_SLURM

    if without_slurm:
        print_warning(
            PrintableConsole(stderr=True),
            "Slurm is not on this machine, so it was not asked whether it would take these jobs",
        )
    found = dict.fromkeys(
        finding
        for run in runs
        for finding in assess_recipe(run, list(run.stages), slurm=True, extend=extend, all_nodes=all_nodes)
    )
    if without_slurm:
        found.pop(NO_SLURM, None)
    for finding in found:
        if finding.level == "warning":
            _print_remark(finding)
    errors = [finding.line for finding in found if finding.level == "error"]
    if errors:
        more = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
        raise ConfigError(
            f"{errors[0]}{more}; nothing was submitted. coatnet doctor {shlex.quote(str(recipe))} lists everything; "
            "--no-doctor submits regardless"
        )


def _print_remark(finding: Finding) -> None:
    stderr = PrintableConsole(stderr=True)
    if finding.level == "warning":
        print_warning(stderr, finding.line)
    else:
        print_line(stderr, finding.line)


def _table(recipe: Recipe, results: Sequence[SubmitResult]) -> Table:
    table = make_table("stage", "job", "after", "", title=recipe.name)
    for result in results:
        action = f"{result.action}: {result.remark}" if result.remark else result.action
        table.add_row(result.job.name, result.number or "-", result.job.waits_for or "-", action)
    return table


def _show_next_commands(recipe: Path, base: Recipe, folders: Sequence[SubmissionFolder], console: Console) -> None:
    first = folders[0].path
    run = recipe if len(folders) == 1 else os.path.relpath(first.parent)
    for what, command in (
        ("Watch", f"coatnet status --watch {shlex.quote(str(recipe))}"),
        ("Follow logs", f"coatnet logs -f {shlex.quote(str(run))}"),
        ("Plot curves", f"coatnet tensorboard {shlex.quote(str(run))}"),
        ("Logs of jobs", str(first)),
    ):
        print_line(console, f"{what + ':':15}{command}")
