"""Timelines: places of spans, micro-batches that are left out, times of the whole step."""

from dataclasses import replace

import pytest

from pipeline.planner.pictures.drawing import Drawing, Rectangle
from pipeline.planner.pictures.heading import Subject
from pipeline.planner.pictures.step_timeline import (
    StepTimeline,
    TimelineSpan,
    axis_sections,
    lanes,
    timeline_drawing,
)
from tests.pipeline.planner.pictures.readable import LONG, SUBJECT, assert_readable, words


def step(
    micro_batches: int,
    forward: float = 20.0,
    recomputation: float = 8.0,
    backward: float = 42.0,
    exposed: float = 12.0,
    optimizer: float = 10.0,
) -> StepTimeline:
    """A step in which each micro-batch has its communication behind the backward."""
    spans: list[TimelineSpan] = []
    time = 0.0
    for number in range(micro_batches):
        spans.append(TimelineSpan("data", time, time + forward, number, "decode"))
        spans.append(TimelineSpan("host", time, time + forward / 2, number))
        spans.append(TimelineSpan("forward", time, time + forward, number))
        time += forward
        spans.append(TimelineSpan("recomputation", time, time + recomputation, number))
        time += recomputation
        spans.append(TimelineSpan("hidden communication", time, time + backward, number, "reduce-scatter"))
        spans.append(TimelineSpan("backward", time, time + backward, number))
        time += backward
    spans.append(TimelineSpan("exposed communication", time, time + exposed, None, "all-gather"))
    spans.append(TimelineSpan("optimizer", time + exposed, time + exposed + optimizer))
    time += exposed + optimizer
    return StepTimeline(time, spans, micro_batches, 0.85 * time, 1.25 * time)


def rectangles(drawing: Drawing, *of: str) -> list[Rectangle]:
    return [shape for shape in drawing.standing_for(*of) if isinstance(shape, Rectangle)]


def test_spans_are_as_long_as_their_times_and_follow_each_other() -> None:
    drawing = timeline_drawing(SUBJECT, step(1))
    forward, recomputation, backward = (
        rectangles(drawing, kind, "0")[0] for kind in ("forward", "recomputation", "backward")
    )
    (exposed,), (optimizer,) = rectangles(drawing, "exposed communication"), rectangles(drawing, "optimizer")
    for before, after in (
        (forward, recomputation),
        (recomputation, backward),
        (backward, exposed),
        (exposed, optimizer),
    ):
        assert before.right == pytest.approx(after.left)
    found = [one.width / forward.width for one in (recomputation, backward, exposed, optimizer)]
    assert found == pytest.approx([0.4, 2.1, 0.6, 0.5])
    assert forward.top == recomputation.top == backward.top == optimizer.top < exposed.top


@pytest.mark.parametrize(("micro_batches", "drawn"), [(4, [0, 1, 2, 3]), (5, [0, 1, 4]), (64, [0, 1, 63])])
def test_of_many_micro_batches_the_first_two_and_the_last_are_drawn(micro_batches: int, drawn: list[int]) -> None:
    drawing = timeline_drawing(SUBJECT, step(micro_batches))
    assert [int(shape.of[1]) for shape in rectangles(drawing, "backward")] == drawn
    named = [text for text in words(drawing) if text.startswith("micro-batch")]
    assert named == [f"micro-batch {number + 1}" for number in drawn]
    left_out = [text for text in drawing.texts if text.text.endswith("more")]
    assert [text.text for text in left_out] == ([f"... {micro_batches - 3} more"] if micro_batches > 4 else [])
    for text in left_out:
        left, _, right, _ = text.box
        before, after = rectangles(drawing, "backward", "1")[0].right, rectangles(drawing, "forward")[-1].left
        assert before + 10 < left < right < after - 10


def test_before_and_after_the_micro_batches_that_are_left_out_the_scale_is_the_same() -> None:
    timeline = step(17)
    before, after = axis_sections(timeline, 100, 1100)
    assert (before.start, before.end, after.start, after.end) == (0, 140, 1120, timeline.step)
    scale = (before.right - before.left) / 140
    assert (after.right - after.left) / (timeline.step - 1120) == pytest.approx(scale)
    assert (before.left, after.right) == (100, 1100)
    assert before.right < after.left
    widths = [shape.width for shape in rectangles(timeline_drawing(SUBJECT, timeline), "forward")]
    assert widths == pytest.approx([widths[0]] * 3)


def test_the_legend_has_the_times_of_all_micro_batches() -> None:
    found = words(timeline_drawing(SUBJECT, step(16)))
    total = 16 * 70 + 22
    assert f"forward 320 ms, {320 / total:.0%}".replace("%", " %") in found
    assert f"recomputation 128 ms, {128 / total:.0%}".replace("%", " %") in found
    assert f"exposed communication 12.0 ms, {12 / total:.0%}".replace("%", " %") in found


def test_the_title_has_the_time_of_the_step_and_its_range() -> None:
    found = words(timeline_drawing(SUBJECT, step(1)))
    assert found[:2] == ["A step of 92.0 ms: stage pretrain on H100 80 GB", "estimate: 78.2 to 115 ms"]
    measured = replace(step(1), least=None, most=None)
    assert words(timeline_drawing(replace(SUBJECT, measured=True), measured))[1] == "measured"


def test_spans_of_a_row_that_overlap_are_drawn_below_each_other() -> None:
    spans = [TimelineSpan("hidden communication", start, start + 10) for start in (0, 4, 10, 14)]
    assert lanes(spans) == [[spans[0], spans[2]], [spans[1], spans[3]]]
    computed = TimelineSpan("forward", 0, 30, 0)
    tops = [
        shape.top
        for shape in rectangles(
            timeline_drawing(SUBJECT, StepTimeline(30, [computed, *spans], 1)), "hidden communication"
        )
    ]
    assert len(set(tops)) == 2


def test_without_communication_its_row_says_so() -> None:
    found = words(timeline_drawing(SUBJECT, StepTimeline(30, [TimelineSpan("forward", 0, 30, 0)], 1)))
    assert "no communication" in found
    assert not {"data", "host"} & set(found)


def test_a_micro_batch_without_spans_is_an_error() -> None:
    timeline = step(8)
    with pytest.raises(AssertionError, match="micro-batches \\[3\\]"):
        timeline_drawing(SUBJECT, replace(timeline, spans=[span for span in timeline.spans if span.micro_batch != 3]))


TIMELINES = {
    "one": step(1),
    "four": step(4),
    "64": step(64),
    "64, which are short": step(64, forward=0.1, recomputation=0.0, backward=0.2, optimizer=500),
    "64, which are long": step(64, forward=20000, backward=40000, exposed=0.0, optimizer=0.5),
    "five that are short, much communication": step(5, forward=0.01, backward=0.01, exposed=300, optimizer=0.01),
    "of microseconds": step(3, forward=0.002, recomputation=0.001, backward=0.004, exposed=0.0, optimizer=0.0),
}


@pytest.mark.parametrize("subject", [SUBJECT, LONG])
@pytest.mark.parametrize("name", TIMELINES)
def test_everything_can_be_read(name: str, subject: Subject) -> None:
    assert_readable(timeline_drawing(subject, TIMELINES[name]))
    named = [replace(span, name="W" * 40) for span in TIMELINES[name].spans]
    assert_readable(timeline_drawing(subject, replace(TIMELINES[name], spans=named)))
