"""`coatnet doctor`: what would go wrong with a recipe, before hours of GPUs are spent on it."""

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from data.errors import EXIT_CONFIG
from data.text.counted import counted
from jobs.bundled_recipes import load_recipe
from jobs.commands.arguments import AsJson, Extend, Overrides, RecipePath
from jobs.console import make_console, make_table, print_json
from jobs.exit_codes import end_process, exit_on_error
from jobs.launch import die_with_launcher
from jobs.packages import outside_environment
from jobs.preflight import assess_recipe
from jobs.scheduler import slurm
from jobs.scheduler.environment import submission_findings
from jobs.scheduler.job_end import node_name
from jobs.scheduler.node_check import check_nodes
from pipeline.errors import ConfigError, SeveralErrors
from pipeline.faults.preemption import StopSignals
from pipeline.monitoring.console import styled_text
from pipeline.preflight.finding import Finding, finding_of_error
from pipeline.recipe.schema import Recipe, TrainStage
from pipeline.runs.run_folder import RunFolder

_COLOURS = {"ok": "green", "warning": "yellow", "error": "bold red"}


def doctor(
    recipe: RecipePath,
    overrides: Overrides = None,
    stage: Annotated[
        str | None, typer.Option(metavar="STAGE", help="Check only this stage.", show_default="all")
    ] = None,
    nodes: Annotated[
        bool,
        typer.Option("--nodes", help="Also test the nodes of STAGE, else of the first training stage: a short job."),
    ] = False,
    seconds: Annotated[
        float, typer.Option(min=0.1, help="How long to run the burn-in on the nodes, and then the readers.")
    ] = 10.0,
    extend: Extend = False,
    as_json: AsJson = False,
    report: Annotated[Path | None, typer.Option(hidden=True, help="Be one rank of the node test; write here.")] = None,
) -> None:
    """Check a recipe for everything that would stop it or slow it down, with fixes.

    Exits with 78 if there are errors.
    """
    with StopSignals(end_process, "nothing was changed") as signals, exit_on_error(signals=signals):
        if report is not None:
            die_with_launcher()
            from pipeline.preflight.nodes import run_node_checks  # torch, which only the ranks need

            logs = RunFolder(report.with_suffix(""))
            node = node_name(os.environ)
            run_node_checks(load_recipe(recipe, overrides), stage or "", logs, report, seconds, signals, node)
            return
        console = make_console()
        with console.status("checking") as status:
            try:
                loaded = load_recipe(recipe, overrides)
            except SeveralErrors as errors:
                findings = [finding_of_error("", ConfigError(problem)) for problem in errors.problems]
            except ConfigError as error:
                findings = [finding_of_error("", error)]
            else:
                stages = [stage] if stage is not None else list(loaded.stages)
                findings = _assess(loaded, stages, extend)
                if nodes:
                    findings += _check_nodes(
                        loaded, stages, seconds, signals, lambda text: status.update(styled_text(text))
                    )
        if as_json:
            print_json([asdict(finding) for finding in findings])
        else:
            console.print(table(findings))
            console.print(summary(findings))
        if any(finding.level == "error" for finding in findings):
            sys.exit(EXIT_CONFIG)


def table(findings: Sequence[Finding]) -> Table:
    """A row for each finding."""
    result = make_table("", "stage", "what", "fix")
    for finding in findings:
        level = Text(finding.level, _COLOURS[finding.level])
        result.add_row(level, finding.where, finding.what, finding.fix)
    return result


def summary(findings: Sequence[Finding]) -> str:
    """The numbers of errors and warnings."""
    levels = [finding.level for finding in findings]
    counts = [(levels.count(level), level) for level in ("error", "warning")]
    return ", ".join(counted(count, level) for count, level in counts)


def _assess(recipe: Recipe, stages: Sequence[str], extend: bool) -> list[Finding]:
    has_cluster = slurm.has_cluster()
    found = list(assess_recipe(recipe, stages, slurm=has_cluster, extend=extend))
    if has_cluster:
        return found + submission_findings(outside_environment())
    if slurm.has_commands():
        what = "Slurm's commands are on this machine and find no cluster: stages were checked for a run on this machine"
        fix = "to submit them, use a machine of the cluster, or set SLURM_CONF to its slurm.conf"
        found.append(Finding("warning", "", what, fix))
    return found


def _check_nodes(
    recipe: Recipe, stages: Sequence[str], seconds: float, signals: StopSignals, show_progress: Callable[[str], None]
) -> list[Finding]:
    training = [name for name in stages if isinstance(recipe.stages[name], TrainStage)]
    return check_nodes(recipe, (training or stages)[0], seconds, signals, show_progress)
