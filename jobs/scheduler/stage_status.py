"""The status of each stage of a run, from its run folder, the log of its job, and Slurm."""

import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from data.errors import EXIT_INTERRUPTED, EXIT_TRY_AGAIN
from data.files.yaml_text import load_plain_yaml, yaml_file
from data.remote.storage import is_remote
from jobs.evaluation_status import EvaluationStatus, evaluations_of
from jobs.run_discovery import RunRef, is_shard_job
from jobs.scheduler import slurm
from jobs.scheduler.faulty_nodes import FaultyNode, excluded_from, faulty_nodes, found_wrong
from jobs.scheduler.job_log import JobOutcome, job_outcome, tail
from jobs.scheduler.submissions import Submission
from pipeline.checkpoints.manifest import MANIFEST, step_name
from pipeline.errors import ConfigError
from pipeline.monitoring.progress import StageProgress
from pipeline.runs.event_log import Event
from pipeline.runs.run_folder import RunFolder, absolute_location
from pipeline.runs.stage_result import StageResult

State = Literal["done", "running", "waiting", "failed", "stopped", "cancelled", "not started", "unknown"]

_HANG_SECONDS = 60.0
"""A run that logs no step for this long, and for ten times its usual interval, may hang."""
_CLOCK_SKEW = 60.0  # seconds between the clocks of machines, at most
_RANK_LOGS = 16  # that are searched for why a run on this machine ended
_EXIT = re.compile(r"^(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d),\d+ ERROR exit (\d+): (.*)$")
# Ends after which the same command continues, by Slurm's name.
_RETRYABLE = {
    "TIMEOUT": "time limit",
    "DEADLINE": "deadline",
    "NODE_FAIL": "a node failed",
    "BOOT_FAIL": "a node did not start",
    "PREEMPTED": "preempted",
    "REVOKED": "revoked",
}
_NOT_DONE: tuple[State, str] = ("stopped", "its job ended before the stage was done")
_TRANSIENT = {
    "COMPLETING": "ending",
    "CONFIGURING": "preparing nodes",
    "SUSPENDED": "suspended",
    "STOPPED": "suspended",
}


@dataclass(frozen=True, slots=True)
class StageStatus:
    """The status of one stage; None for what is not known or does not apply."""

    run: str
    """Name of the run's folder."""
    stage: str
    job: str | None
    """Number of its last job; None if it was never submitted, or has run without Slurm since."""
    state: State
    reason: str
    """Why it waits, stopped or failed, or what it is doing; may be empty."""
    slurm_state: str | None
    """Slurm's word for the state of its job."""
    nodes: str
    step: int | None
    steps: int | None
    images_per_second: float | None
    """The current speed; for a stage that is done, the mean of its last start."""
    loss: float | None
    """Of the last logged step."""
    top1: float | None
    """Of the last evaluation, 0 to 1."""
    checkpoint: str | None
    """The newest published one; for a stage that is done, that of its result."""
    checkpoint_age: float | None
    """Seconds since it was published."""
    restarts: int | None
    seconds_left: float | None
    updated: float | None
    """When the run last logged a step, in seconds since the epoch."""
    evaluations: tuple[EvaluationStatus, ...] = ()
    """The reports of `coatnet evaluate` in the run folder."""
    excluded_nodes: tuple[FaultyNode, ...] = ()
    """Those of the run's faulty nodes on which its job, which waits or runs, must not run."""
    faulty_nodes: tuple[FaultyNode, ...] = ()
    """The other ones, on which it may run."""


@dataclass(frozen=True, slots=True)
class StatusReport:
    """All stages, in the order of the runs and their chains."""

    stages: list[StageStatus]
    slurm: str | None
    """Why Slurm could not be queried; None if it answered, or no query was needed."""

    @property
    def settled(self) -> bool:
        """Whether nothing waits or runs, and no stage is about to start after one that is done."""
        states: dict[str, set[State]] = {}
        for row in self.stages:
            states.setdefault(row.run, set()).add(row.state)
        return all(map(_settled, states.values()))


