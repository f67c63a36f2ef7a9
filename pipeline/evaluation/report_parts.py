"""The parts of a report that are computed from the findings of an evaluation."""

import math
from collections.abc import Sequence

import numpy as np

from pipeline.evaluate import Accuracy
from pipeline.evaluation.analysis import EvaluationFindings
from pipeline.runs.evaluation_report import AveragePrecision, ClassFigures, ConfusedPair

_CONFUSED_PAIRS = 100


def mean_precision(findings: EvaluationFindings) -> AveragePrecision | None:
    """The mean over the classes with samples; None unless samples have several labels."""
    if findings.average_precision is None or findings.resolution is None:
        return None
    known = findings.average_precision[~np.isnan(findings.average_precision)]
    return AveragePrecision(float(known.mean()) if len(known) else 0.0, len(known), findings.resolution)


def class_table(
    accuracy: Accuracy, findings: EvaluationFindings, names: Sequence[str], display_names: Sequence[str] | None
) -> dict[str, ClassFigures]:
    """The figures of each class, by `names`."""
    table = {}
    precision = findings.average_precision
    for number, (name, found) in enumerate(accuracy.table(names).items()):
        predicted, right = int(findings.predicted[number]), int(accuracy.of_classes[number, 1])
        average = None if precision is None or math.isnan(precision[number]) else round(float(precision[number]), 6)
        table[name] = ClassFigures(
            samples=found.samples,
            top1=found.top1,
            top5=found.top5,
            predicted=predicted,
            precision=round(right / predicted, 6) if predicted else None,
            average_precision=average,
            display_name=display_names[number] if display_names else None,
        )
    return table


def confused_pairs(accuracy: Accuracy, findings: EvaluationFindings, names: Sequence[str]) -> tuple[ConfusedPair, ...]:
    """The pairs of classes with the most samples; empty if samples have several labels."""
    if findings.confusion is None:
        return ()
    samples = accuracy.of_classes[:, 0].tolist()
    return tuple(
        ConfusedPair(names[true], names[predicted], count, round(count / samples[true], 6))
        for true, predicted, count in findings.confusion.worst(_CONFUSED_PAIRS)
    )


def left_out(findings: EvaluationFindings) -> dict[str, str]:
    """What the report does not have, and why."""
    missing = {}
    if findings.confusion is None:
        missing["confusion"] = "samples have several labels, so that a wrong prediction is not for one of them"
    if not findings.mistakes:
        missing["mistakes"] = "there are none, or none were asked for"
    return missing
