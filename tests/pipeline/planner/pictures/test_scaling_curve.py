"""Scaling curves: logarithmic places, the ideal line, ranges and labels."""

from itertools import pairwise

import pytest

from pipeline.planner.pictures.drawing import Dot, Drawing, Line, Polygon
from pipeline.planner.pictures.heading import Subject
from pipeline.planner.pictures.scaling_curve import ScalingPoint, columns_that_fit, scaling_drawing
from tests.pipeline.planner.pictures.readable import LONG, SUBJECT, assert_readable, words

DOUBLED = [ScalingPoint(8 * 2**n, 500 * 1.8**n, 0.02 * n, 450 * 1.8**n, 600 * 1.8**n) for n in range(10)]


def dots(drawing: Drawing) -> list[Dot]:
    return [shape for shape in drawing.standing_for("point") if isinstance(shape, Dot)]


def line(drawing: Drawing, name: str) -> Line:
    (found,) = drawing.standing_for(name)
    assert isinstance(found, Line)
    return found


def test_equal_factors_are_equally_far_apart() -> None:
    drawing = scaling_drawing(SUBJECT, DOUBLED)
    found = dots(drawing)
    assert [int(dot.of[1]) for dot in found] == [point.gpus for point in DOUBLED]
    across = [after.x - before.x for before, after in pairwise(found)]
    upwards = [before.y - after.y for before, after in pairwise(found)]
    assert across == pytest.approx([across[0]] * 9)
    assert upwards == pytest.approx([upwards[0]] * 9)
    assert line(drawing, "curve").points == tuple((dot.x, dot.y) for dot in found)


def test_the_ideal_line_begins_at_the_first_point_and_doubles_with_the_gpus() -> None:
    drawing = scaling_drawing(
        SUBJECT, [ScalingPoint(8, 1000, 0), ScalingPoint(16, 1500, 0.2), ScalingPoint(32, 4000, 0)]
    )
    (x, y), (end, above) = line(drawing, "ideal").points
    first, second, last = dots(drawing)
    assert (x, y) == (first.x, first.y)
    assert (end, above) == pytest.approx((last.x, last.y))
    assert second.y > (y + above) / 2


def test_the_range_goes_through_the_ends_of_all_ranges() -> None:
    drawing = scaling_drawing(SUBJECT, DOUBLED)
    (band,) = drawing.standing_for("range")
    assert isinstance(band, Polygon)
    upper, lower = band.points[:10], band.points[:9:-1]
    for dot, above, below in zip(dots(drawing), upper, lower, strict=True):
        assert dot.x == above[0] == below[0]
        assert above[1] < dot.y < below[1]
    assert "estimate: 89,300 to 119,000 images per second with 4,096 GPUs" in words(drawing)


def test_points_have_their_figures_and_the_share_of_exposed_communication() -> None:
    found = words(scaling_drawing(SUBJECT, [ScalingPoint(1, 100, 0), ScalingPoint(1024, 76800, 0.217)]))
    assert {"1", "100", "0 %", "100 %", "1,024", "76,800", "75 %", "22 %"} <= set(found)


def test_shares_stand_on_the_side_where_the_curve_is_not() -> None:
    points = [ScalingPoint(8, 1000, 0.11), ScalingPoint(16, 1500, 0.12), ScalingPoint(24, 1200, 0.13)]
    drawing = scaling_drawing(SUBJECT, points)
    tops = {text.text: text.box[1] for text in drawing.texts}
    below = [tops[share] > dot.y for share, dot in zip(("11 %", "12 %", "13 %"), dots(drawing), strict=True)]
    assert below == [True, False, True]


def test_measured_points_have_no_range() -> None:
    drawing = scaling_drawing(LONG, [ScalingPoint(1, 100, 0), ScalingPoint(2, 190, 0.05)])
    assert not drawing.standing_for("range")
    assert words(drawing).count("measured") == 2
    assert not {"estimate", "its range"} & set(words(drawing))


def test_columns_that_would_overlap_are_left_out_and_the_last_one_is_kept() -> None:
    assert columns_that_fit([(50, 40)]) == [0]
    assert columns_that_fit([(0, 40), (30, 40), (60, 40), (100, 40), (150, 40)]) == [0, 2, 4]
    assert columns_that_fit([(0, 40), (100, 40), (150, 40)]) == [0, 2]


CURVES = {
    "one": DOUBLED[:1],
    "one, measured": [ScalingPoint(1, 0.01, 0.0)],
    "two equal ones": [ScalingPoint(8, 100, 0.5), ScalingPoint(16, 100, 0.9)],
    "ten": DOUBLED,
    "64": [ScalingPoint(n, 60.0 * n, 0.003 * n, 50.0 * n, 70.0 * n) for n in range(1, 65)],
    "falling": [ScalingPoint(8, 1000, 0), ScalingPoint(16, 1500, 0.2), ScalingPoint(24, 200, 0.999)],
    "far apart": [*DOUBLED[:4], ScalingPoint(10**6, 5e9, 1.0, 1e8, 2e10)],
    "slow": [ScalingPoint(n, 0.01 * n, 0.0004) for n in (1, 2, 4)],
}


@pytest.mark.parametrize("subject", [SUBJECT, LONG])
@pytest.mark.parametrize("name", CURVES)
def test_everything_can_be_read(name: str, subject: Subject) -> None:
    assert_readable(scaling_drawing(subject, CURVES[name]))
