"""The charts of a report: places, ticks, few points, what is not finite, marks."""

import math
import re

import pytest

from jobs.report.charts import HEIGHT, WIDTH, Axis, Mark, Series, calibration_chart, line_chart
from jobs.report.history import history_table, marks, marks_legend, skipped_samples
from pipeline.runs.event_log import Event, RunEvent

AXIS = Axis(lambda value: f"{value:g}")


def places(svg: str) -> list[tuple[float, float]]:
    """The corners of the curves."""
    lines = re.findall(r'<polyline points="([^"]*)"', svg)
    return [(float(x), float(y)) for line in lines for x, y in (place.split(",") for place in line.split())]


def labels(svg: str) -> list[str]:
    return re.findall(r"<text [^>]*>([^<]*)</text>", svg)


def chart(points: list[tuple[int, float]], axis: Axis = AXIS, last: int = 0, *placed: Mark) -> str:
    return line_chart("Loss", [Series("training", points)], placed, axis, last)


def test_values_are_at_their_places() -> None:
    svg = chart([(0, 0.0), (50, 5.0), (100, 10.0)], last=100)
    (left, low), (_, middle), (right, high) = places(svg)
    assert (left, right) == (66, WIDTH - 24)
    assert middle == pytest.approx((low + high) / 2, abs=0.1)
    assert high < low
    assert labels(svg) == ["0", "2.5", "5", "7.5", "10", "0", "20", "40", "60", "80", "100"]


def test_a_running_stage_leaves_room_for_the_rest_of_its_steps_that_are_known() -> None:
    assert places(chart([(0, 1.0), (50, 2.0)], last=100))[-1][0] == pytest.approx((66 + WIDTH - 24) / 2)


@pytest.mark.parametrize("value", [0.0, 1.0, -3.0, 1e-30, 1e30, 1e-45, 3.4e38])
def test_a_flat_curve_of_any_value_is_drawn(value: float) -> None:
    assert all(math.isfinite(y) and 0 <= y <= HEIGHT for _, y in places(chart([(1, value), (9, value)])))


@pytest.mark.parametrize("factor", [1e-20, 0.7, 3.0, 1e12, 1e36])
@pytest.mark.parametrize("axis", [AXIS, Axis(str, from_zero=True), Axis(str, logarithmic=True)])
def test_curves_of_any_scale_stay_inside(factor: float, axis: Axis) -> None:
    svg = chart([(step, factor * (1 + step % 97)) for step in range(1, 500)], axis)
    assert all(0 <= x <= WIDTH and 0 <= y <= HEIGHT for x, y in places(svg))
    assert 3 <= len(re.findall('class="grid"', svg)) <= 8


def test_many_points_are_thinned_and_keep_their_extremes() -> None:
    points = [(step, 1.0) for step in range(100_000)]
    points[54_321] = (54_321, 9.0)
    points[77_777] = (77_777, -4.0)
    drawn, few = places(chart(points)), places(chart([points[0], points[54_321], points[77_777]], last=99_999))
    assert len(drawn) < 1000
    assert (min(y for _, y in drawn), max(y for _, y in drawn)) == (min(y for _, y in few), max(y for _, y in few))


def test_what_is_not_finite_is_left_out_and_counted() -> None:
    svg = chart([(1, 1.0), (2, math.nan), (3, math.inf), (4, 2.0)])
    assert len(places(svg)) == 2
    assert "2 not finite and not drawn" in svg
    assert chart([(1, math.nan)]) == ""


def test_texts_are_escaped() -> None:
    svg = line_chart("<b>", [Series('<i>"', [(1, 1.0), (2, 2.0)])], [Mark("save", 1, "<u>")], AXIS, 2)
    assert not re.search(
        r"<[biu]>", svg.replace("<b><b>", "").replace("<b>1", "").replace("<b>2", "").replace("<b>&lt;", "")
    )


def test_a_calibration_has_a_bar_for_each_bin_with_samples() -> None:
    svg = calibration_chart([(0, None, None), (10, 0.3, 0.2), (5, 0.9, 1.0)])
    assert svg.count("<rect") == 2
    assert "5 images of mean confidence 90.0%: 100.0% are right" in svg
    assert calibration_chart([(0, None, None)]) == ""


def entry(event: Event, **facts: object) -> RunEvent:
    return RunEvent("2026-01-02T03:04:05+0000", event, facts)


def test_of_many_events_some_are_marked_and_the_legend_says_so() -> None:
    entries = [entry(Event.SAVE, step=step) for step in range(1, 201)] + [entry(Event.RESUME, step=7)]
    found = marks(entries)
    saves = [mark.step for mark in found if mark.kind == "save"]
    assert (len(saves), saves[0], saves[-1]) == (60, 1, 200)
    assert "200 saves (60 of them are marked)" in re.sub("<[^>]*>", "", marks_legend(entries))
    assert "1 resume" in marks_legend(entries)
    assert marks_legend([entry(Event.BEGIN)]) == ""


def test_changed_settings_are_marked_where_they_begin_and_said() -> None:
    changed = ["epochs: 3 -> 4", "optimizer.peak_learning_rate: 0.002 -> 0.001"]
    entries = [entry(Event.EXTEND, step=53, samples=848, steps=70, changed=changed)]
    (mark,) = marks(entries)
    assert (mark.kind, mark.step) == ("settings changed", 53)
    assert "1 change of settings" in marks_legend(entries)
    said = "epochs: 3 -&gt; 4; optimizer.peak_learning_rate: 0.002 -&gt; 0.001; until step 70"
    assert said in history_table(entries)


def test_a_faulty_machine_is_told_with_its_values_and_the_nodes_that_are_left_out() -> None:
    for nodes, told in ((["n2", "n5"], "n2, n5"), ([], "undecided")):
        text = history_table([entry(Event.MACHINE_FAULTY, step=9, kinds=["loss", "gradient"], nodes=nodes, devices=[])])
        assert "faulty machine, step 9" in text
        assert f"loss, gradient differ; without: {told}<" in text


def test_a_long_history_is_shortened_and_says_so() -> None:
    entries = [entry(kind, step=n) for n in range(100) for kind in (Event.RESUME, Event.STOP)]
    text = history_table(entries)
    assert "120 rows are left out" in text
    assert "resume, step 0" in text
    assert "stop, step 99" in text
    assert "all are in events.jsonl" in text


def test_skipped_samples_are_counted_by_sample() -> None:
    entries = [entry(Event.SAMPLE_SKIPPED, shard="s.tar", key=f"k{n % 30}", reason="broken") for n in range(90)]
    text = re.sub("<[^>]*>", "|", skipped_samples(entries))
    assert "90 times a sample could not be used" in text
    assert "30 samples of 1 shard" in text
    assert text.count("broken") == 20


def test_events_with_facts_of_any_kind_are_shown() -> None:
    """An event log may have been edited, or be of another version."""
    for event in Event:
        for number in (10**400, -1, True):
            facts = {"step": "x", "bytes": number, "seconds": None, "top1": "high", "to": [1], "samples": {"a": 1}}
            assert history_table([entry(event, **facts)])
            assert marks([entry(event, **facts)]) == []
