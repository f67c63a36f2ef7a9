"""What is in a run folder and its checkpoints, which may have come from somebody else."""

import json
import math
import os
import random
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from data.files.json_records import to_json
from data.remote.storage import Storage
from jobs.report.content import read_run
from jobs.report.page import page
from jobs.run_discovery import find_run, find_runs
from jobs.scheduler.submissions import SubmissionFolder
from jobs.sweep import record
from pipeline.checkpoints.checkpoint import open_checkpoint
from pipeline.checkpoints.claim import CLAIM, read_claim
from pipeline.checkpoints.listing import checkpointed_stage, list_checkpoints
from pipeline.checkpoints.locations import CheckpointLocations
from pipeline.checkpoints.verification import find_damage
from pipeline.monitoring import charts
from pipeline.monitoring.event_file import EventFile
from pipeline.monitoring.event_reader import read_events
from pipeline.monitoring.progress import StageProgress
from pipeline.preflight.finding import Findings
from pipeline.preflight.report import read_report
from pipeline.runs.evaluation_report import read_report as read_evaluation
from pipeline.runs.evaluation_report import report_text
from pipeline.runs.evaluation_summary import summary_rows
from pipeline.runs.event_log import Event, EventLog
from pipeline.runs.run_folder import RunFolder
from pipeline.runs.run_identity import identity_of
from tests.fuzzing.campaign import Fuzz, SilentAcceptance, Target
from tests.fuzzing.mutation import damaged_bytes, damaged_json, damaged_tensors, signed
from tests.pipeline.checkpoints.small import STAGE, freeze, local, save
from tests.support.records import evaluation_report, stage_result


def _file(path: Path, seed: Any, read: Callable[[], object], sign: Callable[[Any], Any] = lambda value: value) -> Fuzz:
    """A file with one JSON value."""

    def read_content(content: bytes) -> None:
        path.write_bytes(content)
        read()

    return Fuzz(lambda rng: damaged_json(rng, seed, sign), read_content)


def _lines(path: Path, seeds: list[Any], read: Callable[[], object]) -> Fuzz:
    """A file with a JSON value on each line."""

    def mutate(rng: random.Random) -> bytes:
        lines = [json.dumps(seed).encode() for seed in seeds]
        lines[rng.randrange(len(lines))] = damaged_json(rng, rng.choice(seeds))
        content = b"\n".join(lines) + b"\n"
        return content if rng.randrange(3) else damaged_bytes(rng, content)

    def read_content(content: bytes) -> None:
        path.write_bytes(content)
        read()

    return Fuzz(mutate, read_content)


def _manifest(folder: Path) -> Fuzz:
    """A manifest with its own checksum, and what is done with one."""
    save(folder, 3)
    checkpoint = Path(local(folder).at(3))
    path = checkpoint / "manifest.json"
    content = path.read_bytes()
    seed = json.loads(content)
    freeze(folder)

    def read() -> None:
        found = open_checkpoint(checkpoint)
        names = [*found.manifest.files, *(entry.file for entry in found.manifest.fragments)]
        if any(os.path.basename(name) != name or name in ("", ".", "..") for name in names):
            raise SilentAcceptance("a file outside of its checkpoint")
        stage = checkpointed_stage(RunFolder(folder))
        assert stage is not None
        list(list_checkpoints(stage))
        find_damage(str(checkpoint), Storage())
        for name, tensor in found.parameters().items():
            if tuple(tensor.shape) != found.shapes[name]:
                raise SilentAcceptance("a parameter of another shape")
        covered = dict.fromkeys(found.shapes, 0)
        for entry in found.manifest.fragments:
            covered[entry.parameter] += entry.stop - entry.start
        if covered != {name: math.prod(shape) for name, shape in found.shapes.items()}:
            raise SilentAcceptance("a parameter that is not complete")

    return _file(path, seed, read, signed)


