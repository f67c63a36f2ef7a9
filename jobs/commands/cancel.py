"""`coatnet cancel`: end the jobs of a run."""

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from jobs.commands.status import RUN_HELP
from jobs.exit_codes import exit_on_error

if TYPE_CHECKING:
    from jobs.run_discovery import RunRef
    from jobs.scheduler.slurm import SlurmJob
    from jobs.scheduler.submissions import Submission


def cancel(
    target: Annotated[Path, typer.Argument(metavar="RECIPE|RUN", help=RUN_HELP)],
    stages: Annotated[
        list[str] | None, typer.Argument(metavar="[STAGE]...", help="Only these, and those that wait for them.")
    ] = None,
) -> None:
    """Cancel the jobs of a run, or of all runs of a sweep; ranks save first, as far as Slurm's KillWait lets them."""
    with exit_on_error("the same command tries again"):
        from jobs.run_discovery import chain_at, check_stages
        from jobs.scheduler import slurm

        runs = chain_at(target)
        check_stages(runs, stages or [])
        submitted = [(run, one) for run in runs for one in run.submissions.submissions()]
        jobs = slurm.jobs(one.job for _, one in submitted)
        live = [(run, one) for run, one in submitted if jobs[one.job].lives and jobs[one.job].state != "COMPLETING"]
        named = [one.job for run, one in live if _is_meant(run, one.stage, stages)]
        ended = _with_dependents(named, [one for _, one in live])
        slurm.cancel(ended)
        for run, one in live:
            if one.job in ended:
                name = f"{run.name} {one.stage}" if len(runs) > 1 else one.stage
                print(f"cancelled {name}, job {one.job}: {_was(jobs[one.job], follows=one.job not in named)}")
        if not ended:
            print(f"{target}: nothing to cancel, no job of it waits or runs")
            for run in runs:
                for stage in run.stages():
                    if _is_meant(run, stage, stages) and run.folder(stage).held():
                        print(f"{stage} runs without Slurm; Ctrl-C or SIGTERM stops it where it was started")


def _is_meant(run: "RunRef", stage: str, stages: list[str] | None) -> bool:
    return run.only in (None, stage) and (not stages or stage in stages)


def _with_dependents(named: list[str], live: "list[Submission]") -> list[str]:
    """The jobs named, and those submitted to wait until they are done, which would never start."""
    ended = list(named)
    for number in ended:  # grows on the way
        for one in live:
            if number in _waits_for(one.command) and one.job not in ended:
                ended.append(one.job)
    return ended


def _waits_for(command: list[str]) -> list[str]:
    """Numbers of the jobs that `sbatch` was told to wait for."""
    return re.findall(r":(\d+)", " ".join(word for word in command if word.startswith("--dependency=")))


def _was(job: "SlurmJob", *, follows: bool) -> str:
    if job.runs:
        return f"it runs on {job.nodes}; its ranks save and end" if job.nodes else "it runs; its ranks save and end"
    return "it waited for one of these" if follows else "it waited"
