"""Classification losses, in float32 whatever the precision of the model."""

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

LossKind = Literal["softmax", "sigmoid"]


def class_targets(labels: Tensor, classes: int, *, kind: LossKind, label_smoothing: float) -> Tensor:
    """Targets (B, classes) float32 of labels (B, k) int64, padded with -1; k is 1 if samples have one label.

    Smoothing s gives "softmax" the distribution (1 - s) * one-hot + s / classes, and moves the targets of "sigmoid"
    from {0, 1} to {s/2, 1 - s/2}.
    """
    # -1 goes into an extra column that is cut off again.
    hot = torch.zeros(len(labels), classes + 1, device=labels.device)
    hot = hot.scatter_(1, torch.where(labels < 0, classes, labels), 1.0)[:, :classes]
    return hot * (1 - label_smoothing) + label_smoothing / (classes if kind == "softmax" else 2)


def classification_loss(logits: Tensor, targets: Tensor, kind: LossKind) -> Tensor:
    """Loss of each sample (B,) float32 from logits and targets (B, classes).

    "softmax" is the cross entropy, "sigmoid" the sum over the classes of binary cross entropies.
    """
    logits = logits.float()
    if kind == "softmax":
        return F.cross_entropy(logits, targets, reduction="none")
    return F.binary_cross_entropy_with_logits(logits, targets, reduction="none").sum(dim=1)