def _fragments(folder: Path) -> Fuzz:
    """A file of tensors, whose checksum in the manifest is made to agree."""
    save(folder, 3)
    checkpoint = Path(local(folder).at(3))
    seeds = {name: (checkpoint / name).read_bytes() for name in ("rank-00000.safetensors", "buffers.safetensors")}

    def mutate(rng: random.Random) -> bytes:
        name = rng.choice(list(seeds))
        return name.encode() + b"\0" + damaged_tensors(rng, seeds[name])

    def read(content: bytes) -> None:
        name, _, damaged = content.partition(b"\0")
        for other, seed in seeds.items():
            (checkpoint / other).write_bytes(damaged if other == name.decode() else seed)
        found = open_checkpoint(checkpoint)
        found.parameters("raw")
        found.parameters("ema")
        found.buffers()
        found.read("a", "exp_avg", 3, 70)

    return Fuzz(mutate, read)


def _locations(folder: Path) -> Fuzz:
    record = CheckpointLocations((str(folder / "elsewhere"),), Storage(), 2, None, 1, "run")
    return _file(folder / ".checkpoints.json", to_json(record), lambda: CheckpointLocations.load(RunFolder(folder)))


def _claim(folder: Path) -> Fuzz:
    store = local(folder)
    store.create()
    return _file(Path(store.location) / CLAIM, {"run": "0" * 32, "folder": str(folder)}, lambda: read_claim(store))


def _identity(folder: Path) -> Fuzz:
    seed = {"id": "0" * 32, "folder": str(folder / "other"), "inode": 7, "copied_from": ["1" * 32]}
    return _file(folder / ".run.json", seed, lambda: identity_of(folder))


def _result(folder: Path) -> Fuzz:
    seed = to_json(stage_result("pretrain/checkpoints/step-00000040"))
    return _file(folder / "result.json", seed, RunFolder(folder).result)


def _evaluation(folder: Path) -> Fuzz:
    seed = json.loads(report_text(evaluation_report()))
    return _file(folder / "evaluation.json", seed, lambda: summary_rows(read_evaluation(folder)))


def _stage_recipe(folder: Path) -> Fuzz:
    """`recipe.yaml` of a run folder."""
    freeze(folder)
    path = folder / "recipe.yaml"
    seed = yaml.safe_load(path.read_text())
    text = path.read_bytes()
    assert seed["task"] == STAGE["task"]

    def read(content: bytes) -> None:
        path.write_bytes(content)
        checkpointed_stage(RunFolder(folder))

    return Fuzz(lambda rng: damaged_json(rng, seed) if rng.randrange(2) else damaged_bytes(rng, text), read)


def _events(folder: Path) -> Fuzz:
    when = "2026-01-02T03:04:05+0000"
    seeds = [
        {"time": when, "event": "begin", "ranks": 2, "node": "n1", "pid": 7}, {"time": when, "event": "start", "step": 0},
        {"time": when, "event": "save", "step": 10, "seconds": 1.5}, {"time": when, "event": "evaluation", "step": 10, "top1": 0.5},
        {"time": when, "event": "stop", "step": 12, "reason": "SIGTERM", "checkpoint": None}, {"time": when, "event": "finish"},
    ]  # fmt: skip

    def read() -> None:
        log = EventLog(folder / "events.jsonl")
        for entry in log.entries():
            entry.seconds, entry.step, entry.top1  # noqa: B018 (properties that parse)
        log.of(Event.SAVE)
        log.evaluated(10)

    return _lines(folder / "events.jsonl", seeds, read)


def _event_files(folder: Path) -> Fuzz:
    """TensorBoard's, as the report reads them."""
    file = EventFile(folder / "written", 1, lambda message: None)
    for step in range(1, 40):
        file.add(charts.scalars({"train/loss": step / 7, "train/learning_rate": 0.1}), step)
    file.close()
    (path,) = (folder / "written").iterdir()
    seed = path.read_bytes()
    (folder / "read").mkdir()

    def read(content: bytes) -> None:
        (folder / "read" / path.name).write_bytes(content)
        found = read_events(folder / "read")
        points = [point for points in found.scalars.values() for point in points]
        if content != seed and len(points) == 78 and not found.problems:
            raise SilentAcceptance("a damaged file gives as many points as the whole one, without a word")
        written = {float(np.float32(step / 7)) for step in range(1, 40)} | {float(np.float32(0.1))}
        if any(point.value not in written for point in points):
            raise SilentAcceptance("a value that was never written")

    return Fuzz(lambda rng: damaged_bytes(rng, seed), read)


