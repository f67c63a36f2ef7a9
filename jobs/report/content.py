"""What a run folder has for its report, and what of it is missing or cannot be read."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data.errors import raise_if_passing
from data.files.regular_file import read_regular
from data.remote.storage import Storage
from data.text.counted import counted
from jobs.run_discovery import RunRef, is_shard_job
from jobs.scheduler.stage_status import StageStatus, stage_statuses
from pipeline.checkpoints.manifest import read_manifest, step_of
from pipeline.errors import ConfigError
from pipeline.monitoring.event_reader import RecordedEvents, read_stage_events
from pipeline.runs.evaluation_report import EvaluationReport, read_report, report_folders
from pipeline.runs.event_log import RunEvent
from pipeline.runs.run_folder import RunFolder
from pipeline.runs.stage_result import StageResult

_EVENT_LOG_BYTES = 2**28


@dataclass(slots=True)
class StageContent:
    """All that the report says about one stage."""

    name: str
    status: StageStatus
    folder: RunFolder
    settings: Mapping[str, Any] = field(default_factory=dict)
    """As of its first start; empty if they cannot be read."""
    seed: int | None = None
    entries: list[RunEvent] = field(default_factory=list)
    recorded: RecordedEvents = field(default_factory=RecordedEvents)
    result: StageResult | None = None
    computed_with: Mapping[str, str] = field(default_factory=dict)
    evaluations: list[tuple[Path, EvaluationReport]] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    """What is not in the report, and why, one sentence each."""

    @property
    def trains(self) -> bool:
        return bool(self.settings.get("task", "train") == "train")

    def setting(self, *names: str) -> Any:
        """A setting by its names, outermost first; None if it is not known."""
        value: Any = self.settings
        for name in names:
            value = value.get(name) if isinstance(value, Mapping) else None
        return value


@dataclass(frozen=True, slots=True)
class RunContent:
    """All that the report says."""

    run: RunRef
    stages: list[StageContent]
    jobs_before: list[StageStatus]
    """Jobs that build shards."""
    missing: list[str]


def read_run(run: RunRef) -> RunContent:
    """Read what there is; nothing that is damaged ends it."""
    report = stage_statuses([run])
    missing = []
    if report.slurm is not None:
        missing.append(f"Slurm does not answer, so states are those of the run folder alone: {report.slurm}")
    stages = [_stage(run, status) for status in report.stages if not is_shard_job(status.stage)]
    missing += [f"{stage.name}: {what}" for stage in stages for what in stage.missing]
    return RunContent(run, stages, [status for status in report.stages if is_shard_job(status.stage)], missing)


def _stage(run: RunRef, status: StageStatus) -> StageContent:
    folder = run.folder(status.stage)
    stage = StageContent(status.stage, status, folder)
    if not folder.path.is_dir():
        stage.missing.append("it has not been started")
        return stage
    _read_settings(stage, run)
    _read_event_log(stage)
    stage.recorded = read_stage_events(folder)
    stage.missing += stage.recorded.problems
    if not stage.recorded.files and stage.trains:
        stage.missing.append("there are no curves: TensorBoard's event files are missing")
    elif stage.trains and not stage.recorded.scalars:
        stage.missing.append("there are no curves yet: no step has been logged")
    try:
        stage.result = folder.result()
    except ConfigError as error:
        stage.missing.append(str(error))
    else:
        if stage.result is None:
            stage.missing.append(f"there is no final evaluation: the stage is not done ({status.state})")
    if stage.trains:
        _read_computed_with(stage)
    _read_evaluations(stage)
    return stage


def _read_settings(stage: StageContent, run: RunRef) -> None:
    try:
        frozen = stage.folder.frozen()
        if frozen is not None:
            stage.settings, stage.seed = frozen.settings, frozen.seed
            return
        stage.missing.append("its settings are those that were submitted: recipe.yaml is missing")
    except ConfigError as error:
        stage.missing.append(str(error))
    stages = run.recipe.get("stages")
    submitted = stages.get(stage.name) if isinstance(stages, dict) else None
    stage.settings = submitted if isinstance(submitted, dict) else {}


def _read_event_log(stage: StageContent) -> None:
    path = stage.folder.events.path
    try:
        lines = sum(1 for line in read_regular(path, _EVENT_LOG_BYTES).split(b"\n") if line.strip())
        stage.entries = stage.folder.events.entries()
    except FileNotFoundError:
        stage.missing.append("what happened is not known: there is no events.jsonl")
    except OSError as error:
        raise_if_passing(error)
        stage.missing.append(f"what happened is not known: events.jsonl: {error.strerror or error}")
    else:
        if lost := lines - len(stage.entries):
            stage.missing.append(f"events.jsonl: {counted(lost, 'line')} of {lines:,} cannot be read")


def _read_computed_with(stage: StageContent) -> None:
    """From the newest checkpoint in the run folder whose manifest can be read."""
    try:
        names = sorted(path.name for path in stage.folder.checkpoints.iterdir() if step_of(path.name) is not None)
    except OSError:
        names = []
    for name in reversed(names):
        try:
            manifest = read_manifest(str(stage.folder.checkpoints / name), Storage())
        except ConfigError:
            continue
        stage.computed_with = manifest.facts.run.computed_with or {}
        return
    stage.missing.append("versions and device are not known: no checkpoint in the run folder can be read")


def _read_evaluations(stage: StageContent) -> None:
    for folder in report_folders(stage.folder.path):
        try:
            stage.evaluations.append((folder, read_report(folder)))
        except ConfigError as error:
            stage.missing.append(str(error))
