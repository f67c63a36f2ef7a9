"""Bars of memory: lengths and order of the segments, what fits, and that everything can be read."""

import math
import re

import pytest

from pipeline.planner.pictures.drawing import Drawing, Line, Rectangle
from pipeline.planner.pictures.heading import Subject
from pipeline.planner.pictures.memory_bars import MemoryBar, memory_drawing
from tests.pipeline.planner.pictures.readable import LONG, SUBJECT, assert_readable, words

GB = 10**9
CAPACITY, USABLE = 85 * GB, 78 * GB
KINDS = list(MemoryBar("", 0, 0, 0, 0, 0, 0, 0).kinds)


def even(name: str, gigabytes: float, **marks: bool) -> MemoryBar:
    """A bar with as much of each kind."""
    each = round(gigabytes / 7 * GB)
    return MemoryBar(name, each, each, each, each, each, each, each, **marks)


def place(drawing: Drawing, line: str) -> float:
    (found,) = drawing.standing_for(line)
    assert isinstance(found, Line)
    return found.points[0][0]


def test_segments_touch_each_other_in_the_order_of_the_kinds_and_are_as_long_as_their_bytes() -> None:
    bar = MemoryBar("a", 4 * GB, 8 * GB, 16 * GB, 2 * GB, 1 * GB, 3 * GB, 24 * GB, 6 * GB)
    drawing = memory_drawing(SUBJECT, [bar], CAPACITY, USABLE)
    segments = [shape for shape in drawing.standing_for("a") if isinstance(shape, Rectangle)]
    assert [segment.of[1] for segment in segments] == KINDS
    assert [segment.right for segment in segments[:-1]] == [segment.left for segment in segments[1:]]
    capacity = place(drawing, "capacity") - segments[0].left
    for segment, amount in zip(segments, bar.kinds.values(), strict=True):
        assert segment.width == pytest.approx(capacity * amount / CAPACITY)
    assert segments[-1].right - segments[0].left == pytest.approx(capacity * bar.total / CAPACITY)
    assert place(drawing, "usable") - segments[0].left == pytest.approx(capacity * USABLE / CAPACITY)
    assert "64.0 GB" in words(drawing)


def test_a_kind_of_which_there_is_nothing_is_neither_drawn_nor_explained() -> None:
    drawing = memory_drawing(SUBJECT, [MemoryBar("a", GB, 0, GB, 0, 0, 0, GB)], CAPACITY, USABLE)
    assert [shape.of[1] for shape in drawing.standing_for("a")] == [KINDS[0], KINDS[2], KINDS[6]]
    assert not {KINDS[1], *KINDS[3:6]} & set(words(drawing))
    assert {KINDS[0], KINDS[2], KINDS[6]} <= set(words(drawing))


@pytest.mark.parametrize(
    ("gigabytes", "shown"),
    [(77.9, "77.9 GB"), (80, "80.0 GB, in the margin"), (85.1, "85.1 GB, does not fit")],
)
def test_bars_in_the_margin_and_beyond_the_memory_say_so(gigabytes: float, shown: str) -> None:
    found = words(memory_drawing(SUBJECT, [even("a", gigabytes)], CAPACITY, USABLE))
    assert shown in found
    assert {"GPU memory 85.0 GB", "78.0 GB with a margin of 8 %"} <= set(found)


def test_the_recommended_configuration_and_that_of_the_recipe_are_marked() -> None:
    bars = [
        even("a", 10, recommended=True),
        even("b", 20, in_recipe=True),
        even("c", 9, recommended=True, in_recipe=True),
    ]
    found = words(memory_drawing(SUBJECT, bars, CAPACITY, USABLE))
    assert {"recommended", "in the recipe", "recommended, in the recipe"} <= set(found)