def stage_statuses(runs: Sequence[RunRef]) -> StatusReport:
    """The status of all stages of these runs at this moment."""
    now = time.time()
    jobs: Mapping[str, slurm.SlurmJob] = {}
    slurm_error = None
    unfinished = {
        submission.job
        for run in runs
        for stage, submission in run.submissions.newest().items()
        if stage in run.stages() and _result(run.folder(stage))[0] is None
    }
    try:
        # Slurm first: if it reports the end of a job, everything that the job wrote is on the disk.
        jobs = slurm.jobs(unfinished)
    except (slurm.SchedulerDown, ConfigError) as error:
        slurm_error = str(error)
    stages = []
    for run in runs:
        records = [_StageRecord(run, stage) for stage in run.stages()]
        faulty = _faulty_nodes(run, records)
        stages += [record.status(jobs, faulty, now) for record in records]
    return StatusReport(stages, slurm_error)


def _faulty_nodes(run: RunRef, records: Sequence["_StageRecord"]) -> tuple[FaultyNode, ...]:
    """Those of the whole run, of which `records` may have a single stage."""
    entries = {record.stage: record.entries for record in records}
    for stage in replace(run, only=None).stages():
        if stage not in entries:
            entries[stage] = run.folder(stage).events.entries()
    return faulty_nodes(entries)


