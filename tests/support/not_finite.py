"""Steps that are not finite, in the ranks of a command: its variable `TEST_IMPORTS` has the name of this module.

No image in a shard can contain NaN. So the images of one micro-batch of some steps are replaced just before the model; everything
after that is the real code. The steps depend on nothing else, so that every start of a run has the same ones.
"""

import os
from typing import Any

import torch
from torch import Tensor

import pipeline.training.step
from pipeline.plan import TrainPlan

STEPS = "TEST_STEPS_NOT_FINITE"
"""Variable with these steps, from 0, separated by spaces."""

_steps = {int(step) for step in os.environ[STEPS].split()}
_inputs = pipeline.training.step.prepared_inputs  # type: ignore[attr-defined]


def _broken(batch: Any, plan: TrainPlan, step: int, number: int, device: torch.device) -> tuple[Tensor, Tensor]:
    images, targets = _inputs(batch, plan, step, number, device)
    last = plan.stage.batch.micro_batches - 1
    return (images * torch.nan if step in _steps and number == last else images), targets


pipeline.training.step.prepared_inputs = _broken  # type: ignore[attr-defined]
