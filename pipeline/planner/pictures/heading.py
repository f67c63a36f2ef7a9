"""What stands above each picture: its title, where its figures are from, and its legend."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from data.text.printable import one_line
from pipeline.planner.pictures.drawing import (
    GREEN,
    INK,
    MARGIN,
    NORMAL,
    ORANGE,
    SMALL,
    SOFT,
    TITLE,
    WIDTH,
    Line,
    Rectangle,
    Shapes,
    Text,
    fitted,
    text_width,
    wrapped,
)

_LINE = 20  # pixels from one line of text to the next
_ESTIMATE_BACK, _MEASURED_BACK = "#fdf1e3", "#e6f4ea"


@dataclass(frozen=True, slots=True)
class Subject:
    """What a picture is of."""

    stage: str
    """Name of the stage."""
    gpu: str
    """Kind of the GPU, as "H100 80 GB"."""
    measured: bool
    """Whether the figures were measured; otherwise the title says that they are an estimate, and its range."""
    details: str = ""
    """What else the figures depend on, as model, precision, batch and cluster, and what is assumed or left out: a
    sentence or a list, which is shown below the title."""


@dataclass(frozen=True, slots=True)
class LegendEntry:
    """A sign and what it means."""

    sign: Literal["area", "line", "dashes", "text"]
    colour: str
    text: str
    example: str = ""
    """What the sign "text" looks like; empty for a remark."""


def add_heading(parts: Shapes, what: str, subject: Subject, reach: str) -> float:
    """Add title, origin of the figures and details.

    Args:
        parts: of the picture.
        what: the picture shows, the beginning of the title.
        subject: that it shows it of.
        reach: the range of an estimate, or empty.

    Returns the vertical place below.
    """
    width = WIDTH - 2 * MARGIN
    title = f"{what}: stage {one_line(subject.stage)} on {one_line(subject.gpu)}"
    size = TITLE if text_width(title, TITLE) <= width else NORMAL
    parts.add(Text(MARGIN, 36, fitted(title, width, size), INK, size))
    label, ink, back = ("measured", GREEN, _MEASURED_BACK) if subject.measured else ("estimate", ORANGE, _ESTIMATE_BACK)
    if reach:
        label = f"{label}: {reach}"
    label = fitted(label, width - 20)
    y = 68.0
    parts.add(Rectangle(MARGIN, y - 11, MARGIN + text_width(label) + 20, y + 11, back))
    parts.add(Text(MARGIN + 10, y, label, ink))
    y += 26
    for line in wrapped(one_line(subject.details), width):
        parts.add(Text(MARGIN, y, line, SOFT))
        y += _LINE
    return y


def add_legend(parts: Shapes, entries: Sequence[LegendEntry], left: float, top: float, right: float) -> float:
    """Add signs with their meanings, in as many lines as they need; returns the vertical place below."""
    x, y = left, top + _LINE / 2
    for entry in entries:
        sign = _width_of_sign(entry)
        text = fitted(entry.text, right - left - sign)
        width = sign + text_width(text)
        if x > left and x + width > right:
            x, y = left, y + _LINE + 2
        match entry.sign:
            case "area":
                parts.add(Rectangle(x, y - 6, x + 14, y + 6, entry.colour))
            case "line":
                parts.add(Line(((x, y), (x + 26, y)), entry.colour, 2.0))
            case "dashes":
                parts.add(Line(((x, y), (x + 26, y)), entry.colour, 2.0, (6.0, 4.0)))
            case "text":
                if entry.example:
                    parts.add(Text(x, y, entry.example, entry.colour, SMALL))
        parts.add(Text(x + sign, y, text, SOFT))
        x += width + 24
    return y + _LINE / 2


def _width_of_sign(entry: LegendEntry) -> int:
    """In pixels, with the space after it."""
    match entry.sign:
        case "area":
            return 22
        case "text":
            return text_width(entry.example, SMALL) + 8 if entry.example else 0
        case _:
            return 34
