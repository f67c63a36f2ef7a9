"""The memory of a GPU by kind, as a bar for each configuration."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from PIL import Image

from data.text.printable import one_line
from pipeline.planner.pictures.drawing import (
    AXIS,
    BLUE,
    GREEN,
    GRID,
    INK,
    LIGHT_BLUE,
    LIGHT_TEAL,
    MARGIN,
    NORMAL,
    PURPLE,
    RED,
    SMALL,
    SOFT,
    TEAL,
    WIDTH,
    Drawing,
    Line,
    Parts,
    Polygon,
    Rectangle,
    Text,
    fitted,
    ink_on,
    text_width,
    vertical,
)
from pipeline.planner.pictures.heading import LegendEntry, Subject, add_heading, add_legend
from pipeline.planner.pictures.ticks import exact, linear_ticks, percent, round_step, rounded

_Place = Callable[[float], float]  # of an amount of bytes on the axis, in pixels
_LONGEST_NAME = 340  # pixels
_BAR, _PITCH, _TAGGED_PITCH = 24, 36, 44  # pixels
_LONGEST_AXIS = 2.0
"""Times the GPU's memory; longer bars are broken off."""
_SHORT = 1 / 8  # of the GPU's memory: if all bars are shorter, the axis ends with them
_FARTHEST = 36  # pixels from the end of a bar to the text of its amount
_IN_MARGIN_BACK, _BEYOND_BACK = "#fff5e0", "#fdecec"
_AMBER = "#a16207"


@dataclass(frozen=True, slots=True)
class MemoryBar:
    """Bytes of one rank at the moment of a step when most is in use, in a configuration."""

    name: str
    """Of the configuration, as "ZeRO 2, mbconv"."""
    weights: int
    gradients: int
    optimizer_state: int
    moving_average: int
    buffers: int
    """BatchNorm's statistics."""
    buckets: int
    """Communication buckets."""
    activations: int
    """Activations and temporary tensors."""
    recommended: bool = False
    """Whether the planner recommends this configuration."""
    in_recipe: bool = False
    """Whether the recipe has this configuration."""

    @property
    def kinds(self) -> dict[str, int]:
        """The bytes by the name of their kind, in the order in which they are drawn."""
        return {
            "weights": self.weights,
            "gradients": self.gradients,
            "optimizer state": self.optimizer_state,
            "moving average": self.moving_average,
            "buffers": self.buffers,
            "communication buckets": self.buckets,
            "activations and temporary tensors": self.activations,
        }

    @property
    def total(self) -> int:
        """Of all kinds."""
        return sum(self.kinds.values())

    @property
    def mark(self) -> str:
        """What distinguishes this configuration, or nothing."""
        marks = ("recommended",) * self.recommended + ("in the recipe",) * self.in_recipe
        return ", ".join(marks)


_COLOURS = {
    "weights": BLUE,
    "gradients": LIGHT_BLUE,
    "optimizer state": TEAL,
    "moving average": LIGHT_TEAL,
    "buffers": SOFT,
    "communication buckets": PURPLE,
    "activations and temporary tensors": "#e08a2c",
}


def memory_picture(
    subject: Subject, bars: Sequence[MemoryBar], capacity: int, usable: int, error: float | None = None
) -> Image.Image:
    """The picture of `memory_drawing`, RGB."""
    return memory_drawing(subject, bars, capacity, usable, error).image


def memory_drawing(
    subject: Subject, bars: Sequence[MemoryBar], capacity: int, usable: int, error: float | None = None
) -> Drawing:
    """A bar for each configuration, in their order, on an axis of GB (1e9 bytes).

    Args:
        subject: what it is of.
        bars: at least one, with something in one of them.
        capacity: bytes of the GPU's memory.
        usable: bytes of it that a plan may use, the rest being its margin, as for fragmentation.
        error: of an estimated total, as a share; a thin line at the end of a bar shows it.

    Bars longer than twice the GPU's memory are broken off. If all are shorter than an eighth of it, the axis ends with
    them, and the memory is named and not drawn.
    """
    assert bars, "there is nothing to draw"
    assert 0 < usable <= capacity, f"{usable} of {capacity} bytes"
    assert all(amount >= 0 for bar in bars for amount in bar.kinds.values()), "less than no bytes"
    longest = max(bar.total for bar in bars)
    assert longest > 0, "nothing in any bar"
    parts = Parts()
    y = add_heading(parts, "Memory per GPU", subject, "" if error is None else f"within {percent(error)}")
    used = [kind for kind in _COLOURS if any(bar.kinds[kind] for bar in bars)]
    legend = [LegendEntry("area", _COLOURS[kind], kind) for kind in used]
    y = add_legend(parts, legend, MARGIN, y, WIDTH - MARGIN) + 14

    names = [fitted(one_line(bar.name), _LONGEST_NAME) for bar in bars]
    ends = [_end(bar, capacity, usable) for bar in bars]
    marked = any(bar.mark for bar in bars)
    captions = [(name, NORMAL) for name in names] + [(bar.mark, SMALL) for bar in bars]
    left = MARGIN + max(text_width(text, size) for text, size in captions) + 14
    right = WIDTH - MARGIN - max(text_width(text) for text, _ in ends) - 12
    top = y + 44
    pitch = _TAGGED_PITCH if marked else _PITCH
    bottom = top + pitch * len(bars) + 4
    reach = longest * (1 + (error or 0))
    shows_capacity = reach >= capacity * _SHORT
    limit = min(max(reach * 1.03, capacity * 1.1), capacity * _LONGEST_AXIS) if shows_capacity else reach * 1.03

    def x(amount: float) -> float:
        return left + (right - left) * min(1.0, amount / limit)

    # The background and the grid.
    if shows_capacity:
        parts.add(Rectangle(x(usable), top, x(capacity), bottom, _IN_MARGIN_BACK))
        parts.add(Rectangle(x(capacity), top, right, bottom, _BEYOND_BACK))
    step = round_step(limit / 1e9 / max(2, (right - left) / 80))
    for value in linear_ticks(0, limit / 1e9, step):
        parts.add(vertical(x(value * 1e9), top, bottom + 5, GRID))
        parts.add(Text(x(value * 1e9), bottom + 16, exact(value), SOFT, SMALL, "mm"))
    parts.add(Line(((left, bottom), (right, bottom)), AXIS))
    parts.add(Text(right + 14, bottom + 16, "GB", SOFT, SMALL))

    if not shows_capacity:
        note = f"the GPU's {_gigabytes(capacity)}, of which a plan may use {_gigabytes(usable)}, lie beyond this axis"
        parts.add(Text(right, top - 14, note, SOFT, SMALL, "rm"))
    lines = sorted({x(usable), x(capacity)}) if shows_capacity else []
    for number, bar in enumerate(bars):
        middle = top + pitch * (number + 0.5) + 2
        _add_bar(parts, bar, x, middle, limit, error or 0.0, lines)
        shift = 9 if bar.mark else 0
        parts.add(Text(left - 14, middle - shift, names[number], INK, anchor="rm"))
        if bar.mark:
            parts.add(Text(left - 14, middle + 9, bar.mark, GREEN if bar.recommended else BLUE, SMALL, "rm"))
    if shows_capacity:
        _add_limits(parts, x, capacity, usable, top, bottom)
    for number, bar in enumerate(bars):
        text, ink = ends[number]
        end = x(bar.total * (1 + (error or 0))) + 8
        start = _beside(end, text_width(text), lines)
        parts.add(Text(start, top + pitch * (number + 0.5) + 2, text, ink, halo=bool(lines) and start == end))
    return parts.drawing(bottom + 16 + MARGIN)


