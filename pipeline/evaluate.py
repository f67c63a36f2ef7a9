"""Accuracy over every sample of a dataset once, whatever the number of ranks."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from data.augment import EvaluationTransform
from data.stream import evaluation_stream
from pipeline.distributed import Ranks
from pipeline.images import normalized
from pipeline.loss import class_targets, classification_loss
from pipeline.plan import Plan
from pipeline.reader import SkippedLimits, note_skipped
from pipeline.run_folder import RunFolder


@dataclass(frozen=True, slots=True)
class Accuracy:
    """Shares are of `samples`, 0 to 1; `loss` is the mean without label smoothing.

    Where samples have several labels, the best class may be any of them: precision@1, as in the paper on ImageNet-21K.
    """

    top1: float
    top5: float
    loss: float
    samples: int
    skipped: int
    """Samples of the dataset that cannot be used and count nowhere."""

    def __str__(self) -> str:
        skipped = f" ({self.skipped:,} more cannot be used)" if self.skipped else ""
        return f"top-1 {self.top1:.2%}  top-5 {self.top5:.2%}  on {self.samples:,} images{skipped}"

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def hits(logits: Tensor, labels: Tensor) -> Tensor:
    """Whether the best class, and any of the best five, is one of a sample's labels: (B, 2) float32 of 0 and 1.

    From logits (B, classes) and labels (B, k) int64, padded with -1.
    """
    best = logits.topk(min(5, logits.shape[1]), dim=1).indices
    right = (best[:, :, None] == labels[:, None, :]).any(dim=2)
    return torch.stack([right[:, 0], right.any(dim=1)], dim=1).float()


@torch.no_grad()
def evaluate(
    network: Callable[[Tensor], Tensor], plan: Plan, folder: RunFolder, ranks: Ranks, dtype: torch.dtype
) -> Accuracy:
    """Evaluate `network`, which maps pictures (B, S, S, 3) to logits and is in evaluation mode, on all ranks together.

    Counts are sums of whole numbers, so the accuracies do not depend on the number of ranks. Samples that cannot be
    used go into the diary.

    Raises:
        DataError: too many samples cannot be used, or too many one after the other.
        StorageDown: remote shards that cannot be had.
    """
    stage = plan.stage
    limits = SkippedLimits(stage.data, stage.data.validation)
    stream = evaluation_stream(
        plan.validation,
        EvaluationTransform(stage.resolution, stage.data.evaluation_crop),
        micro_batch=stage.batch.micro_size,
        rank=ranks.rank,
        world_size=ranks.world_size,
        workers=stage.data.workers,
        cache=plan.cache,
    )
    # Right in the first place, right in the first five, summed loss, samples.
    sums = torch.zeros(4, dtype=torch.float64, device=ranks.device)
    for batch in stream:
        note_skipped(batch, folder, ranks)
        limits.count(batch)
        labels = torch.from_numpy(batch.labels).to(ranks.device)
        weights = torch.from_numpy(batch.weights).to(ranks.device)
        logits = network(normalized(batch.images, ranks.device, dtype)).float()
        targets = class_targets(labels, logits.shape[1], kind=stage.loss.kind, label_smoothing=0.0)
        loss = classification_loss(logits, targets, stage.loss.kind)
        per_sample = torch.cat([hits(logits, labels), loss[:, None], torch.ones_like(loss)[:, None]], dim=1)
        sums += (per_sample * weights[:, None]).double().sum(dim=0)
    right, right_in_five, loss_sum, samples = ranks.sum(sums).tolist()
    counted = max(1.0, samples)
    return Accuracy(
        top1=right / counted,
        top5=right_in_five / counted,
        loss=loss_sum / counted,
        samples=int(samples),
        skipped=plan.validation.samples - int(samples),
    )
