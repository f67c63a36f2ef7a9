"""Accuracy over a dataset, each sample counted once, whatever the number of ranks."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from data.dataset import Dataset
from data.images.augment import EvaluationTransform
from data.remote.cache import Cache
from data.stream import MicroBatch, RankShare, evaluation_stream
from models.model_facts import Preprocessing
from pipeline.plan import Plan
from pipeline.ranks.distributed import Ranks
from pipeline.runs.run_folder import RunFolder
from pipeline.runs.stage_result import ClassAccuracy, ValidationFigures, distinct_names
from pipeline.training.images import imagenet_preprocessing, normalized
from pipeline.training.loss import LossKind, class_targets, classification_loss
from pipeline.training.training_batches import SkippedLimits, note_skipped

_FORWARDS_BETWEEN_STOP_CHECKS = 8  # all ranks agree then whether one was asked to stop
_FRACTIONS = 2**32  # of a loss of 1: finer than float32 has them, and room for 2**31 samples
_GREATEST_LOSS = 2**40  # of a sample; what is beyond it is as good as infinite, and has no room in the sum


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


@dataclass(frozen=True, slots=True)
class EvaluationInput:
    """What a model is evaluated on, and how that is read."""

    dataset: Dataset
    """Its classes are those of the model."""
    limits: SkippedLimits
    """How many samples may be unusable; new for every evaluation."""
    workers: int
    """Reader threads."""
    preprocessing: Preprocessing
    micro_size: int
    """Samples of one forward pass on one rank."""
    loss: LossKind
    cache: Cache

    @classmethod
    def of(cls, plan: Plan) -> Self:
        """What a stage is evaluated on."""
        stage = plan.stage
        return cls(
            dataset=plan.validation,
            limits=SkippedLimits(stage.data, stage.data.validation),
            workers=stage.data.workers,
            preprocessing=imagenet_preprocessing(stage.resolution, stage.data.evaluation_crop),
            micro_size=stage.batch.micro_size,
            loss=stage.loss.kind,
            cache=plan.cache,
        )


class EvaluatedBatch(NamedTuple):
    """One micro-batch after its forward pass. Tensors are on the device of the model."""

    batch: MicroBatch
    labels: Tensor
    """(B, k) int64, padded with -1."""
    counted: Tensor
    """(B,) bool: neither padding nor unusable."""
    logits: Tensor
    """(B, classes) float32."""
    predicted: Tensor
    """(B,) int64, the best class."""
    correct: Tensor
    """(B,) bool, whether that is one of the labels."""


def best_classes(logits: Tensor) -> Tensor:
    """The best five classes, or all if there are fewer: logits (B, classes) -> (B, 5) int64, the best one first."""
    return logits.topk(min(5, logits.shape[1]), dim=1).indices


def hits(best: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Whether each label of a sample is its best class, and whether it is one of the best: two (B, k) bool.

    Takes the best classes (B, 5), see `best_classes`, and labels (B, k) int64, padded with -1, which never match.
    """
    found = best[:, :, None] == labels[:, None, :]
    return found[:, 0], found.any(dim=1)


def evaluate(
    network: Callable[[Tensor], Tensor],
    plan: Plan,
    folder: RunFolder,
    ranks: Ranks,
    dtype: torch.dtype,
    stop_wanted: Callable[[], bool] = lambda: False,
) -> Accuracy:
    """Evaluate `network` on the validation samples of a stage; see `evaluate_on`.

    Samples that cannot be used are recorded in the event log.
    """

    def note(evaluated: MicroBatch) -> None:
        note_skipped(evaluated, folder, ranks)

    return evaluate_on(network, EvaluationInput.of(plan), ranks, dtype, note, stop_wanted)


