"""Records that a run writes, made by hand."""

from pipeline.checkpoints.manifest import CheckpointFacts, RunDigests, RunFacts
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
