"""Slurm's commands, and what they report about jobs."""

import os
import re
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from data.errors import EXIT_TRY_AGAIN, CoatnetError
from jobs.packages import outside_environment
from jobs.scheduler.environment import scheduler_environment
from pipeline.errors import ConfigError

_ANSWER_SECONDS = 60
_WAITING = frozenset({"PENDING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT", "RESV_DEL_HOLD"})
_RUNNING = frozenset(
    {"RUNNING", "CONFIGURING", "COMPLETING", "SUSPENDED", "STOPPED", "SIGNALING", "STAGE_OUT", "RESIZING"}
)
# Fields of squeue that cannot contain the separator; the last one may contain spaces.
_FORMAT = "%i|%T|%D|%N|%e|%S|%x|%r"

_SECONDS = re.compile("[0-9]{1,12}")
_DOWN = ("Unable to contact", "Connection refused", "timed out", "communication")
_NOT_CONFIGURED = ("Could not establish a configuration source", "Unable to process configuration file")


class NotConfigured(ConfigError):
    """Slurm's commands find no cluster."""


class SchedulerDown(CoatnetError):
    """Slurm's controller does not answer at present."""

    exit_code = EXIT_TRY_AGAIN
    retryable = True


@dataclass(frozen=True, slots=True)
class SlurmJob:
    """What Slurm knows about a job, or about an array of jobs as a whole."""

    number: str
    state: str
    """Slurm's word, such as `PENDING`; `UNKNOWN` if it has forgotten the job."""
    reason: str = ""
    """Why it waits or ended; may be empty."""
    nodes: str = ""
    """The nodes on which it runs or ran, in Slurm's short form."""
    starts: int | None = None
    """When it started or is expected to start, seconds since the epoch."""
    excluded: str = ""
    """The nodes on which it must not run, in Slurm's short form."""

    @property
    def waits(self) -> bool:
        """Whether it has yet to start, for the first time or again."""
        return self.state in _WAITING

    @property
    def runs(self) -> bool:
        """Whether it is running, starting or ending."""
        return self.state in _RUNNING

    @property
    def lives(self) -> bool:
        """Whether it waits or runs."""
        return self.waits or self.runs


def call(*command: str, variables: Mapping[str, str] | None = None) -> str:
    """The output of one of Slurm's commands.

    Raises:
        ConfigError: the command is missing, or fails.
        NotConfigured: it finds no cluster.
        SchedulerDown: the controller does not answer.
    """
    return _run(command, variables).stdout


def _run(command: Sequence[str], variables: Mapping[str, str] | None) -> subprocess.CompletedProcess[str]:
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_ANSWER_SECONDS,
            env={
                **scheduler_environment(outside_environment()),
                **({"SLURM_TIME_FORMAT": "%s"} if variables is None else variables),
            },
        )
    except FileNotFoundError:
        raise ConfigError(
            f"{command[0]}: command not found; use a machine that has Slurm's commands, or put them on PATH"
        ) from None
    except subprocess.TimeoutExpired:
        raise SchedulerDown(f"{command[0]}: no answer in {_ANSWER_SECONDS} s") from None
    if done.returncode:
        message = " ".join(done.stderr.split()) or f"exited with {done.returncode}"
        if any(sign in message for sign in _DOWN):
            raise SchedulerDown(f"{command[0]}: {message}")
        if any(sign in message for sign in _NOT_CONFIGURED):
            raise NotConfigured(
                f"Slurm's commands are on this machine and find no cluster ({message.rpartition('fatal: ')[2]}); use a "
                "machine of the cluster, or set SLURM_CONF to its slurm.conf"
            )
        raise ConfigError(f"{command[0]}: {message}")
    return done


def has_commands() -> bool:
    """Whether this machine has Slurm's commands."""
    return any(os.access(os.path.join(folder, "squeue"), os.X_OK) for folder in os.get_exec_path())


def has_cluster() -> bool:
    """Whether it has them and they are configured, so that they find a cluster, even if that does not answer."""
    if not has_commands():
        return False
    try:
        find_cluster()
    except NotConfigured:
        return False
    except (ConfigError, SchedulerDown):
        pass
    return True