def _run_report(folder: Path) -> Fuzz:
    """The page of a run whose event log has been edited."""
    when = "2026-01-01T00:00:00+0000"
    run = folder / "run"
    (run / "pretrain").mkdir(parents=True)
    path = run / "pretrain" / "events.jsonl"
    seeds = [
        {"time": when, "event": "begin", "ranks": 2, "node": "n", "pid": 1},
        {"time": when, "event": "resume", "step": 10, "ranks": 2},
        {"time": when, "event": "save", "step": 10, "checkpoint": "step-00000010", "seconds": 1.5, "bytes": 3},
        {"time": when, "event": "evaluation", "step": 10, "top1": 0.5, "samples": 3, "loss": 0.1},
        {"time": when, "event": "sample_skipped", "shard": "s", "key": "k", "reason": "r"},
        {"time": when, "event": "roll_back", "step": 20, "to": 10},
        {"time": when, "event": "not_finite", "step": 19, "loss": "nan"},
    ]
    path.write_text("{}")

    def read() -> None:
        text = page(read_run(find_run(run)), "test")
        if not text.endswith("</body></html>\n") or "<script" in text:
            raise SilentAcceptance("a page that is not what was meant")

    return _lines(path, seeds, read)


def _progress(folder: Path) -> Fuzz:
    path = folder / "progress.json"
    seed = {"step": 3, "steps": 10, "loss": 0.5, "images_per_second": 12.5, "seconds_left": 70.0, "time": 1.7e9}

    def read() -> None:
        found = StageProgress.read(path)
        if found is not None and not all(isinstance(value, int | float | None) for value in asdict(found).values()):
            raise SilentAcceptance("a progress that is not made of numbers")

    return _file(path, seed, read)


def _report(folder: Path) -> Fuzz:
    path = folder / "report.jsonl"
    findings = Findings("n1")
    findings.ok("fine")
    findings.warning("slow", "wait")
    seeds: list[Any] = [*(asdict(finding) for finding in findings), {}]

    def read() -> None:
        for finding in read_report(path)[0]:
            if not all(isinstance(value, str) for value in (finding.level, finding.where, finding.what, finding.fix)):
                raise SilentAcceptance("a finding without text")

    return _lines(path, seeds, read)


def _submissions(folder: Path) -> Fuzz:
    (folder / "run" / "slurm").mkdir(parents=True)
    submitted = SubmissionFolder(folder / "run" / "slurm")
    seeds = [
        {"stage": name, "job": job, "command": ["sbatch", "--dependency=afterok:7"], "time": 1.7e9}
        for name, job in (("shards", "7"), ("pretrain", "8"))
    ]

    def read() -> None:
        for one in submitted.submissions():
            if not (isinstance(one.stage, str) and isinstance(one.job, str) and isinstance(one.command, list)):
                raise SilentAcceptance("a submission without a job")
        for run in find_runs(folder / "run"):
            run.stages()

    return _lines(folder / "run" / "slurm" / "submissions.jsonl", seeds, read)


def _sweep(folder: Path) -> Fuzz:
    path = folder / "runs" / "base.sweep.json"
    path.parent.mkdir()
    seed = {"runs": ["base-1", "base-2"], "settings": {"base-1": {"seed": "1"}, "base-2": {"seed": "2"}}}

    def read() -> None:
        for run in find_runs(path):
            run.stages()
            if not run.path.resolve().is_relative_to(path.parent.resolve()):
                raise SilentAcceptance("a run outside of the folder of its sweep")
        record(path, [])

    return _file(path, seed, read)


TARGETS = [
    Target("manifest", _manifest),
    Target("fragments", _fragments),
    Target("checkpoint-locations", _locations),
    Target("claim", _claim),
    Target("run-identity", _identity),
    Target("stage-result", _result),
    Target("evaluation-report", _evaluation),
    Target("stage-recipe", _stage_recipe),
    Target("event-log", _events),
    Target("event-files", _event_files),
    Target("run-report", _run_report),
    Target("progress", _progress),
    Target("preflight-report", _report),
    Target("submissions", _submissions),
    Target("sweep", _sweep),
]
