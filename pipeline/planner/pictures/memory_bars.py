"""The memory of a GPU by kind, as a bar for each configuration."""

from collections.abc import Sequence
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
    Polygon,
    Rectangle,
    Shapes,
    Text,
    fitted,
    ink_on,
    text_width,
    vertical,
)
from pipeline.planner.pictures.heading import LegendEntry, Subject, add_heading, add_legend
from pipeline.planner.pictures.ticks import exact, linear_ticks, percent, round_step, rounded

_LONGEST_NAME = 340  # pixels
_BAR, _PITCH, _MARKED_PITCH = 24, 36, 44  # pixels
_LONGEST_AXIS = 2.0
"""Times the GPU's memory; longer bars are broken off."""
_SHORT = 1 / 8  # of the GPU's memory: if all bars are shorter, the axis ends with them
_TICKS = 80  # pixels between two, at least
_FARTHEST = 60  # pixels from the end of a bar to the text of its amount
_IN_MARGIN_BACK, _BEYOND_BACK = "#fff5e0", "#fdecec"
_AMBER, _MARGIN_LINE = "#a16207", "#d9a441"


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
    reserve: int = 0
    """Assumed for what is not counted."""
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
            "reserve (assumed)": self.reserve,
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
    "reserve (assumed)": "#c9ccd3",
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
    parts = Shapes()
    y = add_heading(parts, "Memory per GPU", subject, "" if error is None else f"within {percent(error)}")
    used = [kind for kind in _COLOURS if any(bar.kinds[kind] for bar in bars)]
    y = add_legend(parts, [LegendEntry("area", _COLOURS[kind], kind) for kind in used], MARGIN, y, WIDTH - MARGIN)
    plot = _plot(bars, capacity, usable, error or 0.0, top=y + 58)
    _add_axis(parts, plot)
    for number, bar in enumerate(bars):
        _add_name(parts, plot, bar, plot.middle(number))
        _add_bar(parts, plot, bar, plot.middle(number))
    _add_limits(parts, plot)
    for number, bar in enumerate(bars):
        text, ink = _end(bar, capacity, usable)
        end = plot.x(bar.total * (1 + plot.error)) + 8
        place = _beside(end, text_width(text), plot.lines)
        parts.add(Text(place, plot.middle(number), text, ink, halo=place == end))
    return parts.drawing(plot.bottom + 16 + MARGIN)


@dataclass(frozen=True, slots=True)
class _Plot:
    """Where the bars are, in pixels, and the axis, in bytes."""

    left: float
    right: float
    top: float
    pitch: int
    bars: int
    limit: float
    """The end of the axis."""
    capacity: int
    usable: int
    error: float
    shows_capacity: bool

    @property
    def bottom(self) -> float:
        return self.top + self.pitch * self.bars + 4

    @property
    def lines(self) -> list[float]:
        """The places of the vertical lines."""
        return sorted({self.x(self.usable), self.x(self.capacity)}) if self.shows_capacity else []

    def x(self, amount: float) -> float:
        """The place of an amount of bytes, or the end of the axis."""
        return self.left + (self.right - self.left) * min(1.0, amount / self.limit)

    def middle(self, bar: int) -> float:
        """The vertical place of a bar."""
        return self.top + self.pitch * (bar + 0.5) + 2


def _plot(bars: Sequence[MemoryBar], capacity: int, usable: int, error: float, top: float) -> _Plot:
    captions = [(_shown_name(bar), NORMAL) for bar in bars] + [(bar.mark, SMALL) for bar in bars]
    ends = max(text_width(_end(bar, capacity, usable)[0]) for bar in bars)
    longest = max(bar.total for bar in bars) * (1 + error)
    assert longest > 0, "nothing in any bar"
    shows_capacity = longest >= capacity * _SHORT
    limit = longest * 1.03
    if shows_capacity:
        limit = min(max(limit, capacity * 1.1), capacity * _LONGEST_AXIS)
    return _Plot(
        left=MARGIN + max(text_width(text, size) for text, size in captions) + 14,
        right=WIDTH - MARGIN - ends - 12,
        top=top,
        pitch=_MARKED_PITCH if any(bar.mark for bar in bars) else _PITCH,
        bars=len(bars),
        limit=limit,
        capacity=capacity,
        usable=usable,
        error=error,
        shows_capacity=shows_capacity,
    )


def _shown_name(bar: MemoryBar) -> str:
    return fitted(one_line(bar.name), _LONGEST_NAME)


