"""`result.json` of a run folder: what a finished stage came to."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal


def distinct_names(classes: Sequence[str]) -> list[str]:
    """The names of classes, with the number of the class behind those that several have: labels that are numbers allow
    equal names."""
    counts = Counter(classes)
    return [f"{name} (class {number})" if counts[name] > 1 else name for number, name in enumerate(classes)]


@dataclass(frozen=True, slots=True)
class ValidationFigures:
    """The evaluation at the end of a stage; shares are of `samples`, 0 to 1."""

    top1: float
    top5: float
    loss: float
    samples: int
    skipped: int


@dataclass(frozen=True, slots=True)
class ClassAccuracy:
    """Of the samples that have a class, the shares in which it is found; None where there are no samples."""

    samples: int
    top1: float | None
    top5: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class StageResult:
    """The result of a stage; its fields are the keys of the file."""

    stage: str
    steps: int
    samples: int | None = None
    """Trained on over the whole stage; None for a stage that only evaluates."""
    images_per_second: float | None
    """Mean of the last start; None if it had no step left to take."""
    checkpoint: str
    """See `run_folder.relative_location`."""
    weights: Literal["raw", "ema"]
    """Which were evaluated."""
    validation: ValidationFigures
    classes: Mapping[str, ClassAccuracy]
    """By the names of `distinct_names`, in the order of the classes."""
