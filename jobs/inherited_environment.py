"""Variables of something else in the environment of a command that starts ranks: said, and not passed on to them."""

import os

from jobs.console import print_warning
from jobs.rank_variables import rank_variables
from jobs.scheduler.environment import job_variables
from jobs.scheduler.job_end import is_in_job
from pipeline.monitoring.console import PrintableConsole


def discard_foreign_variables() -> None:
    """Remove those of other ranks, and of a Slurm job that this process does not belong to, from the environment."""
    if names := rank_variables(os.environ):
        _warn(
            f"{', '.join(f'{name}={os.environ[name]}' for name in names)}; "
            "this command starts all ranks of a stage itself"
        )
        _discard(names)
    discard_foreign_job()


def discard_foreign_job(*, quietly: bool = False) -> None:
    """Remove the variables of a Slurm job that this process does not belong to; `quietly` if another rank says so."""
    names = job_variables(os.environ)
    if not names or is_in_job(os.environ):
        return
    if not quietly:
        job = os.environ.get("SLURM_JOB_ID") or os.environ.get("SLURM_JOBID")
        shown = [name for name in names if name in ("SLURM_JOB_END_TIME", "SLURM_JOB_ID")] or names
        values = ", ".join(f"{name}={os.environ[name]}" for name in shown)
        more = f" and {len(names) - len(shown)} more" if len(names) > len(shown) else ""
        _warn(f"{values}{more}; " + (f"this process is not in Slurm job {job}" if job else "they name no Slurm job"))
    _discard(names)


def _warn(what: str) -> None:
    print_warning(PrintableConsole(stderr=True), f"ignored in the environment: {what}")


def _discard(names: list[str]) -> None:
    for name in names:
        del os.environ[name]