def _add_axis(parts: Shapes, plot: _Plot) -> None:
    if plot.shows_capacity:
        parts.add(Rectangle(plot.x(plot.usable), plot.top, plot.x(plot.capacity), plot.bottom, _IN_MARGIN_BACK))
        parts.add(Rectangle(plot.x(plot.capacity), plot.top, plot.right, plot.bottom, _BEYOND_BACK))
    most = plot.limit / 1e9
    for value in linear_ticks(0, most, round_step(most * _TICKS / (plot.right - plot.left))):
        parts.add(vertical(plot.x(value * 1e9), plot.top, plot.bottom + 5, GRID))
        parts.add(Text(plot.x(value * 1e9), plot.bottom + 16, exact(value), SOFT, SMALL, "mm"))
    parts.add(Line(((plot.left, plot.bottom), (plot.right, plot.bottom)), AXIS))
    parts.add(Text(plot.right + 18, plot.bottom + 16, "GB", SOFT, SMALL))


def _add_name(parts: Shapes, plot: _Plot, bar: MemoryBar, middle: float) -> None:
    parts.add(Text(plot.left - 14, middle - 9 if bar.mark else middle, _shown_name(bar), INK, anchor="rm"))
    if bar.mark:
        parts.add(Text(plot.left - 14, middle + 9, bar.mark, GREEN if bar.recommended else BLUE, SMALL, "rm"))


def _add_bar(parts: Shapes, plot: _Plot, bar: MemoryBar, middle: float) -> None:
    """The segments of a bar with their amounts, and the line of its error."""
    begun = 0
    segments: list[Rectangle] = []
    least, most = bar.total * (1 - plot.error), bar.total * (1 + plot.error)
    for kind, amount in bar.kinds.items():
        left, right = plot.x(begun), plot.x(begun + amount)
        begun += amount
        if right == left:
            continue
        segment = Rectangle(left, middle - _BAR / 2, right, middle + _BAR / 2, _COLOURS[kind], (bar.name, kind))
        segments.append(segment)
        parts.add(segment)
        text = rounded(amount / 1e9)
        free = _widest(left, min(right, plot.x(least) - 4) if plot.error else right, plot.lines)
        if text_width(text, SMALL) + 8 <= free[1] - free[0] and begun <= plot.limit:
            parts.add(Text(sum(free) / 2, middle, text, ink_on(segment.fill), SMALL, "mm"))
    for before, after in pairwise(segments):  # a white line, where it would not hide one of them
        if min(before.width, after.width) > 3:
            parts.add(vertical(after.left, after.top, after.bottom, "white"))
    if bar.total > plot.limit:
        end = plot.right - 16
        corners = ((end + 4, middle - 13), (end + 9, middle - 13), (end + 1, middle + 13), (end - 4, middle + 13))
        parts.add(Polygon(corners, "white", (bar.name, "broken off")))
    elif plot.error:
        parts.add(Line(((plot.x(least), middle), (plot.x(most), middle)), INK, of=(bar.name, "error")))
        parts.add(*(vertical(plot.x(end), middle - 4, middle + 4, INK) for end in (least, most) if end <= plot.limit))


def _add_limits(parts: Shapes, plot: _Plot) -> None:
    """The lines at the GPU's memory and at its margin, or a note if they are beyond the axis."""
    capacity, usable = _gigabytes(plot.capacity), _gigabytes(plot.usable)
    if not plot.shows_capacity:
        may_use = f", of which a plan may use {usable}," if plot.usable < plot.capacity else ""
        note = f"the GPU's {capacity}{may_use} lie beyond this axis"
        parts.add(Text(plot.right, plot.top - 14, note, SOFT, SMALL, "rm"))
        return
    text, place = f"GPU memory {capacity}", plot.x(plot.capacity)
    parts.add(vertical(place, plot.top - 32, plot.bottom, RED, 2.0, "capacity"))
    if WIDTH - MARGIN - place > text_width(text) + 8:
        parts.add(Text(place + 8, plot.top - 26, text, RED))
    else:
        parts.add(Text(place - 8, plot.top - 26, text, RED, anchor="rm"))
    if plot.usable < plot.capacity:
        text, place = f"{usable} with a margin of {percent(1 - plot.usable / plot.capacity)}", plot.x(plot.usable)
        parts.add(vertical(place, plot.top - 14, plot.bottom, _MARGIN_LINE, 1.0, "usable"))
        parts.add(Text(place - 8, plot.top - 8, text, _AMBER, SMALL, "rm"))


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
