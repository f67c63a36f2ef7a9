"""Everything beyond the accuracy that an evaluation finds out, counted micro-batch by micro-batch in bounded memory."""

import json
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from data.stream import MicroBatch
from pipeline.evaluate import EvaluatedBatch
from pipeline.evaluation.average_precision import ScoreHistograms
from pipeline.evaluation.calibration import CalibrationCounts
from pipeline.evaluation.confusion import Confusion, ConfusionCounts
from pipeline.evaluation.mistakes import Mistake, MostConfidentMistakes
from pipeline.ranks.distributed import Ranks
from pipeline.runs.evaluation_report import Calibration, UnusableSample
from pipeline.training.loss import LossKind


@dataclass(frozen=True, slots=True)
class EvaluationFindings:
    """What an evaluation has found, on the leader."""

    calibration: Calibration
    predicted: NDArray[np.int64]
    """(classes,) samples for which each class is the best one."""
    confusion: Confusion | None
    """None if samples have several labels: which of them would be confused is not defined."""
    average_precision: NDArray[np.float64] | None
    """(classes,), NaN for classes without samples; None unless samples have several labels."""
    resolution: float | None
    """In logits, of the average precision."""
    mistakes: list[Mistake]
    """The most confident ones, the most confident first."""
    unusable: list[UnusableSample]
    """In the order of the dataset."""
    not_finite: int
    """Samples with a logit that is not finite, which have no part in calibration, average precision and mistakes."""


class Analysis:
    """Observes the micro-batches of one rank.

    Args:
        classes: number of classes.
        several_labels: whether samples may have several.
        kind: of the loss, which says how logits become scores.
        mistakes: how many of the most confident ones to keep.
        device: of the logits.
    """

    def __init__(
        self, classes: int, *, several_labels: bool, kind: LossKind, mistakes: int, device: torch.device
    ) -> None:
        self._kind = kind
        self._calibration = CalibrationCounts.on(device)
        # The predictions of each class, and at the end the samples with logits that are not finite.
        self._counts = torch.zeros(classes + 1, dtype=torch.int64, device=device)
        self._confusion = None if several_labels else ConfusionCounts(classes)
        self._histograms = ScoreHistograms.on(device, classes) if several_labels else None
        self._mistakes = MostConfidentMistakes(mistakes)
        self._unusable: list[tuple[int, str, str, str]] = []

    def note(self, batch: MicroBatch) -> None:
        """Note the samples of a micro-batch that cannot be used."""
        for sample in batch.skipped:
            self._unusable.append((batch.origins[sample.position].id, sample.shard, sample.key, sample.reason))

    def add(self, evaluated: EvaluatedBatch) -> None:
        """Count a micro-batch."""
        batch, labels, counted, logits, predicted, correct = evaluated
        self._counts[:-1].index_add_(0, predicted[counted], torch.ones_like(predicted[counted]))
        if self._confusion:
            self._confusion.add(labels[counted, 0].cpu().numpy(), predicted[counted].cpu().numpy())
        finite = logits.isfinite().all(dim=1)
        self._counts[-1] += (counted & ~finite).sum()
        counted = counted & finite
        confidence = confidence_of(logits, predicted, self._kind)
        self._calibration.add(confidence[counted], correct[counted])
        if self._histograms:
            self._histograms.add(logits[counted], labels[counted])
        candidates = counted & ~correct & (confidence >= self._mistakes.threshold)
        for position in candidates.nonzero().flatten().tolist():
            self._mistakes.add(
                confidence[position].item(),
                batch.origins[position],
                [label for label in batch.labels[position].tolist() if label >= 0],
                int(predicted[position]),
                batch.images[position],
            )

    def result(self, ranks: Ranks) -> EvaluationFindings:
        """What all ranks together have found; all of them call this, and it is complete on the leader."""
        counts = ranks.sum(self._counts).cpu().numpy()
        histograms = self._histograms
        texts = ranks.gather_texts(json.dumps(self._unusable))
        unusable = sorted((int(number), *rest) for text in texts for number, *rest in json.loads(text))
        return EvaluationFindings(
            calibration=self._calibration.result(ranks),
            predicted=counts[:-1],
            confusion=self._confusion.result(ranks) if self._confusion else None,
            average_precision=histograms.result(ranks) if histograms else None,
            resolution=histograms.resolution if histograms else None,
            mistakes=self._mistakes.result(ranks),
            unusable=[UnusableSample(shard, key, reason) for _, shard, key, reason in unusable],
            not_finite=int(counts[-1]),
        )


def confidence_of(logits: Tensor, predicted: Tensor, kind: LossKind) -> Tensor:
    """The score (B,) of the predicted class (B,): its softmax over the logits (B, classes), or its sigmoid."""
    if kind == "sigmoid":
        return logits.gather(1, predicted[:, None])[:, 0].sigmoid()
    return logits.softmax(dim=1).gather(1, predicted[:, None])[:, 0]