def test_a_bar_longer_than_twice_the_memory_is_broken_off_at_the_end_of_the_axis() -> None:
    drawing = memory_drawing(SUBJECT, [even("a", 500), even("b", 70)], CAPACITY, USABLE, error=0.05)
    segments = [shape for shape in drawing.standing_for("a") if isinstance(shape, Rectangle)]
    start = segments[0].left
    assert segments[-1].right - start == pytest.approx(2 * (place(drawing, "capacity") - start))
    assert len(drawing.standing_for("a", "broken off")) == 1
    assert not drawing.standing_for("b", "broken off")
    assert "500 GB, does not fit" in words(drawing)
    assert words(drawing).count("71.4") == 2  # not at the segment that is cut


def test_no_vertical_line_goes_through_an_amount() -> None:
    drawing = memory_drawing(SUBJECT, [even("a", size) for size in (77, 84, 100, 120, 140, 160)], CAPACITY, USABLE)
    amounts = [text for text in drawing.texts if re.fullmatch(r"\d+\.\d|77\.0 GB", text.text)]
    assert len(amounts) == 6 * 7 + 1
    for text in amounts:
        for line in ("usable", "capacity"):
            assert not text.box[0] <= place(drawing, line) <= text.box[2], (text, line)


def test_long_names_are_cut_where_they_would_leave_no_room_for_the_bars() -> None:
    drawing = memory_drawing(LONG, [even("W" * 200, 80), even("a" * 40, 30)], CAPACITY, USABLE)
    first = drawing.standing_for("a" * 40)[0]
    assert isinstance(first, Rectangle)
    assert place(drawing, "capacity") - first.left > 300
    assert "a" * 40 in words(drawing)
    assert_readable(drawing)


def test_if_all_bars_are_short_the_axis_ends_with_them_and_the_memory_is_named() -> None:
    drawing = memory_drawing(SUBJECT, [even("a", 0.01)], CAPACITY, USABLE)
    assert not drawing.standing_for("capacity")
    assert any("85.0 GB" in text and "beyond this axis" in text for text in words(drawing))
    (*_, last) = drawing.standing_for("a")
    assert isinstance(last, Rectangle)
    assert last.right > drawing.width * 0.8


def test_the_error_of_an_estimate_is_in_the_title_and_at_the_end_of_its_bar() -> None:
    drawing = memory_drawing(SUBJECT, [even("a", 70)], CAPACITY, USABLE, error=0.05)
    (error,) = drawing.standing_for("a", "error")
    assert isinstance(error, Line)
    start = next(shape.left for shape in drawing.standing_for("a", KINDS[0]) if isinstance(shape, Rectangle))
    lengths = [(x - start) / (place(drawing, "capacity") - start) * 85 for x, _ in error.points]
    assert lengths == pytest.approx([66.5, 73.5])
    assert "estimate: within 5 %" in words(drawing)
    assert words(memory_drawing(LONG, [even("a", 70)], CAPACITY, USABLE))[1] == "measured"


SIZES = [0.01, 0.05, 0.3, 1, 3, 8, 20, 40, 70, 77, 80, 84.9, 85.1, 120, 170, 500]


@pytest.mark.parametrize("subject", [SUBJECT, LONG])
@pytest.mark.parametrize("error", [None, 0.05, 0.3])
def test_everything_can_be_read(error: float | None, subject: Subject) -> None:
    bars = [
        even(f"{number:02} {'W' * 37}", size, recommended=number % 3 == 0, in_recipe=number % 2 == 0)
        for number, size in enumerate(SIZES)
    ]
    for shown in (bars, *([bar] for bar in bars)):
        assert_readable(memory_drawing(subject, shown, CAPACITY, USABLE, error))


def test_the_image_is_as_large_as_the_drawing_and_has_the_colours_of_the_segments() -> None:
    drawing = memory_drawing(SUBJECT, [even("a", 70)], CAPACITY, USABLE)
    assert (drawing.image.mode, drawing.image.size) == ("RGB", (drawing.width, drawing.height))
    for segment in (shape for shape in drawing.standing_for("a") if isinstance(shape, Rectangle)):
        inside = math.floor(segment.left) + 4, math.floor(segment.top) + 4
        assert "#{:02x}{:02x}{:02x}".format(*drawing.image.getpixel(inside)) == segment.fill  # type: ignore[misc]
