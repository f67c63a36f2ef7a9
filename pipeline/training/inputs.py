"""What the model is given of a micro-batch: images and targets as the recipe has them, on the device."""

import torch
from torch import Tensor

from data.stream import MicroBatch
from models.host_tensors import to_device
from pipeline.plan import TrainPlan
from pipeline.recipe.schema import TrainStage
from pipeline.training.images import erase, normalized
from pipeline.training.loss import class_targets
from pipeline.training.mixup import MixingSettings


def prepared_inputs(
    batch: MicroBatch, plan: TrainPlan, step: int, number: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Images and targets of micro-batch `number` of step `step`, both from 0: erased and mixed as the recipe says.

    Returns:
        (m, S, S, 3) and (m, classes), float32 on the device.
    """
    stage = plan.stage
    images = normalized(batch.images, device, torch.float32)
    erase(images, batch.erased)
    labels = to_device(torch.from_numpy(batch.labels), device)
    smoothing = stage.loss.label_smoothing
    targets = class_targets(labels, len(plan.classes), kind=stage.loss.kind, label_smoothing=smoothing)
    mixing = mixing_settings(stage).mixing(stage.resolution, seed=plan.seed, step=step, number=number)
    return (mixing.images(images), mixing.targets(targets)) if mixing else (images, targets)


def mixing_settings(stage: TrainStage) -> MixingSettings:
    """How the micro-batches of a stage are mixed."""
    return MixingSettings(
        stage.mixup_alpha, stage.cutmix_alpha, stage.mixup_probability, stage.mixup_switch_probability
    )
