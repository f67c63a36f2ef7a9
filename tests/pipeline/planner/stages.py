"""A small training stage for tests of the planner."""

from typing import Any

from pipeline.recipe.schema import TrainStage

CLASSES = 10


def small_stage(**changes: Any) -> TrainStage:
    """`coatnet_debug` at 32 pixels, 8 micro-batches of 4 images in a step; `changes` replace its settings."""
    settings = {
        "resolution": 32,
        "steps": 100,
        "data": {"train": "none/train", "validation": "none/validation"},
        "model": {"name": "coatnet_debug"},
        "batch": {"global_size": 32, "micro_size": 4},
        "precision": "bf16",
        "optimizer": {"peak_learning_rate": 1e-3},
    }
    return TrainStage.model_validate(settings | changes)
