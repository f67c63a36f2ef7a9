"""`evaluation.json`: the report of `coatnet evaluate`, and the files that it writes beside it."""

import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from data.errors import raise_if_passing
from data.files.json_records import check_at_least, load_json, parse_json, to_json, to_record
from data.files.regular_file import read_regular
from data.remote.web_address import without_secrets
from pipeline.errors import ConfigError
from pipeline.runs.stage_result import ValidationFigures, check_shares

REPORT = "evaluation.json"
FOLDER = "evaluations"
"""In the run folder of a stage: a folder for each evaluation of its model."""
FORMAT = "coatnet-evaluation"
VERSION = 1

CLASSES, CONFUSION, CONFUSION_PICTURE = "classes.csv", "confusion.csv", "confusion.png"
MISTAKES, MISTAKES_PICTURE, UNUSABLE = "mistakes.csv", "mistakes.png", "unusable.csv"
FILES = (REPORT, CLASSES, CONFUSION, CONFUSION_PICTURE, MISTAKES, MISTAKES_PICTURE, UNUSABLE)
"""All that a report may consist of, apart from the folders for TensorBoard and logs."""
TENSORBOARD = "tensorboard"


@dataclass(frozen=True, slots=True)
class EvaluatedModel:
    """What was evaluated."""

    given: str
    """As on the command line."""
    location: str
    """The checkpoint or file that this means."""
    name: str
    """The variant."""
    weights: Literal["raw", "ema"]
    step: int
    run_id: str | None
    classes: int
    trained_image_size: int
    resized_tables: Mapping[str, int]
    """Number of relative position tables that were resized for another image size, by their sizes before and after."""
    remarks: tuple[str, ...]
    """What had to be assumed about the model."""


@dataclass(frozen=True, slots=True)
class EvaluatedData:
    """What it was evaluated on."""

    shards: str
    digest: str
    """Of the index and the label map."""
    label_map: str | None
    labels_per_sample: int
    left_out: int
    """Samples that the label map drops, or whose label the index ignores."""
    classes_without_samples: int
    """Of the model's classes."""


@dataclass(frozen=True, slots=True)
class Computation:
    """How it was computed: all that the figures depend on, apart from model and data."""

    image_size: int
    crop: Literal["center", "whole"]
    precision: Literal["fp32", "bf16", "bf16_autocast"]
    batch_size: int
    """Images of one forward pass."""


@dataclass(frozen=True, slots=True)
class Circumstances:
    """What the figures do not depend on."""

    ended: float
    """Seconds since the epoch."""
    seconds: float
    images_per_second: float
    ranks: int
    device: str


@dataclass(frozen=True, slots=True)
class CalibrationBin:
    """Predictions whose confidence is in one of the equal parts of 0 to 1."""

    samples: int
    confidence: float | None
    """Their mean; None without samples."""
    accuracy: float | None
    """The share of them that is right."""


@dataclass(frozen=True, slots=True)
class Calibration:
    """Expected calibration error: the mean over the samples of the distance of accuracy and confidence of their bin."""

    error: float
    bins: tuple[CalibrationBin, ...]
    """Of equal width, from confidence 0 to 1; the upper limit of a bin belongs to it."""

    def __post_init__(self) -> None:
        check_shares(error=self.error)


@dataclass(frozen=True, slots=True)
class AveragePrecision:
    """Of data with several labels, see `pipeline.evaluation.average_precision`."""

    mean: float
    classes: int
    """Classes with samples, over which the mean is."""
    resolution: float
    """Logits that fall into one interval of this width count as equal."""

    def __post_init__(self) -> None:
        check_shares(mean=self.mean)


@dataclass(frozen=True, slots=True)
class ClassFigures:
    """One class. Shares are 0 to 1, and None where they would be of nothing."""

    samples: int
    """Samples with the class."""
    top1: float | None
    """Of those, the share for which it is the best class (recall)."""
    top5: float | None
    """Of those, the share for which it is one of the best five."""
    predicted: int
    """Samples for which it is the best class."""
    precision: float | None
    """Of those, the share that has the class."""
    average_precision: float | None = None
    """Of data with several labels."""
    display_name: str | None = None

    def __post_init__(self) -> None:
        check_at_least(0, samples=self.samples, predicted=self.predicted)
        check_shares(top1=self.top1 or 0.0, top5=self.top5 or 0.0, precision=self.precision or 0.0)


