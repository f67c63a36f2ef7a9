"""Accuracy over a dataset, each sample counted once, whatever the number of ranks."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from data.images.augment import EvaluationTransform
from data.stream import RankShare, evaluation_stream
from pipeline.plan import Plan
from pipeline.ranks.distributed import Ranks
from pipeline.runs.run_folder import RunFolder
from pipeline.runs.stage_result import ClassAccuracy, ValidationFigures, distinct_names
from pipeline.training.images import normalized
from pipeline.training.loss import LossKind, class_targets, classification_loss
from pipeline.training.training_batches import SkippedLimits, note_skipped

_FORWARDS_BETWEEN_STOP_CHECKS = 8  # all ranks agree then whether one was asked to stop


@dataclass(frozen=True, slots=True)
class Accuracy:
    """`top1` and `top5` are shares of `samples`, 0 to 1; `loss` is the mean without label smoothing.

    If samples have several labels, the best class may be any of them: precision@1, as in the paper on ImageNet-21K.
    """

    top1: float
    top5: float
    loss: float
    samples: int
    skipped: int
    """Samples of the dataset that cannot be used and are not counted."""
    of_classes: NDArray[np.int64]
    """(classes, 3): samples with the class; those of them for which it is the best class; or one of the best five."""

    def text(self, kind: LossKind) -> str:
        """A line for people, with the paper's term for stages of that kind of loss."""
        best = "precision@1" if kind == "sigmoid" else "top-1"
        skipped = f" ({self.skipped:,} more cannot be used)" if self.skipped else ""
        return f"{best} {self.top1:.2%}  top-5 {self.top5:.2%}  on {self.samples:,} images{skipped}"

    @property
    def figures(self) -> ValidationFigures:
        """The figures over all classes."""
        return ValidationFigures(self.top1, self.top5, self.loss, self.samples, self.skipped)

    def table(self, classes: Sequence[str]) -> dict[str, ClassAccuracy]:
        """The accuracy of each class."""
        return {
            name: ClassAccuracy(
                samples,
                round(right / samples, 6) if samples else None,
                round(right_in_five / samples, 6) if samples else None,
            )
            for name, (samples, right, right_in_five) in zip(
                distinct_names(classes), self.of_classes.tolist(), strict=True
            )
        }


class EvaluationStopped(Exception):
    """A rank was asked to stop while all of them were evaluating."""


def hits(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Whether each label of a sample is its best class, and whether it is one of the best five: two (B, k) bool.

    Takes logits (B, classes) and labels (B, k) int64, padded with -1, which never match.
    """
    best = logits.topk(min(5, logits.shape[1]), dim=1).indices
    found = best[:, :, None] == labels[:, None, :]
    return found[:, 0], found.any(dim=1)


@torch.no_grad()
def evaluate(
    network: Callable[[Tensor], Tensor],
    plan: Plan,
    folder: RunFolder,
    ranks: Ranks,
    dtype: torch.dtype,
    stop_wanted: Callable[[], bool] = lambda: False,
) -> Accuracy:
    """Evaluate `network`, which maps images (B, S, S, 3) to logits and is in evaluation mode, on all ranks together.

    Counts are sums of integers, so the accuracies do not depend on the number of ranks. Samples that cannot be used
    are recorded in the event log.

    Raises:
        DataError: too many samples cannot be used, or too many in a row.
        StorageDown: remote shards that cannot be fetched.
        EvaluationStopped: `stop_wanted` returned True on any rank; raised on all of them.
    """
    stage = plan.stage
    limits = SkippedLimits(stage.data, stage.data.validation)
    stream = evaluation_stream(
        plan.validation,
        EvaluationTransform(stage.resolution, stage.data.evaluation_crop),
        RankShare(ranks.rank, ranks.world_size, stage.batch.micro_size),
        workers=stage.data.workers,
        cache=plan.cache,
    )
    # Correct in the first place, correct in the first five, summed loss, samples.
    sums = torch.zeros(4, dtype=torch.float64, device=ranks.device)
    # The last row takes what does not count: padding, and labels that a sample does not have.
    of_classes = torch.zeros(len(plan.classes) + 1, 3, dtype=torch.int64, device=ranks.device)
    for number, batch in enumerate(stream):
        if number % _FORWARDS_BETWEEN_STOP_CHECKS == 0:
            stops = ranks.sum(torch.tensor([stop_wanted()], dtype=torch.int64, device=ranks.device))
            if stops.item():
                stream.close()
                raise EvaluationStopped
        note_skipped(batch, folder, ranks)
        limits.count(batch)
        labels = torch.from_numpy(batch.labels).to(ranks.device)
        weights = torch.from_numpy(batch.weights).to(ranks.device)
        logits = network(normalized(batch.images, ranks.device, dtype)).float()
        targets = class_targets(labels, logits.shape[1], kind=stage.loss.kind, label_smoothing=0.0)
        loss = classification_loss(logits, targets, stage.loss.kind)
        first, in_five = hits(logits, labels)
        per_sample = torch.stack([first.any(dim=1), in_five.any(dim=1), loss, torch.ones_like(loss)], dim=1)
        sums += (per_sample * weights[:, None]).double().sum(dim=0)
        rows = torch.where((labels < 0) | (weights[:, None] == 0), len(plan.classes), labels)
        counts = torch.stack([torch.ones_like(first), first, in_five], dim=2).long()
        of_classes.index_add_(0, rows.flatten(), counts.flatten(0, 1))
    ranks.sum(of_classes)
    right, right_in_five, loss_sum, samples = ranks.sum(sums).tolist()
    counted = max(1.0, samples)
    return Accuracy(
        top1=right / counted,
        top5=right_in_five / counted,
        loss=loss_sum / counted,
        samples=int(samples),
        skipped=plan.validation.samples - int(samples),
        of_classes=of_classes[:-1].cpu().numpy(),
    )
