"""Slurm's commands, and what they say of jobs."""

import os
import re
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from data.errors import EXIT_TRY_AGAIN, CoatnetError
from pipeline.errors import ConfigError

_ANSWER_SECONDS = 60
_WAITING = frozenset({"PENDING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT", "RESV_DEL_HOLD"})
_RUNNING = frozenset(
    {"RUNNING", "CONFIGURING", "COMPLETING", "SUSPENDED", "STOPPED", "SIGNALING", "STAGE_OUT", "RESIZING"}
)
# Fields of squeue without hostile content; the last one may have spaces.
_FORMAT = "%i|%T|%D|%N|%e|%S|%r"


class SchedulerDown(CoatnetError):
    """Slurm's controller does not answer for now."""

    exit_code = EXIT_TRY_AGAIN
    retryable = True


@dataclass(frozen=True, slots=True)
class SlurmJob:
    """What Slurm knows of a job, or of an array of jobs as a whole."""

    number: str
    state: str
    """As Slurm writes it, such as `PENDING`; `UNKNOWN` where it has forgotten the job."""
    reason: str = ""
    """Why it waits or ended; empty where there is none."""
    nodes: str = ""
    """Where it runs or ran, in Slurm's short form."""
    starts: int | None = None
    """When it is thought to start, seconds since the epoch."""

    @property
    def waits(self) -> bool:
        """It has yet to start, for the first time or again."""
        return self.state in _WAITING

    @property
    def runs(self) -> bool:
        """It runs, or is on its way in or out."""
        return self.state in _RUNNING

    @property
    def lives(self) -> bool:
        """It waits or runs."""
        return self.waits or self.runs


def call(*command: str, variables: Mapping[str, str] | None = None) -> str:
    """What a command of Slurm prints.

    Raises:
        ConfigError: there is no such command here, or it refuses.
        SchedulerDown: the controller does not answer.
    """
    return _called(command, variables).stdout


def _called(command: Sequence[str], variables: Mapping[str, str] | None) -> subprocess.CompletedProcess[str]:
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=_ANSWER_SECONDS,
            # What sbatch gets, its job gets.
            env={**os.environ, **({"SLURM_TIME_FORMAT": "%s"} if variables is None else variables)},
        )
    except FileNotFoundError:
        raise ConfigError(
            f"{command[0]}: no such command; go to a machine that has Slurm's, or put them on PATH"
        ) from None
    except subprocess.TimeoutExpired:
        raise SchedulerDown(f"{command[0]}: no answer in {_ANSWER_SECONDS} s") from None
    if done.returncode:
        said = " ".join(done.stderr.split()) or f"ended with {done.returncode}"
        if any(sign in said for sign in ("Unable to contact", "Connection refused", "timed out", "communication")):
            raise SchedulerDown(f"{command[0]}: {said}")
        raise ConfigError(f"{command[0]}: {said}")
    return done


def available() -> bool:
    """Whether this machine has Slurm's commands."""
    return any(os.access(os.path.join(folder, "squeue"), os.X_OK) for folder in os.get_exec_path())


def submit(command: Sequence[str], variables: Mapping[str, str]) -> str:
    """Run an sbatch command that prints the number of its job, with `variables` in the environment of the job; returns
    the number.
    """
    return call(*command, variables=variables).strip().partition(";")[0]


def try_out(command: Sequence[str], variables: Mapping[str, str]) -> str:
    """What Slurm says of an sbatch command without submitting it: when and where the job would start.

    Raises:
        ConfigError: it refuses.
        SchedulerDown: the controller does not answer.
    """
    program, *rest = command
    said = _called([program, "--test-only", *rest], variables).stderr
    return " ".join(said.split()).removeprefix("sbatch: ")


def clock() -> float:
    """The controller's time, in seconds since the epoch.

    Raises:
        ConfigError: it does not tell.
        SchedulerDown: it does not answer.
    """
    match = re.search(r"output at .*\((\d+)\)", call("sdiag"))
    if match is None:
        raise ConfigError("sdiag: tells no time")
    return float(match.group(1))


def jobs(numbers: Iterable[str]) -> dict[str, SlurmJob]:
    """What Slurm knows of the jobs of these numbers: from the queue, else from the accounting where there is one."""
    wanted = set(numbers)
    if not wanted:
        return {}
    found = _combined(wanted, _queue(wanted))
    missing = wanted - found.keys()
    found |= _combined(missing, _accounting(missing)) if missing else {}
    return found | {number: SlurmJob(number, "UNKNOWN") for number in wanted - found.keys()}


def cancel(numbers: Sequence[str]) -> None:
    """End these jobs, and those that wait for them."""
    if numbers:
        call("scancel", *numbers)


def _queue(numbers: Iterable[str]) -> list[SlurmJob]:
    """Those that the controller remembers: those that ended some minutes ago, too."""
    try:
        lines = call("squeue", "--noheader", "--states=all", f"--format={_FORMAT}", f"--jobs={','.join(numbers)}")
    except ConfigError as error:
        if "Invalid job id" in str(error):  # of a single one; of several, unknown ones are left out
            return []
        raise
    listed = []
    for line in lines.splitlines():
        fields = line.split("|", 6)
        if len(fields) == 7:
            number, state, _, nodes, _, starts, reason = fields
            reason = "" if reason in ("None", "(null)") else reason
            listed.append(SlurmJob(number, state, reason, nodes, int(starts) if starts.isdigit() else None))
    return listed


def _accounting(numbers: Iterable[str]) -> list[SlurmJob]:
    """From sacct; nothing where the site keeps no accounts."""
    command = ["sacct", "--noheader", "--parsable2", "--allocations", "--format=JobID,State,NodeList,Reason"]
    try:
        lines = call(*command, f"--jobs={','.join(numbers)}").splitlines()
    except (ConfigError, SchedulerDown):
        return []
    listed = []
    for line in lines:
        number, state, nodes, reason = line.split("|", 3)
        nodes, reason = (text if text not in ("None", "None assigned") else "" for text in (nodes, reason))
        listed.append(SlurmJob(number, state.partition(" ")[0], reason, nodes))  # "CANCELLED by 1000"
    return listed


def _combined(numbers: Iterable[str], listed: Sequence[SlurmJob]) -> dict[str, SlurmJob]:
    """The jobs with these numbers; of the tasks of an array the one that is most alive, else one that failed."""
    found: dict[str, SlurmJob] = {}
    for number in numbers:
        tasks = [job for job in listed if job.number.partition("_")[0] == number]
        if tasks:
            chosen = min(tasks, key=lambda job: (not job.runs, not job.waits, job.state == "COMPLETED"))
            found[number] = SlurmJob(number, chosen.state, chosen.reason, chosen.nodes, chosen.starts)
    return found
