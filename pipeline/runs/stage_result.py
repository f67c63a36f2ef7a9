"""`result.json` of a run folder: what a finished stage came to."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from data.files.json_records import check_at_least


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

    def __post_init__(self) -> None:
        check_at_least(0, samples=self.samples, skipped=self.skipped)
        check_shares(top1=self.top1, top5=self.top5)


@dataclass(frozen=True, slots=True)
class ClassAccuracy:
    """Of the samples that have a class, the shares in which it is found; None where there are no samples."""

    samples: int
    top1: float | None
    top5: float | None

    def __post_init__(self) -> None:
        check_at_least(0, samples=self.samples)
        check_shares(top1=self.top1 or 0.0, top5=self.top5 or 0.0)


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
    starting_weights: Mapping[str, Any] | None = None
    """What the stage took from weights that it did not train, as its event `weights` has it; None if it took none, or
    in results of earlier versions."""

    deterministic: bool | None = None
    """The setting, if GPUs computed; None on CPUs, where all algorithms are deterministic, and in earlier versions."""

    def __post_init__(self) -> None:
        check_at_least(0, steps=self.steps, samples=self.samples or 0)
        if ".." in self.checkpoint.split("/") or "\0" in self.checkpoint or not self.checkpoint:
            raise ValueError(f"checkpoint: must be a location without `..`, not {self.checkpoint[:80]!r}")


def check_shares(**values: float) -> None:
    """
    Raises:
        ValueError: one of the values, which are given by their names, is not from 0 to 1.
    """
    for name, value in values.items():
        if not 0.0 <= value <= 1.0:
            raise ValueError(f"{name}: must be from 0 to 1, not {value}")