@dataclass(frozen=True, slots=True)
class ConfusedPair:
    """Samples of one class whose best class is another."""

    true: str
    predicted: str
    samples: int
    share: float
    """Of the samples of the true class."""


@dataclass(frozen=True, slots=True)
class ReportedMistake:
    """A sample whose best class is none of its labels."""

    shard: str
    key: str
    labels: tuple[str, ...]
    predicted: str
    score: float
    """Of the prediction, 0 to 1."""


@dataclass(frozen=True, slots=True)
class UnusableSample:
    """A sample that could not be used, and why."""

    shard: str
    key: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationReport:
    """The report; its fields are the keys of the file."""

    format: str = FORMAT
    version: int = VERSION
    model: EvaluatedModel
    data: EvaluatedData
    loss_kind: Literal["softmax", "sigmoid"]
    """How logits become scores."""
    computation: Computation
    circumstances: Circumstances
    figures: ValidationFigures
    """As in the `validation` of a stage's `result.json`."""
    calibration: Calibration
    average_precision: AveragePrecision | None = None
    not_finite: int
    """Samples with logits that are not finite; then the loss may be NaN."""
    classes: Mapping[str, ClassFigures]
    """By the names of `stage_result.distinct_names`, in the order of the classes."""
    confused: tuple[ConfusedPair, ...]
    """The pairs with the most samples, most first."""
    mistakes: tuple[ReportedMistake, ...]
    """The most confident ones, most confident first."""
    unusable: tuple[UnusableSample, ...]
    """The first of the `figures.skipped` samples that cannot be used."""
    files: Mapping[str, str]
    """What -> name of the file beside this one."""
    left_out: Mapping[str, str]
    """What is not among the files, and why."""

    @property
    def best_name(self) -> str:
        """What the share of samples is called whose best class is right: of several labels it may be any."""
        return "precision@1" if self.data.labels_per_sample > 1 or self.loss_kind == "sigmoid" else "top-1"


@dataclass(frozen=True, slots=True)
class _Header:
    format: str
    version: int


def report_text(report: EvaluationReport) -> str:
    """The content of the file, without signatures and logins in addresses."""
    return without_secrets(json.dumps(to_json(report), indent=1)) + "\n"


def read_report(folder: Path) -> EvaluationReport:
    """The report in `folder`.

    Raises:
        ConfigError: there is none, or it is damaged or of another version.
    """
    path = folder / REPORT
    try:
        content = read_regular(path)
        header = to_record(_Header, load_json(content))
        if (header.format, header.version) != (FORMAT, VERSION):
            raise ConfigError(
                f"{path}: format {header.format} version {header.version}, and this program reads {FORMAT} version "
                f"{VERSION}; evaluate again"
            )
        return parse_json(EvaluationReport, content)
    except (FileNotFoundError, NotADirectoryError):
        raise ConfigError(f"{folder}: no {REPORT} there; it is written by: coatnet evaluate") from None
    except (OSError, ValueError) as error:
        raise_if_passing(error)
        raise ConfigError(f"{path}: damaged ({error}); restore it from a copy, or evaluate again") from None


def refuse_existing(folder: Path, *, overwrite: bool) -> None:
    """
    Raises:
        ConfigError: the folder has a report, or a part of one, and `overwrite` is not set.
    """
    there = [name for name in FILES if (folder / name).exists()]
    if there and not overwrite:
        raise ConfigError(
            f"{folder}: has a report already ({', '.join(there)}); replace it with --overwrite, or give another --out"
        )


def create_folder(folder: Path) -> None:
    """Create the folder of a report, unless it exists; other files in it are left alone.

    Raises:
        ConfigError: it cannot be created, or not be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ConfigError(
            f"{folder}: the report cannot be written there ({error.strerror}); give another folder as --out"
        ) from None


def report_folders(stage: Path) -> list[Path]:
    """The folders with reports in the run folder of a stage: in it, or in its `evaluations`; by name."""
    return sorted(path.parent for pattern in (f"*/{REPORT}", f"{FOLDER}/*/{REPORT}") for path in stage.glob(pattern))
