"""A small model for tests whose stem is a detector of brightness, so that bright samples alone make it overflow."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import nn

from data.stream import MicroBatch
from models.coatnet import CoAtNet, Stem
from models.mbconv import MBConv
from models.norm import BatchNorm
from pipeline.plan import TrainPlan, plan_stage
from pipeline.recipe.loader import load_recipe
from pipeline.replay.observation import ObservedModel
from pipeline.training.training_batches import open_stream
from pipeline.weights import build_model, persistent_buffers
from tests.support.recipes import write_recipe

CPU = torch.device("cpu")
STEP = 3
BRIGHT, DARK = 0, 1
"""Classes of the shards of `conftest.py`."""


def planned(shards: Path, folder: Path, *overrides: str) -> TrainPlan:
    """The plan of a stage with micro-batches of four samples."""
    recipe = write_recipe(folder, shards, batch={"global_size": 8, "micro_size": 4})
    plan = plan_stage(load_recipe(recipe, list(overrides)), "pretrain", 1)
    assert isinstance(plan, TrainPlan)
    return plan


def micro_batch(plan: TrainPlan, classes: list[int] | None = None) -> MicroBatch:
    """The first micro-batch of step `STEP`; with `classes`, of the next samples that have these labels, in this order."""
    stream = open_stream(plan, 0, 1, STEP)
    try:
        batch = next(stream)
        if classes is None:
            return batch
        rows: list[tuple[MicroBatch, int]] = []
        while len(rows) < len(classes):
            wanted = classes[len(rows)]
            rows += [(batch, row) for row in np.flatnonzero(batch.labels[:, 0] == wanted).tolist()][:1]
            batch = next(stream)
    finally:
        stream.close()
    return MicroBatch(
        np.stack([batch.images[row] for batch, row in rows]),
        np.stack([batch.labels[row] for batch, row in rows]),
        np.ones(len(rows), np.float32),
        [],
        [batch.origins[row] for batch, row in rows],
    )


def observed_model(plan: TrainPlan, change: Callable[[CoAtNet], None]) -> ObservedModel:
    """A model with the plan's initial weights, changed."""
    model = build_model(plan)
    with torch.no_grad():
        change(model)
    observed = ObservedModel(plan, CPU)
    observed.load(dict(model.named_parameters()), persistent_buffers(model))
    return observed


def detect_brightness(model: CoAtNet, threshold: float) -> None:
    """Let the channels before the stem's second convolution be 0 unless 3x3 pixels are brighter than those of the
    micro-batch by `threshold` standard deviations, and 10^6 for one more of these."""
    stem = model.stem
    assert isinstance(stem, Stem)
    assert isinstance(stem.norm, BatchNorm)
    stem.conv1.weight.fill_(1 / 27)
    stem.norm.weight.fill_(1e6)
    stem.norm.bias.fill_(-1e6 * threshold)


def overflow_forward(model: CoAtNet, threshold: float = 0.8) -> None:
    """Bright samples overflow the stem's second convolution."""
    detect_brightness(model, threshold)
    assert isinstance(model.stem, Stem)
    model.stem.conv2.weight.fill_(1e35)


def overflow_gradient(model: CoAtNet, threshold: float = 0.8) -> None:
    """Bright samples overflow the gradient of the stem's second convolution, and no output.

    What leaves the stem is tiny, and what reaches it of the gradient as large; the shortcut of the second block has the
    factor between them. So the gradient of that convolution is as large, times its input, which is 0 unless it is bright.
    """
    detect_brightness(model, threshold)
    first, second = model.blocks[0], model.blocks[1]
    assert isinstance(model.stem, Stem)
    assert isinstance(first, MBConv)
    assert isinstance(second, MBConv)
    assert isinstance(second.shortcut, nn.Linear)
    model.stem.conv2.weight.mul_(1e-42)
    first.shrink.weight.zero_()
    second.shortcut.weight.mul_(1e36)
    second.shortcut.bias.copy_(torch.linspace(-1, 1, second.shortcut.out_features))  # else LayerNorm has no variance
