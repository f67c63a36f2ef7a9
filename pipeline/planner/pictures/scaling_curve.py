"""Images per second by the number of GPUs."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from PIL import Image

from pipeline.planner.pictures.drawing import (
    AXIS,
    BLUE,
    GRID,
    INK,
    MARGIN,
    RED,
    SMALL,
    SOFT,
    WIDTH,
    Dot,
    Drawing,
    Line,
    Polygon,
    Shapes,
    Text,
    text_width,
    vertical,
)
from pipeline.planner.pictures.heading import LegendEntry, Subject, add_heading, add_legend
from pipeline.planner.pictures.ticks import exact, logarithmic_ticks, percent, rounded

_BAND = "#dce7f6"
_PLOT_HEIGHT = 400
_ROW = 20  # pixels from one row of figures below the axis to the next
_SPACE = 14  # pixels between columns of figures
_INSET = 40  # pixels from the ends of the horizontal axis to the first and the last point
_FIGURES = ("GPUs", "images/s", "of ideal")
_MANY = 20  # points; their dots are smaller


@dataclass(frozen=True, slots=True)
class ScalingPoint:
    """What a number of GPUs reaches together."""

    gpus: int
    images_per_second: float
    """Of all GPUs."""
    exposed_communication: float
    """Share of the step in which the GPUs wait for communication, from 0 to 1."""
    least: float | None = None
    """Images per second, the range of an estimate."""
    most: float | None = None


@dataclass(frozen=True, slots=True)
class Axes:
    """From GPUs and images per second to pixels, both logarithmically; `gpus` are those of the first and the last
    point, or half and twice those of a single one."""

    gpus: tuple[float, float]
    speeds: tuple[float, float]
    left: float
    top: float
    right: float
    bottom: float

    def x(self, gpus: float) -> float:
        """The horizontal place of a number of GPUs."""
        width = self.right - self.left - 2 * _INSET
        return self.left + _INSET + width * _share(gpus, self.gpus)

    def y(self, speed: float) -> float:
        """The vertical place of a number of images per second."""
        return self.bottom - (self.bottom - self.top) * _share(speed, self.speeds)


def scaling_picture(subject: Subject, points: Sequence[ScalingPoint]) -> Image.Image:
    """The picture of `scaling_drawing`, RGB."""
    return scaling_drawing(subject, points).image


def scaling_drawing(subject: Subject, points: Sequence[ScalingPoint]) -> Drawing:
    """A line through the points with its range, and the one of ideal scaling from the least number of GPUs on.

    The figures of the points stand below the axis; where they would not fit beside each other, those of some are left
    out.
    """
    points = sorted(points, key=lambda point: point.gpus)
    _check(points)
    first, last = points[0], points[-1]
    parts = Shapes()
    y = add_heading(parts, "Images per second by number of GPUs", subject, _range(last))
    y = add_legend(parts, _legend(subject, points), MARGIN, y, WIDTH - MARGIN) + 34
    axes = _axes(points, y)
    columns = [_figures(point, first) for point in points]
    widths = [max(text_width(text, SMALL) for text in column) for column in columns]
    places = [axes.x(point.gpus) for point in points]
    named = columns_that_fit(list(zip(places, widths, strict=True)))
    _add_range(parts, axes, points)
    _add_grid(parts, axes, [places[number] for number in named])
    _add_curves(parts, axes, points)
    for row, head in enumerate(_FIGURES):
        parts.add(Text(axes.left - 10, axes.bottom + 18 + row * _ROW, head, SOFT, SMALL, "rm"))
    for number in named:
        x, y = places[number], axes.y(points[number].images_per_second)
        for row, text in enumerate(columns[number]):
            parts.add(Text(x, axes.bottom + 18 + row * _ROW, text, SOFT if row else INK, SMALL, "mm"))
        # Below the point, or above it where the curve falls.
        falls = any(after.images_per_second < points[number].images_per_second for after in points[number + 1 :][:1])
        place, anchor = (y - 9, "ls") if falls else (y + 9, "la")
        share = percent(points[number].exposed_communication)
        parts.add(Text(x + 7, place, share, RED, SMALL, anchor, halo=True))
    return parts.drawing(axes.bottom + 18 + (len(_FIGURES) - 1) * _ROW + MARGIN)


def _add_range(parts: Shapes, axes: Axes, points: Sequence[ScalingPoint]) -> None:
    upper = [(axes.x(point.gpus), axes.y(point.most)) for point in points if point.most is not None]
    lower = [(axes.x(point.gpus), axes.y(point.least)) for point in points if point.least is not None]
    if len(upper) == len(lower) == 1:  # which would have no width
        (x, above), (_, below) = upper[0], lower[0]
        upper, lower = [(x - 4, above), (x + 4, above)], [(x - 4, below), (x + 4, below)]
    if upper and lower:
        parts.add(Polygon((*upper, *reversed(lower)), _BAND, ("range",)))


def _add_grid(parts: Shapes, axes: Axes, columns: Sequence[float]) -> None:
    for value in logarithmic_ticks(*axes.speeds):
        parts.add(Line(((axes.left, axes.y(value)), (axes.right, axes.y(value))), GRID))
        parts.add(Text(axes.left - 10, axes.y(value), exact(value), SOFT, SMALL, "rm"))
    parts.add(Text(MARGIN, axes.top - 18, "images per second", SOFT, SMALL))
    for x in columns:
        parts.add(vertical(x, axes.top, axes.bottom + 5, GRID))
    parts.add(Line(((axes.left, axes.bottom), (axes.right, axes.bottom)), AXIS))


def _add_curves(parts: Shapes, axes: Axes, points: Sequence[ScalingPoint]) -> None:
    ideal = [(axes.x(gpus), axes.y(_ideal(points[0], gpus))) for gpus in (points[0].gpus, axes.gpus[1])]
    parts.add(Line(tuple(ideal), AXIS, 1.5, (7.0, 5.0), ("ideal",)))
    curve = [(axes.x(point.gpus), axes.y(point.images_per_second)) for point in points]
    parts.add(Line(tuple(curve), BLUE, 2.5, of=("curve",)))
    radius = 4.5 if len(points) <= _MANY else 3.0
    for (x, y), point in zip(curve, points, strict=True):
        parts.add(Dot(x, y, radius, BLUE, ("point", str(point.gpus))))


def columns_that_fit(columns: Sequence[tuple[float, float]]) -> list[int]:
    """Which of some columns, given by middle and width in ascending order, stand beside each other: the last, and from
    the first on all that leave room."""
    *others, last = range(len(columns))
    middle, width = columns[last]
    limit = middle - width / 2 - _SPACE
    chosen: list[int] = []
    occupied = -math.inf
    for number in others:
        middle, width = columns[number]
        if middle - width / 2 > occupied and middle + width / 2 < limit:
            chosen.append(number)
            occupied = middle + width / 2 + _SPACE
    return [*chosen, last]


def _check(points: Sequence[ScalingPoint]) -> None:
    assert points, "there is nothing to draw"
    ranges = sum(point.least is not None for point in points)
    assert ranges in (0, len(points)), f"{ranges} of {len(points)} points have a range"
    for before, after in pairwise(points):
        assert before.gpus < after.gpus, f"{after.gpus} GPUs twice"
    for point in points:
        assert (point.least is None) == (point.most is None), f"{point.gpus} GPUs: half a range"
        least, most = _reach(point)
        assert point.gpus > 0, f"{point.gpus} GPUs"
        assert 0 < least <= point.images_per_second <= most, f"{point.images_per_second} is not in its range"
        assert 0 <= point.exposed_communication <= 1, f"a share of {point.exposed_communication}"


def _axes(points: Sequence[ScalingPoint], top: float) -> Axes:
    first, last = points[0], points[-1]
    gpus = (first.gpus / 2, first.gpus * 2) if first is last else (first.gpus, last.gpus)
    least = min(_reach(point)[0] for point in points)
    most = max(_ideal(first, gpus[1]), *(_reach(point)[1] for point in points))
    room = (most / least) ** 0.06 * 1.15
    speeds = (least / room, most * room)
    ticks = [exact(value) for value in logarithmic_ticks(*speeds)]
    left = MARGIN + max(text_width(text, SMALL) for text in (*ticks, *_FIGURES)) + 12
    return Axes(gpus, speeds, left, top, WIDTH - MARGIN - 36, top + _PLOT_HEIGHT)


def _share(value: float, axis: tuple[float, float]) -> float:
    return math.log(value / axis[0]) / math.log(axis[1] / axis[0])


def _reach(point: ScalingPoint) -> tuple[float, float]:
    speed = point.images_per_second
    return (speed if point.least is None else point.least), (speed if point.most is None else point.most)


def _ideal(first: ScalingPoint, gpus: float) -> float:
    """Images per second if each GPU is as fast as with the least number of them."""
    return first.images_per_second / first.gpus * gpus


def _figures(point: ScalingPoint, first: ScalingPoint) -> tuple[str, str, str]:
    share = point.images_per_second / _ideal(first, point.gpus)
    return f"{point.gpus:,}", rounded(point.images_per_second), percent(share)


def _range(point: ScalingPoint) -> str:
    if point.least is None or point.most is None:
        return ""
    gpus = "GPU" if point.gpus == 1 else "GPUs"
    return f"{rounded(point.least)} to {rounded(point.most)} images per second with {point.gpus:,} {gpus}"


def _legend(subject: Subject, points: Sequence[ScalingPoint]) -> list[LegendEntry]:
    entries = [LegendEntry("line", BLUE, "measured" if subject.measured else "estimate")]
    if any(point.least is not None for point in points):
        entries.append(LegendEntry("area", _BAND, "its range"))
    entries.append(LegendEntry("dashes", AXIS, f"ideal: each GPU as fast as with {points[0].gpus:,}"))
    entries.append(LegendEntry("text", RED, "share of the step that waits for communication", "%"))
    return entries
