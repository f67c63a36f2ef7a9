"""Predictions for people and programs: a table, JSON, CSV, and a picture."""

import csv
import io
from collections.abc import Sequence
from typing import Any

from PIL import Image
from rich.table import Table

from data.images.contact_sheet import FAINT, INK, RIGHT, WRONG, CaptionedImage, contact_sheet, enlarged
from data.text.printable import one_line
from jobs.console import make_table
from models.model_facts import ModelFacts, Preprocessing
from pipeline.monitoring.console import styled_text
from pipeline.predict import ClassifiedImage, PredictionCounts, readable_score

PICTURE_IMAGES = 200
"""Most images of a picture."""
PICTURE_CELL = 176
"""Side in pixels of the square that an image is fitted into."""
_PICTURE_COLUMNS = 6
_LONGEST_PROBLEM = 60  # in a cell
_PICTURE_CLASSES = 3  # below an image
CSV_COLUMNS = ("image", "rank", "class_number", "class", "name", "score", "labels", "problem")
SCORES = {
    "softmax": "softmax: the probabilities of all classes add up to 1",
    "sigmoid": "sigmoid: the probability of each class for itself; they do not add up to 1",
}
"""What the scores of a model are, by its loss."""


class ShownClassNames:
    """How the classes of a model are called: by its names, which may be ids, and by names for people.

    Args:
        names: None if they are not known.
        display_names: None if there are none.
    """

    def __init__(self, names: Sequence[str] | None, display_names: Sequence[str] | None) -> None:
        self._names, self._display_names = names, display_names

    def name(self, number: int) -> str | None:
        """The name of a class in the model."""
        return None if self._names is None else self._names[number]

    def display_name(self, number: int) -> str | None:
        """Its name for people."""
        return None if self._display_names is None else self._display_names[number]

    def text(self, number: int) -> str:
        """All that is known about what it is called."""
        name, display_name = self.name(number), self.display_name(number)
        if display_name is None or display_name == name:
            return f"class {number:,}" if name is None else name
        return display_name if name is None else f"{display_name} ({name})"

    def short(self, number: int) -> str:
        """The best of its names."""
        return self.display_name(number) or self.text(number)


def prediction_table(images: Sequence[ClassifiedImage], names: ShownClassNames) -> Table:
    """A section for each image, with a row for each of its best classes, or with the reason why it has none."""
    labelled = any(image.labels for image in images)
    table = make_table(
        "image", *(["label"] if labelled else []), "rank", "class", "probability", right=("rank", "probability")
    )
    for image in images:
        if image.problem:
            table.add_row(
                one_line(image.name),
                *([""] if labelled else []),
                "",
                styled_text((_shortened(one_line(image.problem)), "red")),
                "",
                end_section=True,
            )
            continue
        for rank, (number, score) in enumerate(zip(image.classes, image.scores, strict=True), 1):
            first = rank == 1
            text = one_line(names.text(number))
            style = ("green" if image.right[0] else "red") if image.right and first else ""
            labels = [one_line(", ".join(image.labels)) if first else ""] if labelled else []
            table.add_row(
                one_line(image.name) if first else "",
                *labels,
                str(rank),
                styled_text((text, style)),
                readable_score(score),
                end_section=rank == len(image.classes),
            )
    return table


def _shortened(problem: str) -> str:
    """As much of a problem as leaves room for the columns beside it; all of it is a warning."""
    return problem if len(problem) <= _LONGEST_PROBLEM else f"{problem[: _LONGEST_PROBLEM - 1].rstrip()}…"


def as_json(
    images: Sequence[ClassifiedImage],
    counts: PredictionCounts,
    names: ShownClassNames,
    facts: ModelFacts,
    preprocessing: Preprocessing,
    device: str,
) -> dict[str, Any]:
    """The predictions for programs; the keys are documented in docs/predict.md."""
    return {
        "model": {
            "location": facts.source.resolved,
            "name": facts.arguments["name"],
            "classes": facts.arguments["num_classes"],
            "weights": facts.weights,
            "step": facts.step,
            "run_id": facts.run_id,
        },
        "scores": facts.loss,
        "image_size": preprocessing.image_size,
        "crop": preprocessing.crop,
        "device": device,
        "images": [
            {
                "image": image.name,
                "labels": list(image.labels),
                "turned": image.turned,
                "predictions": [
                    {
                        "rank": rank,
                        "class_number": number,
                        "class": names.name(number),
                        "name": names.display_name(number),
                        "score": exact(score),
                    }
                    for rank, (number, score) in enumerate(zip(image.classes, image.scores, strict=True), 1)
                ],
            }
            for image in images
            if not image.problem
        ],
        "unreadable": [{"image": image.name, "problem": image.problem} for image in images if image.problem],
        "accuracy": {
            "images": counts.labelled,
            "top1": round(counts.right / counts.labelled, 6),
            "top5": round(counts.right_in_five / counts.labelled, 6),
        }
        if counts.labelled
        else None,
    }


def as_csv(images: Sequence[ClassifiedImage], names: ShownClassNames) -> str:
    """A row for each image and rank, and one for each image that cannot be used; names have visible escapes."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(CSV_COLUMNS)
    for image in images:
        name, labels = one_line(image.name), one_line("; ".join(image.labels))
        if image.problem:
            writer.writerow((name, "", "", "", "", "", labels, one_line(image.problem)))
        for rank, (number, score) in enumerate(zip(image.classes, image.scores, strict=True), 1):
            called = [one_line(text or "") for text in (names.name(number), names.display_name(number))]
            writer.writerow((name, rank, number, *called, exact(score), labels, ""))
    return file.getvalue()


def exact(score: float) -> float:
    """A float32 with the digits that distinguish it from every other one."""
    return float(f"{score:.9g}")


def picture(images: Sequence[ClassifiedImage], names: ShownClassNames) -> Image.Image:
    """The first `PICTURE_IMAGES` images with their best classes, and with their labels if they have any."""
    return contact_sheet(
        [_captioned(image, names) for image in images[:PICTURE_IMAGES]], PICTURE_CELL, _PICTURE_COLUMNS
    )


def _captioned(image: ClassifiedImage, names: ShownClassNames) -> CaptionedImage:
    best = [
        f"{readable_score(score)} {names.short(number)}"
        for number, score in zip(image.classes[:_PICTURE_CLASSES], image.scores, strict=False)
    ]
    labels = [f"label: {', '.join(image.labels)}"] if image.labels else []
    title, subtitle, *lines = [*(best or [image.problem]), *labels, _file_name(image)]
    ink = FAINT if image.problem else INK if image.right is None else RIGHT if image.right[0] else WRONG
    pixels = None if image.thumbnail is None else enlarged(image.thumbnail, PICTURE_CELL)
    return CaptionedImage(pixels, title, subtitle, ink, tuple(lines))


def _file_name(image: ClassifiedImage) -> str:
    """The end of a name, which says more than its beginning."""
    return image.name.rstrip("/").rpartition("/")[2]
