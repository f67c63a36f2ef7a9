"""`coatnet cancel`: end the jobs of a run."""

from collections.abc import Sequence
from typing import Annotated

import typer

from jobs.commands.arguments import RunPath
from jobs.console import make_console, print_line
from jobs.exit_codes import exit_on_error
from jobs.run_discovery import RunRef, check_stages, find_chain
from jobs.scheduler import slurm
from jobs.scheduler.slurm import SlurmJob
from jobs.scheduler.submissions import Submission, dependencies


def cancel(
    target: RunPath,
    stages: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[STAGE]...", help="Cancel only these, and jobs that wait for them.", show_default="all"
        ),
    ] = None,
) -> None:
    """Cancel the jobs of a run or a sweep; running ranks save first if Slurm's KillWait allows."""
    with exit_on_error("the same command tries again"):
        console = make_console()
        runs = find_chain(target)
        check_stages(runs, stages or [])
        submitted = [(run, submission) for run in runs for submission in run.submissions.submissions()]
        jobs = slurm.jobs(submission.job for _, submission in submitted)
        live = [
            (run, submission)
            for run, submission in submitted
            if jobs[submission.job].lives and jobs[submission.job].state != "COMPLETING"
        ]
        chosen = [submission.job for run, submission in live if _selects(run, submission.stage, stages)]
        ended = _with_dependents(chosen, [submission for _, submission in live])
        slurm.cancel(ended)
        for run, submission in live:
            if submission.job in ended:
                name = f"{run.name} {submission.stage}" if len(runs) > 1 else submission.stage
                was = _description(jobs[submission.job], is_dependent=submission.job not in chosen)
                print_line(console, f"cancelled {name}, job {submission.job}: {was}")
        if not ended:
            print_line(console, f"{target}: nothing to cancel: none of its jobs is waiting or running")
            for run in runs:
                for stage in run.stages():
                    if _selects(run, stage, stages) and run.folder(stage).held():
                        print_line(
                            console, f"{stage} runs without Slurm; stop it where it was started, with Ctrl-C or SIGTERM"
                        )


def _selects(run: RunRef, stage: str, stages: list[str] | None) -> bool:
    return run.only in (None, stage) and (not stages or stage in stages)


def _with_dependents(chosen: Sequence[str], live: Sequence[Submission]) -> list[str]:
    """The chosen jobs and those that wait for them, which would never start."""
    ended = list(chosen)
    for number in ended:  # the list grows meanwhile
        for submission in live:
            if number in dependencies(submission.command) and submission.job not in ended:
                ended.append(submission.job)
    return ended


def _description(job: SlurmJob, *, is_dependent: bool) -> str:
    if job.runs:
        return f"it runs on {job.nodes}; its ranks save and end" if job.nodes else "it runs; its ranks save and end"
    return "it was waiting for one of these" if is_dependent else "it was waiting"
