"""Run folders for reports, written by hand, with hostile names if that is asked for."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image
from torch.utils.tensorboard.summary import image
from typer.testing import CliRunner, Result

from data.files.json_records import to_json
from jobs.cli import app
from pipeline.monitoring import charts
from pipeline.monitoring.event_file import EventFile
from pipeline.runs.evaluation_report import (
    AveragePrecision,
    Calibration,
    CalibrationBin,
    Circumstances,
    ClassFigures,
    Computation,
    ConfusedPair,
    EvaluatedData,
    EvaluatedModel,
    EvaluationReport,
    ReportedMistake,
    report_text,
)
from pipeline.runs.run_folder import RunFolder
from pipeline.runs.stage_result import ClassAccuracy, ValidationFigures
from tests.jobs.runs import MadeRun
from tests.support.records import stage_result

SCRIPT = "<script>document.title='owned'</script>"
HANDLER = '"><img src=x onerror="document.title=\'owned\'">'
HOSTILE = [SCRIPT, HANDLER, "</table></section><b>bold", "a & b &lt;i&gt;", "\u202eevil\x1b[31m", "plain"]
SETTINGS = {
    "stage": "pretrain", "seed": 7, "task": "train", "resolution": 64, "steps": 400, "epochs": None, "start_from": None,
    "model": {"name": "coatnet_debug", "drop_path_rate": 0.1}, "batch": {"global_size": 12, "micro_size": 3},
    "data": {"train": "/shards/train", "validation": "/shards/validation", "crop": "random", "flip": True},
    "optimizer": {"peak_learning_rate": 0.003, "schedule": "cosine", "warmup_steps": 4, "weight_decay": 0.05},
    "loss": {"kind": "softmax", "label_smoothing": 0.1}, "cutmix_alpha": 1.0, "resources": {"gpus_per_rank": 0},
    "index_digests": {"train": "a", "validation": "b"}, "start_digest": None,
}  # fmt: skip


def report(*arguments: object) -> Result:
    """`coatnet report` in this process."""
    return CliRunner().invoke(app, ["report", *map(str, arguments)])


def write_curves(folder: RunFolder, steps: range, purge: int = 1) -> None:
    """What one start adds to TensorBoard."""
    file = EventFile(folder.tensorboard, purge, pytest.fail)
    for step in steps:
        points = {
            "train/loss": 2.4 / (1 + step / 60) + 0.05 * (step % 7),
            "train/learning_rate": 0.003 * min(1.0, step / 40),
            "train/gradient_norm": 40 / step + 0.5,
            "train/images_per_second": 500.0 + step % 13,
            "wall_time/step_p50_seconds": 0.02,
            "wall_time/step_p99_seconds": 0.05 + step / 1e4,
        }
        if step % 100 == 0:
            points |= {"validation/top1": step / 500, "validation/top5": 0.9, "validation/loss": 1.5}
        file.add(charts.scalars(points), step)
    pixels = np.random.default_rng(0).integers(0, 256, (60, 120, 3), np.uint8)
    file.add(image("train/images", pixels, dataformats="HWC"), 1)  # type: ignore[no-untyped-call]
    file.close()


def made_run(folder: Path, classes: list[str] | None = None, name: str = "small") -> MadeRun:
    """A run of two stages: `pretrain` is done, after a stop, a roll-back and skipped samples; `finetune` is new."""
    classes = classes or ["ant", "bee", "cat"]
    run = MadeRun(folder, name)
    run.freeze()
    stage = run.stage("pretrain")
    stage.recipe.write_text(yaml.safe_dump(SETTINGS))
    write_curves(stage, range(1, 250))
    write_curves(stage, range(201, 401), purge=201)
    run.note("pretrain", "begin", 900, ranks=2, node="node1", pid=1)
    run.note("pretrain", "start", 899, step=0, ranks=2)
    run.note("pretrain", "sample_skipped", 890, shard=f"s-{classes[0]}.tar", key=classes[0], reason=classes[1], rank=0)
    for step in (100, 200):
        run.note("pretrain", "save", 800 - step, step=step, checkpoint=f"step-{step:08d}", seconds=0.2, bytes=5364260)
        run.note("pretrain", "evaluation", 799 - step, step=step, top1=step / 500, top5=0.9, loss=1.5, samples=12)
    run.note("pretrain", "stop", 590, reason="SIGTERM", step=200, checkpoint="step-00000200")
    run.note("pretrain", "begin", 500, ranks=4, node=classes[0], pid=2)
    run.note("pretrain", "resume", 499, step=200, ranks=4)
    run.note("pretrain", "change", 499, what="ranks", before="2", now=classes[1], step=200)
    run.note("pretrain", "not_finite", 450, step=301, loss="nan", gradient_norm="nan", rank=1)
    run.note("pretrain", "roll_back", 449, step=305, to=200)
    (run.path / "pretrain/checkpoints/step-00000400").mkdir(parents=True)
    (run.path / "pretrain/checkpoints/step-00000400/manifest.json").touch()
    accuracies = {name: ClassAccuracy(4, number / len(classes), 1.0) for number, name in enumerate(classes)}
    result = stage_result("pretrain/checkpoints/step-00000400", "pretrain", 400)
    stage.finish(replace(result, classes=accuracies))
    return run


def write_evaluation(stage: RunFolder, classes: list[str]) -> Path:
    """A report of `coatnet evaluate` in the folder of a stage."""
    folder = stage.path / "evaluations" / "validation"
    folder.mkdir(parents=True)
    figures: Mapping[str, ClassFigures] = {
        name: ClassFigures(4, 0.5, 1.0, 4, 0.5, display_name=f"the {name}") for name in classes
    }
    report = EvaluationReport(
        model=EvaluatedModel(
            given="run", location="run/step", name="coatnet_debug", weights="raw", step=400, run_id=None,
            classes=len(classes), trained_image_size=64, resized_tables={}, remarks=(),
        ),
        data=EvaluatedData(
            shards="/shards/validation", digest="d", label_map=None, labels_per_sample=1, left_out=0,
            classes_without_samples=0,
        ),
        loss_kind="softmax",
        computation=Computation(64, "whole", "fp32", 12),
        circumstances=Circumstances(0.0, 1.0, 12.0, 1, "CPU"),
        figures=ValidationFigures(top1=0.5, top5=1.0, loss=0.7, samples=12, skipped=0),
        calibration=Calibration(
            0.1, tuple(CalibrationBin(n, (n + 0.5) / 10, n / 10) if n else CalibrationBin(0, None, None) for n in range(10))
        ),
        average_precision=AveragePrecision(0.5, 3, 0.01),
        not_finite=0,
        classes=figures,
        confused=(ConfusedPair(classes[0], classes[1], 3, 0.75),),
        mistakes=(ReportedMistake("s.tar", classes[0], (classes[0],), classes[1], 0.99),),
        unusable=(),
        files={"confusion": "confusion.png", "mistakes": "mistakes.png"},
        left_out={},
    )  # fmt: skip
    (folder / "evaluation.json").write_text(report_text(report))
    assert json.loads(report_text(report)) == json.loads(json.dumps(to_json(report)))
    pixels = np.kron(np.eye(8), np.ones((80, 80)))[:, :, None].repeat(3, 2)
    for name in ("confusion.png", "mistakes.png"):
        Image.fromarray((255 * pixels).astype(np.uint8)).save(folder / name)
    return folder