def find_cluster() -> None:
    """Ask Slurm for its partitions.

    Raises:
        ConfigError: its commands are not on this machine, or find no cluster (`NotConfigured`).
        SchedulerDown: the controller does not answer.
    """
    call("sinfo", "--noheader", "--format=%R")


def submit(command: Sequence[str], variables: Mapping[str, str]) -> str:
    """Run an sbatch command (`--parsable`), with `variables` in its job's environment; returns the job's number."""
    return call(*command, variables=variables).strip().partition(";")[0]


def try_out(command: Sequence[str], variables: Mapping[str, str]) -> str:
    """Slurm's answer to an sbatch command without submitting it: when and where the job would start.

    Raises:
        ConfigError: it refuses the job.
        SchedulerDown: the controller does not answer.
    """
    program, *rest = command
    answer = _run([program, "--test-only", *rest], variables).stderr
    return " ".join(answer.split()).removeprefix("sbatch: ")


def clock() -> float:
    """The controller's time, in seconds since the epoch.

    Raises:
        ConfigError: it does not report one.
        SchedulerDown: it does not answer.
    """
    match = re.search(r"output at .*\(([0-9]{1,12})\)", call("sdiag"))
    if match is None:
        raise ConfigError("sdiag: its output has no time")
    return float(match.group(1))


def jobs(numbers: Iterable[str]) -> dict[str, SlurmJob]:
    """What Slurm knows about the jobs with these numbers: from the queue, else from accounting if the site has it."""
    wanted = set(numbers)
    if not wanted:
        return {}
    found = _combined(wanted, _queue(wanted))
    missing = wanted - found.keys()
    found |= _combined(missing, _accounting(missing)) if missing else {}
    return found | {number: SlurmJob(number, "UNKNOWN") for number in wanted - found.keys()}


def node_names(nodes: str) -> list[str]:
    """The names of nodes in Slurm's short form.

    Raises:
        ConfigError: it is no such form.
    """
    return call("scontrol", "show", "hostnames", nodes).split() if nodes else []


def cancel(numbers: Sequence[str]) -> None:
    """Cancel these jobs."""
    if numbers:
        call("scancel", *numbers)


def _queue(numbers: Iterable[str]) -> list[SlurmJob]:
    """The jobs that the controller remembers, which include those that ended some minutes ago."""
    try:
        lines = call("squeue", "--noheader", "--states=all", f"--format={_FORMAT}", f"--jobs={','.join(numbers)}")
    except ConfigError as error:
        if "Invalid job id" in str(error):  # for a single number; of several, unknown ones are left out
            return []
        raise
    listed = []
    for line in lines.splitlines():
        fields = line.split("|", 7)
        if len(fields) == 8:
            number, state, _, nodes, _, starts, excluded, reason = fields
            reason, excluded = ("" if text in ("None", "(null)") else text for text in (reason, excluded))
            begun = int(starts) if _SECONDS.fullmatch(starts) else None
            listed.append(SlurmJob(number, state, reason, nodes, begun, excluded))
    return listed


def _accounting(numbers: Iterable[str]) -> list[SlurmJob]:
    """The jobs that sacct knows; none if the site has no accounting."""
    command = ["sacct", "--noheader", "--parsable2", "--allocations", "--format=JobID,State,NodeList,Reason"]
    try:
        lines = call(*command, f"--jobs={','.join(numbers)}").splitlines()
    except (ConfigError, SchedulerDown):
        return []
    listed = []
    for line in lines:
        fields = line.split("|", 3)
        if len(fields) < 4:
            continue
        number, state, nodes, reason = fields
        nodes, reason = (text if text not in ("None", "None assigned") else "" for text in (nodes, reason))
        listed.append(SlurmJob(number, state.partition(" ")[0], reason, nodes))  # "CANCELLED by 1000"
    return listed


def _combined(numbers: Iterable[str], listed: Sequence[SlurmJob]) -> dict[str, SlurmJob]:
    """The jobs with these numbers; an array is represented by a task that runs, else waits, else failed."""
    found: dict[str, SlurmJob] = {}
    for number in numbers:
        tasks = [job for job in listed if job.number.partition("_")[0] == number]
        if tasks:
            chosen = min(tasks, key=lambda job: (not job.runs, not job.waits, job.state == "COMPLETED"))
            found[number] = replace(chosen, number=number)
    return found