class _StageRecord:
    """What the disk has about one stage."""

    def __init__(self, run: RunRef, stage: str) -> None:
        self.run, self.stage = run, stage
        self.folder: RunFolder = run.folder(stage)
        self.submission: Submission | None = run.submissions.newest().get(stage)
        self.entries = self.folder.events.entries()
        self.result, self.damage = _result(self.folder)
        self.progress = StageProgress.read(self.folder.progress)
        self.done = self.result is not None or self._has_shards()
        begins = [entry for entry in self.entries if entry.event is Event.BEGIN]
        self.restarts = len(begins) - 1 if begins else None
        self.begun = begins[-1].seconds if begins else None
        self.outcome: JobOutcome | None = None
        if self.submission is not None:
            self.outcome = job_outcome(run.submissions.logs(stage), self.submission.job)

    def status(self, jobs: Mapping[str, slurm.SlurmJob], faulty: Sequence[FaultyNode], now: float) -> StageStatus:
        job = jobs.get(self.submission.job) if self.submission else None
        if self.submission and not (job and job.lives) and self._ran_here_since(self.submission):
            self.submission = self.outcome = job = None
        state, reason = self._state(job, now)
        left = speed = None
        if state == "running":
            reason, speed, left = self._pace(job, reason, now)
        elif self.result is not None:
            speed = self.result.images_per_second
        checkpoint, saved = self._checkpoint()
        progress, result = self.progress, self.result
        excluded = excluded_from(job) if faulty and job and job.lives else []
        planned = self.run.recipe.get("stages", {}).get(self.stage, {}).get("steps")
        return StageStatus(
            run=self.run.name,
            stage=self.stage,
            job=self.submission.job if self.submission else None,
            state=state,
            reason=reason,
            slurm_state=job.state if job else None,
            nodes=(job.nodes if job else "") or (self.outcome.nodes if self.outcome else ""),
            step=result.steps if result else progress.step if progress else None,
            steps=result.steps if result else progress.steps if progress else planned,
            images_per_second=speed,
            loss=progress.loss if progress else None,
            top1=self._top1(),
            checkpoint=checkpoint,
            checkpoint_age=None if saved is None else max(0.0, now - saved),
            restarts=self.restarts,
            seconds_left=left,
            updated=progress.time if progress else None,
            evaluations=evaluations_of(self.folder.path),
            excluded_nodes=tuple(node for node in faulty if node.name in excluded),
            faulty_nodes=tuple(node for node in faulty if job and job.lives and node.name not in excluded),
        )

    def _has_shards(self) -> bool:
        """Whether this job makes shards and they are complete."""
        shards = self.run.recipe.get("shards") if self._is_shard_job else None
        return shards is not None and Path(shards["folder"]).exists()  # it appears when they are complete

    @property
    def _is_shard_job(self) -> bool:
        return is_shard_job(self.stage) and self.stage not in self.run.recipe.get("stages", {})

    def _lost_checkpoint(self) -> str:
        """That a training stage's final checkpoint is no longer on the disk; empty if it is. URLs are not requested."""
        if self.result is None or is_remote(self.result.checkpoint) or self._settings().get("task") == "evaluate":
            return ""
        if (Path(absolute_location(self.result.checkpoint, self.folder)) / MANIFEST).exists():
            return ""
        from pipeline.checkpoints.lost import lost_in  # pydantic, which a status seldom needs

        return lost_in(self.folder)

    def _ran_here_since(self, submission: Submission) -> bool:
        """Whether the stage was started without Slurm after its last job ended."""
        if self.begun is None or (self.outcome is not None and self.outcome.kind in ("started", "requeued")):
            return False
        ended = self.outcome.time + 1 if self.outcome else submission.time + _CLOCK_SKEW
        return self.begun > ended

    def _state(self, job: slurm.SlurmJob | None, now: float) -> tuple[State, str]:
        if self.done:
            return "done", self._lost_checkpoint()
        if self.damage:
            return "failed", self.damage
        last = self.entries[-1] if self.entries else None
        submitted = self.submission.time if self.submission else 0.0
        if last and last.event is Event.EXTEND and last.seconds > submitted and not self.folder.held():
            return "stopped", f"goes on from step {last.step:,} with other settings when it is started"
        if self.submission is None:
            return self._state_here()
        if job is None or job.state == "UNKNOWN":
            return self._state_from_log(is_over=job is not None)
        if job.waits:
            return "waiting", _why_waiting(job, now, again=self.outcome is not None)
        if job.runs:
            return "running", _TRANSIENT.get(job.state, "")
        if job.state == "CANCELLED":
            return "cancelled", "" if job.reason.isdigit() else job.reason
        if job.state == "COMPLETED":
            return ("done", "") if self._is_shard_job else _NOT_DONE
        if job.state in _RETRYABLE:
            return "stopped", _RETRYABLE[job.state]
        why = self.outcome.why if self.outcome else ""
        if not why and last and last.event is Event.MACHINE_FAULTY:
            why = found_wrong(last)
        stopped = self.outcome is not None and self.outcome.kind in ("stopped", "requeued")
        return ("stopped" if stopped else "failed"), why or _in_words(job.state, job.reason)

    def _state_from_log(self, *, is_over: bool) -> tuple[State, str]:
        """The state if Slurm does not know the job, because it has forgotten an old job or does not answer."""
        outcome = self.outcome
        if outcome is not None and outcome.kind in ("failed", "cancelled", "stopped"):
            return outcome.kind, outcome.why
        if outcome is not None and outcome.kind == "done":
            return ("done", "") if self._is_shard_job else _NOT_DONE
        if self.folder.held():
            return "running", ""
        if not is_over:
            return "unknown", "Slurm does not answer"
        if outcome is None:
            return "cancelled", "before it started"
        return "stopped", outcome.why or "its job ended without a message"

    def _state_here(self) -> tuple[State, str]:
        """The state of a stage that runs or ran without Slurm."""
        if self.folder.held():
            return "running", ""
        if (exit_ := self._rank_exit()) is not None:
            code, message = exit_
            return ("stopped" if code in (EXIT_TRY_AGAIN, EXIT_INTERRUPTED) else "failed"), message
        if not self.entries:
            return "not started", ""
        last = self.entries[-1]
        if last.event is Event.MACHINE_FAULTY:
            return "failed", found_wrong(last)
        if last.event is Event.GAVE_UP:
            return "failed", f"gave up: {last.facts.get('starts')} starts in a row ended without a new checkpoint"
        if last.event is Event.STOP:
            after = f" after step {last.step:,}" if last.step >= 0 else ""  # it may have had no step yet
            return "stopped", f"by {last.facts.get('reason')}{after}"
        return "stopped", "its processes ended without a message"

    def _rank_exit(self) -> tuple[int, str] | None:
        """Exit code and message of a rank since the last start, preferably of one that had the cause."""
        found = []
        for log in sorted(self.folder.logs.glob("rank-*.log"))[:_RANK_LOGS]:
            for line in tail(log):
                if (match := _EXIT.match(line)) and _local_seconds(match[1]) >= (self.begun or 0.0):
                    found.append((int(match[2]), match[3]))
        return min(found, key=lambda one: one[0] in (EXIT_TRY_AGAIN, EXIT_INTERRUPTED), default=None)

    def _top1(self) -> float | None:
        if self.result is not None:
            return self.result.validation.top1
        evaluations = [entry for entry in self.entries if entry.event is Event.EVALUATION and entry.top1 is not None]
        return evaluations[-1].top1 if evaluations else None

    def _checkpoint(self) -> tuple[str | None, float | None]:
        """Name and time of the newest checkpoint."""
        saves = [entry for entry in self.entries if entry.event is Event.SAVE]
        saved = saves[-1].seconds if saves else None
        if self.result is not None:
            return self.result.checkpoint, saved
        return (step_name(saves[-1].step) if saves else None), saved

    def _pace(self, job: slurm.SlurmJob | None, reason: str, now: float) -> tuple[str, float | None, float | None]:
        """Reason, images per second and seconds left of a stage that runs."""
        started = job.starts if job is not None and job.runs else None
        begun = self.begun
        if started is not None and (begun is None or begun < started - _CLOCK_SKEW):
            begun = started  # this start of the job is not yet in the event log
        shown = self.progress
        settings = self._settings()
        if shown is None or (begun is not None and shown.time < begun):
            if settings.get("task") == "evaluate" or begun is None:
                return reason, None, None
            return reason or f"starting for {duration(now - begun)}", None, None
        silent = max(0.0, now - shown.time)
        left = None if shown.seconds_left is None else max(0.0, shown.seconds_left - silent)
        if shown.step == shown.steps:
            return reason or "saving and evaluating", shown.images_per_second, None
        logged = settings.get("log")
        every = logged.get("every_steps") if isinstance(logged, dict) else None
        interval = (every if isinstance(every, int) else 1) * (shown.seconds_left or 0.0) / (shown.steps - shown.step)
        if silent > max(_HANG_SECONDS, 10 * interval):
            return reason or f"no step for {duration(silent)}", shown.images_per_second, None
        return reason, shown.images_per_second, left

    def _settings(self) -> dict[str, Any]:
        """The stage's settings as of its first start, else as submitted."""
        try:
            path = self.folder.path / "recipe.yaml"
            content = load_plain_yaml(yaml_file(path), str(path))
        except (OSError, ValueError):
            content = self.run.recipe.get("stages", {}).get(self.stage)
        return content if isinstance(content, dict) else {}


