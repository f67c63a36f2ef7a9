"""`coatnet doctor`: what would go wrong with a recipe, before hours of GPUs are spent on it."""

import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from data.errors import EXIT_CONFIG
from jobs.exit_codes import end_process, exit_on_error
from pipeline.errors import ConfigError, SeveralErrors
from pipeline.faults.preemption import StopSignals

if TYPE_CHECKING:
    from pipeline.preflight.finding import Finding

_COLOURS = {"ok": "green", "warning": "yellow", "error": "bold red"}


def doctor(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="A YAML file.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Settings that replace those of the recipe.")
    ] = None,
    stage: Annotated[str | None, typer.Option(metavar="STAGE", help="Only this one; by default all.")] = None,
    nodes: Annotated[
        bool, typer.Option("--nodes", help="Try the nodes, too, of the first training stage or of STAGE: a short job.")
    ] = False,
    seconds: Annotated[float, typer.Option(min=0.1, help="How long readers run on the nodes.")] = 10.0,
    as_json: Annotated[bool, typer.Option("--json", help="For programs: a list of objects.")] = False,
    report: Annotated[Path | None, typer.Option(hidden=True, help="Be a rank on the nodes, and write here.")] = None,
) -> None:
    """Look for all that would stop or slow down a recipe, each with the fix; exits with 78 if there are errors."""
    with StopSignals(end_process) as signals, exit_on_error("nothing was changed"):
        if report is not None:
            _be_a_rank(recipe, overrides or [], stage or "", report, seconds, signals)
            return
        console = Console(highlight=False)
        with console.status("looking") as status:
            findings = _examined(recipe, overrides or [], stage, nodes, seconds, signals, status.update)
        if as_json:
            print(json.dumps([asdict(finding) for finding in findings], indent=1))
        else:
            # A pipe has no width to keep to.
            Console(highlight=False, width=None if sys.stdout.isatty() else 170).print(table(findings))
            console.print(summary(findings))
        if any(finding.level == "error" for finding in findings):
            sys.exit(EXIT_CONFIG)


def table(findings: "Sequence[Finding]") -> Table:
    """One row for each."""
    result = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1))
    for heading in ("", "stage", "what", "fix"):
        result.add_column(heading, overflow="fold")
    for finding in findings:
        level = Text(finding.level, _COLOURS[finding.level])
        result.add_row(level, finding.where, Text(finding.what), Text(finding.fix))
    return result


def summary(findings: "Sequence[Finding]") -> str:
    """How many errors and warnings."""
    levels = [finding.level for finding in findings]
    counts = [(levels.count(level), level) for level in ("error", "warning")]
    return ", ".join(f"{count} {level}{'' if count == 1 else 's'}" for count, level in counts)


def _examined(
    path: Path,
    overrides: list[str],
    stage: str | None,
    nodes: bool,
    seconds: float,
    signals: StopSignals,
    say: Callable[[str], None],
) -> "list[Finding]":
    from jobs.bundled_recipes import load_recipe
    from jobs.preflight import examine
    from jobs.scheduler import slurm
    from pipeline.preflight.finding import finding_of_error
    from pipeline.recipe.schema import TrainStage

    try:
        loaded = load_recipe(path, overrides)
    except SeveralErrors as errors:
        return [finding_of_error("", ConfigError(problem)) for problem in errors.problems]
    except ConfigError as error:
        return [finding_of_error("", error)]
    stages = [stage] if stage is not None else list(loaded.stages)
    findings = list(examine(loaded, stages, slurm=slurm.available()))
    if nodes:
        from jobs.scheduler.node_check import check_nodes

        training = [name for name in stages if isinstance(loaded.stages[name], TrainStage)]
        findings += check_nodes(loaded, (training or stages)[0], seconds, signals, say)
    return findings


def _be_a_rank(
    path: Path, overrides: list[str], stage: str, report: Path, seconds: float, signals: StopSignals
) -> None:
    from jobs.bundled_recipes import load_recipe
    from jobs.launch import die_with_launcher
    from jobs.scheduler.job_end import node_name

    die_with_launcher()
    from pipeline.preflight.nodes import run_node_checks
    from pipeline.run_folder import RunFolder

    folder = RunFolder(report.with_suffix(""))
    node = node_name(os.environ)
    run_node_checks(load_recipe(path, overrides), stage, folder, report, seconds, signals, node)
