"""The examination of a stage's nodes, started from here: as a short Slurm job, or as ranks of this machine."""

import signal
import time
from collections.abc import Callable
from pathlib import Path

from data.errors import EXIT_TRY_AGAIN
from jobs.exit_codes import StageFailed, end_process
from jobs.launch import launch_ranks, refuse_other_machines
from jobs.scheduler import slurm
from jobs.scheduler.chain_jobs import chain_steps, template
from jobs.scheduler.submissions import SubmissionFolder
from pipeline.errors import ConfigError
from pipeline.faults.preemption import StopSignals
from pipeline.preflight.finding import Finding, finding_of_error
from pipeline.preflight.report import read_report
from pipeline.recipe.schema import Recipe
from pipeline.run_folder import RunFolder

FOLDER = "doctor"
"""In the folder of a recipe's runs: the recipe as it was examined, logs, and what was found."""
_TIME_LIMIT = "0:10:00"
_FIRST_POLL, _LAST_POLL = 0.5, 5.0  # seconds between looks at the job
_PATIENCE = 20.0  # seconds in which what a node wrote is seen here


def check_nodes(
    recipe: Recipe, name: str, seconds: float, signals: StopSignals, say: Callable[[str], None]
) -> list[Finding]:
    """What the nodes of stage `name` can do; readers run for so many seconds. `say` is told how it goes."""
    folder = SubmissionFolder(Path(recipe.runs) / recipe.name / FOLDER)
    report = folder.path / f"{name}.jsonl"
    try:
        with folder.lock():
            folder.freeze(recipe)
            report.unlink(missing_ok=True)
            arguments = ["doctor", str(folder.recipe), "--stage", name, f"--seconds={seconds:g}", f"--report={report}"]
            if slurm.available():
                return _by_slurm(recipe, name, folder, arguments, report, signals, say)
            return _here(recipe, name, folder, arguments, report, signals, say)
    except (ConfigError, slurm.SchedulerDown) as error:
        return [*read_report(report)[0], finding_of_error(name, error)]


def _here(
    recipe: Recipe,
    name: str,
    folder: SubmissionFolder,
    arguments: list[str],
    report: Path,
    signals: StopSignals,
    say: Callable[[str], None],
) -> list[Finding]:
    stage, logs = recipe.stages[name], RunFolder(folder.path / name)
    refuse_other_machines(name, stage)
    logs.logs.mkdir(parents=True, exist_ok=True)
    say(f"{stage.resources.ranks} ranks examine this machine")
    try:
        launch_ranks(arguments, stage, logs, signals)
    except StageFailed as failed:
        what = f"the examination ended early: {failed.outcome.message}"
        return [*read_report(report)[0], Finding("error", name, what, f"see the logs in {logs.logs}")]
    return read_report(report)[0]


def _by_slurm(
    recipe: Recipe,
    name: str,
    folder: SubmissionFolder,
    arguments: list[str],
    report: Path,
    signals: StopSignals,
    say: Callable[[str], None],
) -> list[Finding]:
    step = next(step for step in chain_steps(recipe, folder, (recipe, folder)) if step.name == name)
    log = folder.log(name)
    log.unlink(missing_ok=True)
    own = [f"--job-name={recipe.name}.{FOLDER}", f"--time={_TIME_LIMIT}", "--signal=USR2@30", "--no-requeue"]
    options = [*step.options, *own]  # of an option given twice, the last counts
    script = str(Path(template(recipe.stages[name])).with_name("doctor.sbatch"))
    number = slurm.submit(["sbatch", "--parsable", *options, script, *arguments[1:]], step.variables)

    def stopped(received: signal.Signals) -> None:
        slurm.cancel([number])
        end_process(EXIT_TRY_AGAIN, f"stopped by {received.name}; job {number} is cancelled")

    signals.set_handler(stopped)
    try:
        job = _wait(number, say)
    except BaseException:
        slurm.cancel([number])
        raise
    finally:
        signals.set_handler(None)
    found, whole = read_report(report)
    deadline = time.monotonic() + _PATIENCE
    while not whole and job.state in ("COMPLETED", "UNKNOWN") and time.monotonic() < deadline:
        time.sleep(_FIRST_POLL)
        found, whole = read_report(report)
    if not whole:
        what = f"the examination, job {number}, ended as {job.state}: {_last_line(log)}"
        found.append(Finding("error", name, what, f"see {log}"))
    return found


def _wait(number: str, say: Callable[[str], None]) -> slurm.SlurmJob:
    """The job when it is over; a controller that does not answer for a while is waited for."""
    pause = _FIRST_POLL
    while True:
        try:
            job = slurm.jobs([number])[number]
        except slurm.SchedulerDown as error:
            say(f"job {number}: {error}")
        else:
            if not job.lives:
                return job
            reason = f", {job.reason}" if job.reason else ""
            say(f"job {number} waits{reason}" if job.waits else f"job {number} examines {job.nodes}")
        time.sleep(pause)
        pause = min(1.2 * pause, _LAST_POLL)


def _last_line(log: Path) -> str:
    try:
        lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    except OSError:
        lines = []
    return lines[-1] if lines else "it has said nothing"
