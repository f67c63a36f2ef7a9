"""Classification losses, in float32 whatever the precision of the model."""

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F


def classification_loss(
    logits: Tensor, labels: Tensor, *, kind: Literal["softmax", "sigmoid"], label_smoothing: float
) -> Tensor:
    """Loss of each sample (B,) from logits (B, classes) and labels (B,) int64.

    "softmax" is the cross entropy. "sigmoid" is the sum over the classes of binary cross entropies, for which
    smoothing s moves the targets from {0, 1} to {s/2, 1 - s/2}.
    """
    logits = logits.float()
    if kind == "softmax":
        return F.cross_entropy(logits, labels, label_smoothing=label_smoothing, reduction="none")
    targets = torch.full_like(logits, label_smoothing / 2).scatter_(1, labels[:, None], 1.0 - label_smoothing / 2)
    return F.binary_cross_entropy_with_logits(logits, targets, reduction="none").sum(dim=1)
