"""Line charts as SVG, without scripts."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from jobs.report.markup import Markup, element, escaped

Point = tuple[int, float]
MarkKind = Literal["resume", "settings changed", "roll-back", "not applied", "save"]

WIDTH, HEIGHT = 640, 270
_LEFT, _RIGHT, _TOP, _BOTTOM = 66, 24, 14, 40
_BUCKETS = 400
"""Of more points than twice this, the lowest and the highest of each part of the axis are drawn."""
_MOST_MARKS = 300


@dataclass(frozen=True, slots=True)
class Series:
    """A curve: its steps ascend, and values that are not finite are left out of the drawing."""

    name: str
    points: Sequence[Point]
    color: int = 0
    """A number of the style sheet's."""

    @property
    def finite(self) -> list[Point]:
        return [point for point in self.points if math.isfinite(point[1])]


@dataclass(frozen=True, slots=True)
class Mark:
    """Something that happened at a step."""

    kind: MarkKind
    step: int
    title: str


@dataclass(frozen=True, slots=True)
class Axis:
    """The vertical axis."""

    shown: Callable[[float], str]
    """A value as text."""
    from_zero: bool = False
    logarithmic: bool = False
    """If the values are positive and differ by more than a factor of 30."""


def line_chart(title: str, series: Sequence[Series], marks: Sequence[Mark], axis: Axis, last_step: int) -> Markup:
    """A figure with a legend, which has the last values; empty if there is nothing to draw."""
    drawn = [one for one in series if one.finite]
    if not drawn:
        return Markup("")
    values = [value for one in drawn for _, value in one.finite]
    scale = _Scale(values, axis)
    last_step = max(1, last_step, *(one.finite[-1][0] for one in drawn))

    def x(step: float) -> float:
        return _LEFT + (WIDTH - _LEFT - _RIGHT) * min(1.0, max(0.0, step / last_step))

    parts: list[Markup] = []
    for value in scale.ticks:
        y = scale.y(value)
        parts.append(_line(_LEFT, y, WIDTH - _RIGHT, y, "grid"))
        parts.append(_text(_LEFT - 8, y + 4.5, axis.shown(value), "end"))
    for step in _step_ticks(last_step):
        parts.append(_line(x(step), HEIGHT - _BOTTOM, x(step), HEIGHT - _BOTTOM + 5, "axis"))
        parts.append(_text(x(step), HEIGHT - _BOTTOM + 20, f"{step:,}", "middle"))
    parts.append(_line(_LEFT, HEIGHT - _BOTTOM, WIDTH - _RIGHT, HEIGHT - _BOTTOM, "axis"))
    parts += [_mark(mark, x(mark.step)) for mark in marks[:_MOST_MARKS]]
    for one in drawn:
        places = [(x(step), scale.y(value)) for step, value in _thinned(one.finite, last_step)]
        if len(places) > 1:
            line = " ".join(f"{across:.1f},{down:.1f}" for across, down in places)
            parts.append(element("polyline", points=line, class_=f"curve c{one.color}"))
        if len(places) <= 40:
            parts += [
                element(
                    "circle",
                    element("title", f"{one.name}: {axis.shown(value)} at step {step:,}"),
                    cx=f"{x(step):.1f}",
                    cy=f"{scale.y(value):.1f}",
                    r="3.2",
                    class_=f"dot c{one.color}",
                )
                for step, value in one.finite
            ]
    label = f"{title} by step"
    svg = element("svg", element("title", label), *parts, viewBox=f"0 0 {WIDTH} {HEIGHT}", role="img", aria_label=label)
    legend = element("div", *(_legend(one, axis) for one in drawn), class_="legend")
    return element("figure", element("figcaption", element("b", title), legend), svg, class_="chart")


def _legend(series: Series, axis: Axis) -> Markup:
    step, value = series.finite[-1]
    lost = len(series.points) - len(series.finite)
    more = f", {lost:,} not finite and not drawn" if lost else ""
    swatch = element("i", class_=f"swatch c{series.color}")
    return element(
        "span", swatch, series.name, " ", element("b", axis.shown(value)), f" at step {step:,}{more}", class_="entry"
    )


