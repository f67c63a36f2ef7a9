"""Accuracy over every sample of a dataset once, whatever the number of ranks."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from data.augment import EvaluationTransform
from data.cache import Cache
from data.dataset import Dataset
from data.stream import evaluation_stream
from pipeline.distributed import Ranks
from pipeline.images import normalized
from pipeline.loss import classification_loss
from pipeline.recipe import Stage


@dataclass(frozen=True, slots=True)
class Accuracy:
    """Shares are of `samples`, 0 to 1; `loss` is the mean without label smoothing."""

    top1: float
    top5: float
    loss: float
    samples: int
    skipped: int
    """Samples of the dataset that do not decode and count nowhere."""

    def __str__(self) -> str:
        skipped = f" ({self.skipped:,} more do not decode)" if self.skipped else ""
        return f"top-1 {self.top1:.2%}  top-5 {self.top5:.2%}  on {self.samples:,} images{skipped}"

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@torch.no_grad()
def evaluate(
    network: Callable[[Tensor], Tensor],
    dataset: Dataset,
    cache: Cache,
    stage: Stage,
    ranks: Ranks,
    dtype: torch.dtype,
) -> Accuracy:
    """Evaluate `network`, which maps pictures (B, S, S, 3) to logits and is in evaluation mode, on all ranks together.

    Counts are sums of whole numbers, so the accuracies do not depend on the number of ranks.
    """
    stream = evaluation_stream(
        dataset,
        EvaluationTransform(stage.resolution, stage.data.evaluation_crop),
        micro_batch=stage.batch.micro_size,
        rank=ranks.rank,
        world_size=ranks.world_size,
        workers=stage.data.workers,
        cache=cache,
    )
    # Right in the first place, right in the first five, summed loss, samples.
    sums = torch.zeros(4, dtype=torch.float64, device=ranks.device)
    for batch in stream:
        labels = torch.from_numpy(batch.labels[:, 0]).to(ranks.device)
        weights = torch.from_numpy(batch.weights).to(ranks.device)
        logits = network(normalized(batch.images, ranks.device, dtype)).float()
        best = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]
        loss = classification_loss(logits, labels, kind=stage.loss.kind, label_smoothing=0.0)
        per_sample = torch.stack([best[:, 0].float(), best.any(dim=1).float(), loss, torch.ones_like(loss)], dim=1)
        sums += (per_sample * weights[:, None]).double().sum(dim=0)
    right, right_in_five, loss_sum, samples = ranks.sum(sums).tolist()
    counted = max(1.0, samples)
    return Accuracy(
        top1=right / counted,
        top5=right_in_five / counted,
        loss=loss_sum / counted,
        samples=int(samples),
        skipped=dataset.samples - int(samples),
    )
