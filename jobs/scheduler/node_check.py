"""Checks a stage's nodes from here: by a short Slurm job, or by ranks on this machine."""

import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from data.errors import CoatnetError
from jobs.exit_codes import StageFailed, end_process
from jobs.inherited_environment import discard_foreign_variables
from jobs.launch import launch_ranks, refuse_other_machines
from jobs.scheduler import slurm
from jobs.scheduler.chain_jobs import batch_script, chain_jobs
from jobs.scheduler.submissions import SubmissionFolder
from pipeline.errors import ConfigError, stop_exit_code
from pipeline.faults.preemption import StopSignals
from pipeline.preflight.finding import Finding, finding_of_error
from pipeline.preflight.report import read_report
from pipeline.recipe.schema import Recipe
from pipeline.runs.run_folder import RunFolder

FOLDER = "doctor"
"""In the folder of a recipe's runs: the recipe as it was checked, logs, and findings."""
_LIMIT_MINUTES = 10
"""Beside the burn-in and the readers."""
_FIRST_POLL, _LAST_POLL = 0.5, 5.0  # seconds between queries about the job
_REPORT_DELAY = 20.0  # seconds until a file written on a node is visible here


@dataclass(frozen=True, slots=True)
class _NodeCheck:
    """One check of the nodes of a stage."""

    recipe: Recipe
    stage: str
    folder: SubmissionFolder
    report: Path
    seconds: float
    arguments: list[str]
    """Of the `coatnet` command of each rank."""
    signals: StopSignals
    show_progress: Callable[[str], None]


def check_nodes(
    recipe: Recipe, stage: str, seconds: float, signals: StopSignals, show_progress: Callable[[str], None]
) -> list[Finding]:
    """Check what the nodes of a stage can do; a burn-in lasts for `seconds`, and then their readers run as long."""
    folder = SubmissionFolder(Path(recipe.runs) / recipe.name / FOLDER)
    report = folder.path / f"{stage}.jsonl"
    arguments = ["doctor", str(folder.recipe), "--stage", stage, f"--seconds={seconds:g}", f"--report={report}"]
    check = _NodeCheck(recipe, stage, folder, report, seconds, arguments, signals, show_progress)
    try:
        with folder.lock():
            folder.freeze(recipe)
            report.unlink(missing_ok=True)
            return _check_by_slurm(check) if slurm.has_cluster() else _check_here(check)
    except (ConfigError, slurm.SchedulerDown) as error:
        return [*read_report(report)[0], finding_of_error(stage, error)]


def _check_here(check: _NodeCheck) -> list[Finding]:
    stage, logs = check.recipe.stages[check.stage], RunFolder(check.folder.path / check.stage)
    refuse_other_machines(check.stage, stage)
    discard_foreign_variables()
    logs.logs.mkdir(parents=True, exist_ok=True)
    check.show_progress(f"{stage.resources.ranks} ranks check this machine")
    try:
        launch_ranks(check.arguments, stage, logs, check.signals)
    except StageFailed as failed:
        what = f"the node check ended early: {failed.outcome.message}"
        return [*read_report(check.report)[0], Finding("error", check.stage, what, f"see the logs in {logs.logs}")]
    return read_report(check.report)[0]


def _check_by_slurm(check: _NodeCheck) -> list[Finding]:
    recipe, folder = check.recipe, check.folder
    stage_job = next(job for job in chain_jobs(recipe, folder, (recipe, folder)) if job.name == check.stage)
    log = folder.log(check.stage)
    log.unlink(missing_ok=True)
    limit = _LIMIT_MINUTES + int(2 * check.seconds / 60)
    own = [f"--job-name={recipe.name}.{FOLDER}", f"--time={limit}", "--signal=USR2@30", "--no-requeue"]
    options = [*stage_job.options, *own]  # of an option given twice, the last counts
    script = str(Path(batch_script(recipe.stages[check.stage])).with_name("doctor.sbatch"))
    command = ["sbatch", "--parsable", *options, script, *check.arguments[1:]]
    with ThreadPoolExecutor(1) as pool:  # a signal does not reach it: what sbatch has submitted becomes known
        submission = pool.submit(slurm.submit, command, stage_job.variables)

        cancelling = threading.Lock()

        def cancel(received: signal.Signals) -> None:
            with cancelling:
                code, stopped = stop_exit_code(received.name), f"stopped by {received.name}"
                if submission.exception() is not None:  # Ctrl-C has ended sbatch, too
                    end_process(code, f"{stopped}; no job was submitted")
                number = submission.result()
                try:
                    slurm.cancel([number])
                except CoatnetError as error:
                    end_process(
                        code, f"{stopped}; job {number} may still run, cancel it with `scancel {number}`: {error}"
                    )
                end_process(code, f"{stopped}; job {number} is cancelled")

        check.signals.set_handler(cancel)
        try:
            job = _wait(submission.result(), check.show_progress)
            with cancelling:  # a signal that has ended the job ends this process, too
                pass
        except BaseException:
            if submission.exception() is None:
                slurm.cancel([submission.result()])
            raise
        finally:
            check.signals.set_handler(None)
    found, is_complete = read_report(check.report)
    deadline = time.monotonic() + _REPORT_DELAY
    while not is_complete and job.state in ("COMPLETED", "UNKNOWN") and time.monotonic() < deadline:
        time.sleep(_FIRST_POLL)
        found, is_complete = read_report(check.report)
    if not is_complete:
        what = f"the node check, job {submission.result()}, ended as {job.state}: {_last_line(log)}"
        found.append(Finding("error", check.stage, what, f"see {log}"))
    return found


def _wait(number: str, show_progress: Callable[[str], None]) -> slurm.SlurmJob:
    """Wait until the job is over; a controller that does not answer for a while is asked again."""
    pause = _FIRST_POLL
    while True:
        try:
            job = slurm.jobs([number])[number]
        except slurm.SchedulerDown as error:
            show_progress(f"job {number}: {error}")
        else:
            if not job.lives:
                return job
            reason = f", {job.reason}" if job.reason else ""
            show_progress(f"job {number} waits{reason}" if job.waits else f"job {number} checks {job.nodes}")
        time.sleep(pause)
        pause = min(1.2 * pause, _LAST_POLL)


def _last_line(log: Path) -> str:
    try:
        lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    except OSError:
        lines = []
    return lines[-1] if lines else "its log is empty"