class _Scale:
    """From values to the vertical place."""

    def __init__(self, values: Sequence[float], axis: Axis) -> None:
        least, greatest = min(values), max(values)
        self._log = axis.logarithmic and least > 0 and greatest > 30 * least
        if self._log:
            lowest, highest = math.floor(math.log10(least)), math.ceil(math.log10(greatest))
            self._low, self._high = float(lowest), float(max(highest, lowest + 1))
            every = max(1, math.ceil((self._high - self._low) / 6))
            self.ticks = [10.0**power for power in range(lowest, int(self._high) + 1, every)]
            return
        if axis.from_zero:
            least = min(0.0, least)
        if greatest - least <= 1e-9 * max(abs(greatest), abs(least)):  # a flat line is in the middle
            around = abs(greatest) / 10 or 1.0
            least, greatest = (
                (least, least + around) if axis.from_zero and least == 0 else (least - around, greatest + around)
            )
        step = _nice((greatest - least) / 4)
        first, last = math.floor(least / step + 1e-9), math.ceil(greatest / step - 1e-9)
        self.ticks = [number * step for number in range(first, last + 1)]
        self._low, self._high = self.ticks[0], self.ticks[-1]

    def y(self, value: float) -> float:
        """The place of a value, in the units of the drawing."""
        at = math.log10(value) if self._log else value
        share = (at - self._low) / (self._high - self._low)
        return HEIGHT - _BOTTOM - (HEIGHT - _TOP - _BOTTOM) * share


def _nice(step: float) -> float:
    """The least of 1, 2, 2.5, 5 times a power of ten that is at least `step`."""
    power = 10.0 ** math.floor(math.log10(step))
    return next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= step * (1 - 1e-9))


def _step_ticks(last: int) -> list[int]:
    every = max(1, round(_nice(max(1.0, last / 6))))
    return list(range(0, last + 1, every))


def _thinned(points: Sequence[Point], last_step: int) -> list[Point]:
    """Few enough points for a drawing: of each part of the axis the lowest and the highest."""
    if len(points) <= 2 * _BUCKETS:
        return list(points)
    buckets: dict[int, list[Point]] = {}
    for point in points:
        buckets.setdefault(point[0] * _BUCKETS // (last_step + 1), []).append(point)
    kept = []
    for bucket in buckets.values():
        kept += sorted({min(bucket, key=lambda p: p[1]), max(bucket, key=lambda p: p[1])})
    return kept


def _mark(mark: Mark, x: float) -> Markup:
    title = element("title", mark.title)
    bottom = HEIGHT - _BOTTOM
    if mark.kind == "save":
        corners = f"{x - 3.5:.1f},{bottom + 7} {x + 3.5:.1f},{bottom + 7} {x:.1f},{bottom}"
        return element("polygon", title, points=corners, class_="save")
    kind = mark.kind.replace(" ", "-")
    return element("line", title, x1=f"{x:.1f}", y1=_TOP, x2=f"{x:.1f}", y2=bottom, class_=f"mark {kind}")


def _line(x1: float, y1: float, x2: float, y2: float, kind: str) -> Markup:
    return Markup(f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" class="{kind}"/>')


def _text(x: float, y: float, text: str, anchor: str) -> Markup:
    return Markup(f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escaped(text)}</text>')


def calibration_chart(bins: Sequence[tuple[int, float | None, float | None]]) -> Markup:
    """Accuracy by confidence; each bin has its number of samples, mean confidence and share that is right."""
    filled = [
        (samples, confidence, share)
        for samples, confidence, share in bins
        if confidence is not None and share is not None
    ]
    if not filled:
        return Markup("")
    scale, width = _Scale([0.0, 1.0], Axis(str)), WIDTH - _LEFT - _RIGHT
    parts = []
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        parts.append(_line(_LEFT, scale.y(share), WIDTH - _RIGHT, scale.y(share), "grid"))
        parts.append(_text(_LEFT - 8, scale.y(share) + 4.5, f"{share:.0%}", "end"))
        parts.append(_text(_LEFT + width * share, HEIGHT - _BOTTOM + 20, f"{share:.0%}", "middle"))
    bar = width / len(bins) - 2
    for number, (samples, confidence, right) in enumerate(bins):
        if confidence is None or right is None:
            continue
        top = scale.y(right)
        title = element("title", f"{samples:,} images of mean confidence {confidence:.1%}: {right:.1%} are right")
        parts.append(
            element(
                "rect", title, x=f"{_LEFT + width * number / len(bins) + 1:.1f}", y=f"{top:.1f}", width=f"{bar:.1f}",
                height=f"{HEIGHT - _BOTTOM - top:.1f}", class_="share",
            )
        )  # fmt: skip
    parts.append(_line(_LEFT, scale.y(0), _LEFT + width, scale.y(1), "diagonal"))
    svg = element(
        "svg", element("title", "accuracy by confidence"), *parts, viewBox=f"0 0 {WIDTH} {HEIGHT}", role="img",
        aria_label="accuracy by confidence",
    )  # fmt: skip
    note = element("div", "bars: share that is right, by confidence; on the line, both are equal", class_="legend")
    return element("figure", element("figcaption", element("b", "Calibration"), note), svg, class_="chart")
