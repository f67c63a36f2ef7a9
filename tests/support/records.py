"""Records that a run writes, made by hand."""

from pipeline.checkpoints.manifest import CheckpointFacts, RunDigests, RunFacts
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
    UnusableSample,
)
from pipeline.runs.stage_result import StageResult, ValidationFigures

MODEL = {"name": "coatnet_debug", "num_classes": 3, "image_size": 32}
RUN = RunFacts("pretrain", "fp32", MODEL, RunDigests("recipe", "index", "classes"))


def checkpoint_facts(
    step: int, run: RunFacts = RUN, world_size: int = 1, ema_updates: int | None = None
) -> CheckpointFacts:
    """The facts of a checkpoint after `step` steps of 12 samples."""
    return CheckpointFacts(run, step, 12 * step, 0, step, world_size, ema_updates)


def stage_result(checkpoint: str, stage: str = "pretrain", steps: int = 40) -> StageResult:
    """The result of a stage that ended with `checkpoint`, a path as in `result.json`."""
    return StageResult(
        stage=stage,
        steps=steps,
        images_per_second=480.5,
        checkpoint=checkpoint,
        weights="raw",
        validation=ValidationFigures(top1=0.75, top5=1.0, loss=0.5, samples=12, skipped=0),
        classes={},
    )


def evaluation_report() -> EvaluationReport:
    """A report with something in every field."""
    return EvaluationReport(
        model=EvaluatedModel("run", "run/checkpoints/step-5", "coatnet_debug", "ema", 5, "id", 3, 32, {"3 x 3": 1}, ()),
        data=EvaluatedData("shards", "0" * 64, "map.yaml", 2, 3, 1),
        loss_kind="sigmoid",
        computation=Computation(32, "whole", "fp32", 4),
        circumstances=Circumstances(1.7e9, 1.5, 8.0, 1, "CPU"),
        figures=ValidationFigures(top1=0.75, top5=1.0, loss=0.5, samples=12, skipped=1),
        calibration=Calibration(0.25, (CalibrationBin(0, None, None), CalibrationBin(12, 0.5, 0.75))),
        average_precision=AveragePrecision(0.5, 2, 2**-10),
        not_finite=0,
        classes={"a": ClassFigures(12, 0.75, 1.0, 12, 0.75, 0.5, "an a"), "b": ClassFigures(0, None, None, 0, None)},
        confused=(ConfusedPair("a", "b", 3, 0.25),),
        mistakes=(ReportedMistake("s.tar", "k", ("a",), "b", 0.9),),
        unusable=(UnusableSample("s.tar", "u", "damaged"),),
        files={"classes": "classes.csv"},
        left_out={"confusion": "several labels"},
    )