@torch.no_grad()
def evaluate_on(
    network: Callable[[Tensor], Tensor],
    given: EvaluationInput,
    ranks: Ranks,
    dtype: torch.dtype,
    note: Callable[[MicroBatch], None],
    stop_wanted: Callable[[], bool] = lambda: False,
    observe: Callable[[EvaluatedBatch], None] = lambda evaluated: None,
) -> Accuracy:
    """Evaluate `network`, which maps images (B, S, S, 3) to logits and is in evaluation mode, on all ranks together.

    All sums are of integers, so the accuracies and the loss do not depend on the number of ranks.

    Args:
        network: the model, whose images are in `dtype`.
        given: the samples.
        ranks: this process among those of the evaluation.
        dtype: of the images.
        note: called with each micro-batch that this rank has read.
        stop_wanted: whether this rank was asked to stop.
        observe: called with each micro-batch of this rank after its forward pass.

    Raises:
        DataError: too many samples cannot be used, or too many in a row.
        StorageDown: remote shards that cannot be fetched.
        EvaluationStopped: `stop_wanted` returned True on any rank; raised on all of them.
    """
    dataset, classes, view = given.dataset, len(given.dataset.classes), given.preprocessing
    stream = evaluation_stream(
        dataset,
        EvaluationTransform(view.image_size, view.crop),
        RankShare(ranks.rank, ranks.world_size, given.micro_size),
        workers=given.workers,
        cache=given.cache,
    )
    # Correct in the first place, correct in the first five, samples; then the loss as of `_exact`.
    sums = torch.zeros(6, dtype=torch.int64, device=ranks.device)
    # The last row takes what does not count: padding, and labels that a sample does not have.
    of_classes = torch.zeros(classes + 1, 3, dtype=torch.int64, device=ranks.device)
    for number, batch in enumerate(stream):
        if number % _FORWARDS_BETWEEN_STOP_CHECKS == 0:
            stops = ranks.sum(torch.tensor([stop_wanted()], dtype=torch.int64, device=ranks.device))
            if stops.item():
                stream.close()
                raise EvaluationStopped
        note(batch)
        given.limits.count(batch)
        labels = torch.from_numpy(batch.labels).to(ranks.device)
        counted = torch.from_numpy(batch.weights > 0).to(ranks.device)
        logits = network(normalized(batch.images, ranks.device, dtype, view.mean, view.std)).float()
        targets = class_targets(labels, logits.shape[1], kind=given.loss, label_smoothing=0.0)
        loss = classification_loss(logits, targets, given.loss)
        best = best_classes(logits)
        first, in_five = hits(best, labels)
        right = first.any(dim=1)
        per_sample = torch.cat(
            [torch.stack([right, in_five.any(dim=1), torch.ones_like(right)], dim=1).long(), _exact(loss)], dim=1
        )
        sums += (per_sample * counted[:, None]).sum(dim=0)
        rows = torch.where((labels < 0) | ~counted[:, None], classes, labels)
        counts = torch.stack([torch.ones_like(first), first, in_five], dim=2).long()
        of_classes.index_add_(0, rows.flatten(), counts.flatten(0, 1))
        observe(EvaluatedBatch(batch, labels, counted, logits, best[:, 0], right))
    ranks.sum(of_classes)
    hit, hit_in_five, samples, whole, fractions, not_finite = ranks.sum(sums).tolist()
    total = max(1, samples)
    return Accuracy(
        top1=hit / total,
        top5=hit_in_five / total,
        loss=math.nan if not_finite else (whole + fractions / _FRACTIONS) / total,
        samples=samples,
        skipped=dataset.samples - samples,
        of_classes=of_classes[:-1].cpu().numpy(),
    )


def _exact(loss: Tensor) -> Tensor:
    """Losses (B,) as integers whose sums do not depend on their order: (B, 3) int64 with the whole part, the rest in
    units of 1 / `_FRACTIONS`, and whether it is not finite; then the first two are 0."""
    finite = loss < _GREATEST_LOSS  # nor is NaN
    values = torch.where(finite, loss, 0.0).double()
    whole = values.floor()
    return torch.stack([whole, ((values - whole) * _FRACTIONS).round(), ~finite], dim=1).long()
