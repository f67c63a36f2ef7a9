"""The files of a report: tables for other programs, pictures, TensorBoard; `evaluation.json` last."""

import csv
import io
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
from PIL import Image
from tensorboard.plugins.text.summary_v2 import text_pb
from torch.utils.tensorboard.summary import image as image_summary

from data.files.atomic_file import atomic_file, write_atomically
from data.images.contact_sheet import WRONG, CaptionedImage, contact_sheet
from data.remote.web_address import without_secrets
from data.text.printable import printable
from pipeline.errors import ConfigError
from pipeline.evaluation.analysis import EvaluationFindings
from pipeline.evaluation.confusion_picture import confusion_picture
from pipeline.monitoring import charts
from pipeline.monitoring.event_file import EventFile
from pipeline.runs.evaluation_report import (
    CLASSES,
    CONFUSION,
    CONFUSION_PICTURE,
    FILES,
    MISTAKES,
    MISTAKES_PICTURE,
    REPORT,
    TENSORBOARD,
    UNUSABLE,
    EvaluationReport,
    report_text,
)
from pipeline.runs.evaluation_summary import summary_rows


def write_report(folder: Path, report: EvaluationReport, findings: EvaluationFindings, names: Sequence[str]) -> None:
    """Write the report and all that its `files` name, in place of an earlier report.

    Args:
        folder: exists.
        report: as of `evaluation_report`.
        findings: that it is of.
        names: of the classes, as in the report.

    Raises:
        OSError: a file cannot be written.
    """
    (folder / REPORT).unlink(missing_ok=True)  # first: where it is, the other files are complete
    for name in FILES:
        (folder / name).unlink(missing_ok=True)
    for old in (folder / TENSORBOARD).glob("events.out.tfevents.*"):
        old.unlink()
    _write_table(
        folder / CLASSES,
        ("class", "name", "samples", "top1", "top5", "predicted", "precision", "average_precision"),
        (
            (
                name,
                row.display_name,
                row.samples,
                row.top1,
                row.top5,
                row.predicted,
                row.precision,
                row.average_precision,
            )
            for name, row in report.classes.items()
        ),
    )
    pictures: dict[str, Image.Image] = {}
    confusion = findings.confusion
    if confusion:
        _write_table(
            folder / CONFUSION,
            ("true", "predicted", "count"),
            (
                (names[true], names[predicted], count)
                for true, predicted, count in zip(
                    confusion.true.tolist(), confusion.predicted.tolist(), confusion.counts.tolist(), strict=True
                )
            ),
        )
        pictures[CONFUSION_PICTURE] = confusion_picture(confusion, shown_names(report)).image
    if report.mistakes:
        _write_table(
            folder / MISTAKES,
            ("shard", "key", "labels", "predicted", "score"),
            ((one.shard, one.key, "; ".join(one.labels), one.predicted, one.score) for one in report.mistakes),
        )
        pictures[MISTAKES_PICTURE] = mistakes_sheet(report, findings)
    if findings.unusable:
        _write_table(
            folder / UNUSABLE,
            ("shard", "key", "reason"),
            ((one.shard, one.key, one.reason) for one in findings.unusable),
        )
    for name, picture in pictures.items():
        with atomic_file(folder / name) as file:
            picture.save(file, "PNG")
    _write_tensorboard(folder / TENSORBOARD, report, pictures)
    write_atomically(folder / REPORT, report_text(report))


def file_names(findings: EvaluationFindings) -> dict[str, str]:
    """What is in a file of the report -> its name."""
    found = {"classes": CLASSES}
    if findings.confusion:
        found |= {"confusion": CONFUSION, "confusion_picture": CONFUSION_PICTURE}
    if findings.mistakes:
        found |= {"mistakes": MISTAKES, "mistakes_picture": MISTAKES_PICTURE}
    if findings.unusable:
        found |= {"unusable": UNUSABLE}
    return found


def shown_names(report: EvaluationReport) -> list[str]:
    """The names of the classes for people."""
    return [row.display_name or name for name, row in report.classes.items()]


def mistakes_sheet(report: EvaluationReport, findings: EvaluationFindings) -> Image.Image:
    """The most confident mistakes as the model saw them, with prediction, score, label and key."""
    shown = dict(zip(report.classes, shown_names(report), strict=True))
    return contact_sheet(
        [
            CaptionedImage(
                found.pixels,
                f"{one.score:.1%} {shown[one.predicted]}",
                f"is {', '.join(shown[label] for label in one.labels)}",
                WRONG,
                (one.key,),
            )
            for one, found in zip(report.mistakes, findings.mistakes, strict=True)
        ]
    )


def _write_table(path: Path, headings: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """CSV as of RFC 4180 with a line of headings, in UTF-8; what is not UTF-8 in names is escaped, and signatures and
    logins in addresses are left out."""
    with atomic_file(path) as file:
        text = io.TextIOWrapper(file, "utf-8", errors="backslashreplace", newline="")
        writer = csv.writer(text)
        writer.writerow(headings)
        writer.writerows([without_secrets(cell) if isinstance(cell, str) else cell for cell in row] for row in rows)
        text.flush()
        text.detach()


def _write_tensorboard(folder: Path, report: EvaluationReport, pictures: dict[str, Image.Image]) -> None:
    """A run of its own beside those of the stages, with one point on their curves."""
    step = report.model.step
    figures = report.figures
    best = "precision_at_1" if report.best_name == "precision@1" else "top1"
    points = {
        f"validation/{best}": figures.top1,
        "validation/top5": figures.top5,
        "validation/loss": figures.loss,
        "validation/calibration_error": report.calibration.error,
    }
    if report.average_precision:
        points["validation/mean_average_precision"] = report.average_precision.mean
    failures: list[str] = []
    events = EventFile(folder, step, failures.append)
    events.add(charts.scalars(points), step)
    lines = [f"    {name:24}{value}" for name, value in summary_rows(report)]  # a code block, whatever is in a name
    events.add(text_pb("evaluation", printable("\n".join(lines))), step)
    for name, picture in pictures.items():
        pixels = np.asarray(picture.convert("RGB"))
        tag = f"evaluation/{name.removesuffix('.png')}"
        events.add(image_summary(tag, pixels, dataformats="HWC"), step)  # type: ignore[no-untyped-call]
    with suppress(OSError):
        events.close()
    if failures:
        raise ConfigError(f"{folder}: {failures[0]}; give another folder as --out, or free some space")
