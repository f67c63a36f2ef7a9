"""The reports of `coatnet evaluate` in the run folder of a stage, as `coatnet status` shows them."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table

from jobs.console import make_table
from pipeline.errors import ConfigError
from pipeline.runs.evaluation_report import FOLDER, read_overview, report_folders

_NUMBERS = ("step", "pixels", "images", "top-5", "loss", "calibration error")


@dataclass(frozen=True, slots=True)
class EvaluationStatus:
    """The most important figures of one report; None for what is not known because it is damaged."""

    name: str
    """Of its folder."""
    folder: str
    problem: str = ""
    """Why the report cannot be read."""
    step: int | None = None
    weights: str | None = None
    shards: str | None = None
    image_size: int | None = None
    samples: int | None = None
    metric: str = "top-1"
    """What `top1` is: top-1, or precision@1 for the sigmoid loss and samples with several labels."""
    top1: float | None = None
    top5: float | None = None
    loss: float | None = None
    calibration_error: float | None = None
    mean_average_precision: float | None = None
    ended: float | None = None
    """In seconds since the epoch."""


def evaluations_of(stage: Path) -> tuple[EvaluationStatus, ...]:
    """The reports in the run folder of a stage, by name."""
    return tuple(_status(folder, stage) for folder in report_folders(stage))


def _status(folder: Path, stage: Path) -> EvaluationStatus:
    name = str(folder.relative_to(stage)).removeprefix(f"{FOLDER}/")
    try:
        report = read_overview(folder)
    except ConfigError as error:
        return EvaluationStatus(name, str(folder), str(error))
    average = report.average_precision
    return EvaluationStatus(
        name=name,
        folder=str(folder),
        step=report.model.step,
        weights=report.model.weights,
        shards=report.data.shards,
        image_size=report.computation.image_size,
        samples=report.figures.samples,
        metric=report.best_name,
        top1=report.figures.top1,
        top5=report.figures.top5,
        loss=report.figures.loss,
        calibration_error=report.calibration.error,
        mean_average_precision=average.mean if average else None,
        ended=report.circumstances.ended,
    )


def evaluation_table(found: Sequence[tuple[str, EvaluationStatus]]) -> Table:
    """A row for each report that can be read, with the stage that it is of."""
    metrics = list(dict.fromkeys(one.metric for _, one in found))
    averages = any(one.mean_average_precision is not None for _, one in found)
    more = ["mean average precision"] if averages else []
    headings = ["stage", "evaluation", "step", "weights", "pixels", "images", *metrics, *_NUMBERS[3:], *more]
    table = make_table(*headings, right=(*_NUMBERS, *metrics, *more), title="evaluations")
    for stage, one in found:
        shares = [_share(one.top1 if one.metric == metric else None) for metric in metrics]
        table.add_row(
            stage,
            one.name,
            f"{one.step or 0:,}",
            one.weights or "-",
            f"{one.image_size}",
            f"{one.samples or 0:,}",
            *shares,
            _share(one.top5),
            f"{one.loss:.4f}",
            f"{one.calibration_error:.4f}",
            *([_share(one.mean_average_precision)] if averages else []),
        )
    return table


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.2%}"
