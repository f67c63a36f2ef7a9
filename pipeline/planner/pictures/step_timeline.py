"""What a GPU and its host do during a step, by time."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, get_args

from PIL import Image

from data.text.printable import one_line
from pipeline.planner.pictures.drawing import (
    AXIS,
    BACK,
    BLUE,
    GRID,
    INK,
    LIGHT_BLUE,
    LIGHT_RED,
    MARGIN,
    ORANGE,
    PURPLE,
    RED,
    SMALL,
    SOFT,
    TEAL,
    WIDTH,
    Drawing,
    Line,
    Rectangle,
    Shapes,
    Text,
    ink_on,
    text_width,
    vertical,
)
from pipeline.planner.pictures.heading import LegendEntry, Subject, add_heading, add_legend
from pipeline.planner.pictures.ticks import exact, linear_ticks, percent, round_step, rounded

SpanKind = Literal[
    "forward", "recomputation", "backward", "optimizer", "hidden communication", "exposed communication", "data", "host"
]
_COLOURS: dict[SpanKind, str] = {
    "forward": BLUE,
    "recomputation": LIGHT_BLUE,
    "backward": TEAL,
    "optimizer": PURPLE,
    "hidden communication": LIGHT_RED,
    "exposed communication": RED,
    "data": ORANGE,
    "host": "#e3b778",
}
_ROWS: dict[str, tuple[SpanKind, ...]] = {
    "compute": ("forward", "recomputation", "backward", "optimizer"),
    "communication": ("hidden communication", "exposed communication"),
    "data": ("data",),
    "host": ("host",),
}
_ALL_DRAWN = 4
"""Of more micro-batches, the first two and the last are drawn."""
_LANE, _LANE_GAP, _ROW_GAP = 34, 4, 20  # pixels
_BREAK = 104  # pixels between what is drawn before and after micro-batches that are left out
_SHORTEST_BRACKET = 6  # pixels
_TICKS = 90  # pixels between two, at least


@dataclass(frozen=True, slots=True)
class TimelineSpan:
    """A time in which one thing is done."""

    kind: SpanKind
    start: float
    """ms after the beginning of the step."""
    end: float
    """ms after the beginning of the step."""
    micro_batch: int | None = None
    """Number of the micro-batch, from 0, that it belongs to; None if to the whole step."""
    name: str = ""
    """What is done, if the kind does not say it, as "all-reduce"."""


@dataclass(frozen=True, slots=True)
class StepTimeline:
    """A step of one GPU."""

    step: float
    """ms."""
    spans: Sequence[TimelineSpan]
    """In any order; those of one row may overlap, as communication in several streams."""
    micro_batches: int
    least: float | None = None
    """ms of the step, the range of an estimate."""
    most: float | None = None


@dataclass(frozen=True, slots=True)
class AxisSection:
    """A part of the axis: from `start` to `end` in ms, drawn from `left` to `right` in pixels."""

    start: float
    end: float
    left: float
    right: float

    def x(self, time: float) -> float:
        """The place of a time, or of the end of the section that is closer to it."""
        if self.end == self.start:
            return self.left
        return self.left + (self.right - self.left) * (min(max(time, self.start), self.end) - self.start) / (
            self.end - self.start
        )


def timeline_picture(subject: Subject, timeline: StepTimeline) -> Image.Image:
    """The picture of `timeline_drawing`, RGB."""
    return timeline_drawing(subject, timeline).image


def timeline_drawing(subject: Subject, timeline: StepTimeline) -> Drawing:
    """Rows of compute, communication, data and host, on an axis of ms; those of data and host if they have spans.

    Of more than four micro-batches the first two and the last are drawn, on one scale; the legend has the times of all.
    """
    _check(timeline)
    parts = Shapes()
    y = add_heading(parts, f"A step of {rounded(timeline.step)} ms", subject, _range(timeline))
    y = add_legend(parts, _legend(timeline), MARGIN, y, WIDTH - MARGIN) + 24
    rows = []
    for row, kinds in _ROWS.items():
        found = lanes([span for span in timeline.spans if span.kind in kinds])
        if found or row == "communication":
            rows.append((row if found else f"no {row}", found))
    left = MARGIN + max(text_width(row) for row, _ in rows) + 16
    sections = axis_sections(timeline, left, WIDTH - MARGIN - 8)
    top = y
    heights = [max(1, len(found)) * (_LANE + _LANE_GAP) - _LANE_GAP for _, found in rows]
    bottom = top + 24 + sum(heights) + _ROW_GAP * len(rows)
    _add_axis(parts, sections, top, bottom)
    y = top + 24 + _ROW_GAP / 2
    _add_micro_batches(parts, timeline, sections, y - 12)
    for (row, found), height in zip(rows, heights, strict=True):
        parts.add(Text(left - 16, y + height / 2, row, INK if found else SOFT, anchor="rm"))
        for number, lane in enumerate(found):
            for section in sections:
                for span in lane:
                    _add_span(parts, span, section, y + number * (_LANE + _LANE_GAP))
        y += height + _ROW_GAP
    if len(sections) == 2:
        middle = (sections[0].right + sections[1].left) / 2
        text = f"... {timeline.micro_batches - 3} more"
        parts.add(Text(middle, top + 24 + _ROW_GAP / 2 + heights[0] / 2, text, SOFT, anchor="mm"))
    return parts.drawing(bottom + 18 + MARGIN)


def axis_sections(timeline: StepTimeline, left: float, right: float) -> list[AxisSection]:
    """The parts of the time that are drawn between `left` and `right` pixels: all of it, or what is before and after
    the micro-batches that are left out."""
    if timeline.micro_batches <= _ALL_DRAWN:
        return [AxisSection(0.0, timeline.step, left, right)]
    begun, ended = _extent(timeline, 1)[1], _extent(timeline, timeline.micro_batches - 1)[0]
    scale = (right - left - _BREAK) / (begun + timeline.step - ended)
    middle = left + begun * scale
    return [AxisSection(0.0, begun, left, middle), AxisSection(ended, timeline.step, middle + _BREAK, right)]


def lanes(spans: Sequence[TimelineSpan]) -> list[list[TimelineSpan]]:
    """The spans in as few lists as possible, in each of which none overlap."""
    found: list[list[TimelineSpan]] = []
    for span in sorted(spans, key=lambda span: (span.start, span.end)):
        # Ends and starts that ought to be equal are sums of many numbers.
        free = next((lane for lane in found if lane[-1].end <= span.start + 1e-6 * max(1.0, span.start)), None)
        if free is None:
            found.append([span])
        else:
            free.append(span)
    return found


def _check(timeline: StepTimeline) -> None:
    assert timeline.step > 0, f"a step of {timeline.step} ms"
    for span in timeline.spans:
        assert 0 <= span.start <= span.end <= timeline.step * (1 + 1e-6), f"{span} in a step of {timeline.step} ms"
    computed = {span.micro_batch for span in timeline.spans if span.kind in _ROWS["compute"]} - {None}
    expected = set(range(timeline.micro_batches))
    assert computed == expected, f"micro-batches {sorted(computed ^ expected, key=str)}: no span, or more than counted"


def _range(timeline: StepTimeline) -> str:
    if timeline.least is None or timeline.most is None:
        return ""
    return f"{rounded(timeline.least)} to {rounded(timeline.most)} ms"


def _legend(timeline: StepTimeline) -> list[LegendEntry]:
    """Each kind that occurs with its time in the whole step."""
    entries = [LegendEntry("text", SOFT, "in the whole step, and share of it:")]
    for kind in get_args(SpanKind):
        times = [span.end - span.start for span in timeline.spans if span.kind == kind]
        if times:
            total = sum(times)
            entries.append(
                LegendEntry("area", _COLOURS[kind], f"{kind} {rounded(total)} ms, {percent(total / timeline.step)}")
            )
    return entries


def _extent(timeline: StepTimeline, micro_batch: int) -> tuple[float, float]:
    """When the computation of a micro-batch begins and ends."""
    spans = [span for span in timeline.spans if span.micro_batch == micro_batch and span.kind in _ROWS["compute"]]
    return min(span.start for span in spans), max(span.end for span in spans)


def _add_axis(parts: Shapes, sections: Sequence[AxisSection], top: float, bottom: float) -> None:
    pixels = sum(section.right - section.left for section in sections)
    time = sum(section.end - section.start for section in sections)
    step = round_step(time / pixels * _TICKS)
    for section in sections:
        for value in linear_ticks(section.start, section.end, step):
            parts.add(vertical(section.x(value), top, bottom + 5, GRID))
            parts.add(Text(section.x(value), bottom + 18, exact(value), SOFT, SMALL, "mm"))
        parts.add(Line(((section.left, bottom), (section.right, bottom)), AXIS))
    left = sections[0].left
    parts.add(Text(left - 16, bottom + 18, "ms", SOFT, SMALL, "rm"))
    for before, after in pairwise(sections):
        parts.add(Rectangle(before.right + 4, top, after.left - 4, bottom, BACK))
        for place in (before.right, after.left):
            parts.add(Line(((place - 3, bottom + 5), (place + 3, bottom - 5)), AXIS))


def _add_micro_batches(parts: Shapes, timeline: StepTimeline, sections: Sequence[AxisSection], y: float) -> None:
    """Brackets over the computation of each micro-batch that is drawn, numbered from 1."""
    count = timeline.micro_batches
    drawn = range(count) if count <= _ALL_DRAWN else (0, 1, count - 1)
    for number in drawn:
        start, end = _extent(timeline, number)
        section = sections[-1] if number == count - 1 else sections[0]
        left, right = section.x(start) + 1, section.x(end) - 1
        if right - left < _SHORTEST_BRACKET:
            continue
        for text in (f"micro-batch {number + 1}", f"{number + 1}"):
            if text_width(text, SMALL) + 12 <= right - left:
                middle, half = (left + right) / 2, text_width(text, SMALL) / 2 + 6
                parts.add(Text(middle, y, text, SOFT, SMALL, "mm"))
                for begin, stop in ((left, middle - half), (middle + half, right)):
                    parts.add(Line(((begin, y), (stop, y)), AXIS))
                break
        else:
            parts.add(Line(((left, y), (right, y)), AXIS))
        for place in (left, right):
            parts.add(vertical(place, y, y + 6, AXIS))


def _add_span(parts: Shapes, span: TimelineSpan, section: AxisSection, top: float) -> None:
    left, right = section.x(span.start), section.x(span.end)
    if right <= left:
        return
    fill = _COLOURS[span.kind]
    number = () if span.micro_batch is None else (str(span.micro_batch),)
    parts.add(Rectangle(left, top, right, top + _LANE, fill, (span.kind, *number)))
    if right - left > 4:
        parts.add(vertical(right, top, top + _LANE, "white"))
    name = one_line(span.name) or span.kind
    for text in (f"{name} {rounded(span.end - span.start)} ms", name, f"{rounded(span.end - span.start)} ms"):
        if text_width(text, SMALL) + 10 <= right - left:
            parts.add(Text((left + right) / 2, top + _LANE / 2, text, ink_on(fill), SMALL, "mm"))
            break