def _result(folder: RunFolder) -> tuple[StageResult | None, str]:
    """The result of a stage, or why it is damaged: one damaged file must not hide all other stages."""
    try:
        return folder.result(), ""
    except ConfigError as error:
        return None, str(error)


def _settled(states: set[State]) -> bool:
    """Whether one run is; between two stages on one machine there is a moment in which none runs."""
    if states & {"running", "waiting", "unknown"}:
        return False
    return "not started" not in states or bool(states - {"done", "not started"})


def duration(seconds: float) -> str:
    """A duration in its two largest units."""
    whole = max(0, round(seconds))
    days, hours, minutes = whole // 86400, whole // 3600 % 24, whole // 60 % 60
    if days:
        return f"{days} d {hours} h"
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min" if minutes else f"{whole} s"


def clock(seconds: float) -> str:
    """A duration as hours:minutes:seconds, or minutes:seconds."""
    whole = max(0, round(seconds))
    hours, minutes, rest = whole // 3600, whole // 60 % 60, whole % 60
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _why_waiting(job: slurm.SlurmJob, now: float, *, again: bool) -> str:
    reason = job.reason if job.state == "PENDING" else _in_words(job.state, job.reason)
    starts = clock(job.starts - now) if job.starts is not None and job.starts > now else ""
    if job.reason == "BeginTime" and starts:
        why = f"starts in {starts}"
    else:  # Slurm does not always give a reason
        why = ", ".join(part for part in (reason, starts and f"in about {starts}") if part)
    return ", ".join(part for part in ("requeued" if again else "", why) if part)


def _in_words(state: str, reason: str) -> str:
    words = state.lower().replace("_", " ")
    return f"{words}: {reason}" if reason else words


def _local_seconds(text: str) -> float:
    return time.mktime(time.strptime(text, "%Y-%m-%d %H:%M:%S"))