def _add_bar(
    parts: Parts, bar: MemoryBar, x: _Place, middle: float, limit: float, error: float, lines: Sequence[float]
) -> None:
    """The segments of a bar with their amounts, and the line of its error."""
    begun = 0
    segments: list[Rectangle] = []
    for kind, amount in bar.kinds.items():
        left, right = x(begun), x(begun + amount)
        begun += amount
        if right == left:
            continue
        segment = Rectangle(left, middle - _BAR / 2, right, middle + _BAR / 2, _COLOURS[kind], (bar.name, kind))
        segments.append(segment)
        parts.add(segment)
        text = rounded(amount / 1e9)
        free = _widest(left, min(right, x(bar.total * (1 - error)) - 4) if error else right, lines)
        if text_width(text, SMALL) + 8 <= free[1] - free[0] and begun <= limit:
            parts.add(Text(sum(free) / 2, middle, text, ink_on(segment.fill), SMALL, "mm"))
    for before, after in pairwise(segments):  # a white line, where it would not hide one of them
        if min(before.width, after.width) > 3:
            parts.add(vertical(after.left, after.top, after.bottom, "white"))
    if bar.total > limit:
        end = x(limit) - 16
        corners = ((end + 4, middle - 13), (end + 9, middle - 13), (end + 1, middle + 13), (end - 4, middle + 13))
        parts.add(Polygon(corners, "white", (bar.name, "broken off")))
    elif error:
        ends = x(bar.total * (1 - error)), x(bar.total * (1 + error))
        parts.add(Line(tuple((end, middle) for end in ends), INK, of=(bar.name, "error")))
        parts.add(vertical(ends[0], middle - 4, middle + 4, INK))
        if bar.total * (1 + error) <= limit:
            parts.add(vertical(ends[1], middle - 4, middle + 4, INK))


def _add_limits(parts: Parts, x: _Place, capacity: int, usable: int, top: float, bottom: float) -> None:
    """The lines at the GPU's memory and at its margin."""
    text = f"GPU memory {_gigabytes(capacity)}"
    parts.add(vertical(x(capacity), top - 32, bottom, RED, 2.0, "capacity"))
    # To the side where there is more room.
    room = WIDTH - MARGIN - x(capacity)
    beside = (8, "lm") if room > text_width(text) + 8 else (-8, "rm")
    parts.add(Text(x(capacity) + beside[0], top - 26, text, RED, anchor=beside[1]))
    if usable < capacity:
        parts.add(vertical(x(usable), top - 14, bottom, "#d9a441", 1.0, "usable"))
        less = f"{_gigabytes(usable)} with a margin of {percent(1 - usable / capacity)}"
        parts.add(Text(x(usable) - 8, top - 8, less, _AMBER, SMALL, "rm"))


def _end(bar: MemoryBar, capacity: int, usable: int) -> tuple[str, str]:
    """What stands at the end of a bar, and its colour."""
    if bar.total > capacity:
        return f"{_gigabytes(bar.total)}, does not fit", RED
    if bar.total > usable:
        return f"{_gigabytes(bar.total)}, in the margin", _AMBER
    return _gigabytes(bar.total), INK


def _widest(left: float, right: float, lines: Sequence[float]) -> tuple[float, float]:
    """The widest part from `left` to `right` without a vertical line."""
    within = [line for line in lines if left < line < right]
    return max(pairwise([left, *within, right]), key=lambda part: part[1] - part[0])


def _beside(start: float, width: float, lines: Sequence[float]) -> float:
    """The place of a text from `start` on, a little later if it then stands on no vertical line."""
    place = start
    for line in lines:
        if place - 4 < line < place + width + 4:
            place = line + 8
    return place if place - start <= _FARTHEST else start


def _gigabytes(amount: float) -> str:
    return f"{rounded(amount / 1e9)} GB"
