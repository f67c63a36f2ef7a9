"""A small model for tests whose stem is a detector of brightness, so that bright samples alone make it overflow."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import nn

from data.stream import MicroBatch
from models.coatnet import CoAtNet, Stem
from models.mbconv import MBConv
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
DETECTING = "model.convolution_norm=layer"


def planned(shards: Path, folder: Path, *overrides: str) -> TrainPlan:
    """The plan of a stage with micro-batches of four samples; for a detector, the overrides have `DETECTING`."""
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


def detect_brightness(model: CoAtNet, threshold: float) -> tuple[Stem, nn.Linear]:
    """Let four channels before the stem's second convolution be 10^6 where 3x3 normalized pixels are brighter than
    `threshold` on average, and 0 elsewhere; and the other four be 0. Returns the stem and the next layer with weights.

    LayerNorm makes 1 and -1 of four channels with that average and four with the threshold. Grey has 0.2, and of the
    pictures dark ones at most 0 and bright ones at least 1.
    """
    stem, first, second = model.stem, model.blocks[0], model.blocks[1]
    assert isinstance(stem, Stem)
    assert isinstance(stem.norm, nn.LayerNorm)
    stem.conv1.weight.zero_()
    stem.conv1.weight[:4].fill_(1 / 27)
    stem.conv1.bias[4:].fill_(threshold)  # type: ignore[index]
    stem.norm.weight[:4].fill_(1e6)
    stem.norm.weight[4:].zero_()
    assert isinstance(first, MBConv)
    assert isinstance(second, MBConv)
    assert isinstance(second.shortcut, nn.Linear)
    first.shrink.weight.zero_()  # the block is its shortcut, without weights
    # Without it, samples that are not bright are the same in all channels, and LayerNorm amplifies their gradients.
    second.shortcut.bias.copy_(torch.linspace(-1, 1, second.shortcut.out_features))
    return stem, second.shortcut


def overflow_forward(model: CoAtNet, threshold: float = 0.8) -> None:
    """Bright samples overflow the stem's second convolution."""
    stem, _ = detect_brightness(model, threshold)
    stem.conv2.weight.fill_(1e32)


def overflow_gradient(model: CoAtNet, threshold: float = 0.8) -> None:
    """Bright samples overflow the gradient of the stem's second convolution, and no output.

    What leaves the stem is tiny, and what reaches it of the gradient as large; the shortcut of the second block has the
    factor between them. So the gradient of that convolution is as large, times its input, which is 0 unless it is bright.
    """
    stem, shortcut = detect_brightness(model, threshold)
    stem.conv2.weight.mul_(1e-42)
    shortcut.weight.mul_(1e36)
