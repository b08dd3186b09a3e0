"""The scatter chart: its fronts, its axes, and labels that never overlap."""

from __future__ import annotations

import random
import re
from html.parser import HTMLParser

import pytest
from hal_compare.charts import Mark, dots, lines
from hal_compare.figures import ratio, seconds
from hal_compare.pareto import NARROW, WIDE, Axis, Box, Point, _labels, front, pareto
from hal_compare.scale import Scale, power

from .comparisons import figure

TIME = Axis("time", seconds, lambda exponent: seconds(10.0**exponent))
ERROR = Axis("error", ratio)


def point(x, y, label="p", **options):
    return Point(label=label, x=figure(x), y=figure(y), **options)


def beats(one, other):
    a, b = (one.x.middle, one.y.middle), (other.x.middle, other.y.middle)
    return a[0] <= b[0] and a[1] <= b[1] and a != b


def test_the_front_holds_what_nothing_beats_and_nothing_else(seed):
    generator = random.Random(seed)
    points = [point(generator.choice([1, 2, 3, 4]), generator.choice([1, 2, 3, 4]), str(n)) for n in range(20)]
    found = front(points)
    for each in points:
        assert (each in found) == (not any(beats(other, each) for other in points))
    assert [each.x.middle for each in found] == sorted(each.x.middle for each in found)


def test_measured_and_modelled_points_have_fronts_of_their_own():
    points = [point(1.0, 0.1), point(2.0, 0.01), point(0.1, 0.2, modelled=True), point(0.2, 0.001, modelled=True)]
    picture = pareto(points, TIME, ERROR)
    fronts = re.findall(r'<path class="front"[^>]*>', picture.partition("</svg>")[0])
    assert [("stroke-dasharray" in each) for each in fronts] == [False, True]
    alone = pareto([points[0], points[2], points[3]], TIME, ERROR)
    assert alone.partition("</svg>")[0].count('class="front"') == 1, "one point is no line"


def test_a_point_at_an_assumed_power_is_hollow_and_in_no_front():
    points = [point(1.0, 0.1), point(2.0, 0.01), point(1e-3, 1e-4, "assumed", ranked=False)]
    picture = pareto(points, TIME, ERROR).partition("</svg>")[0]
    corners = re.search(r'class="front" d="M([\d.]+) ([\d.]+)H([\d.]+)V([\d.]+)"', picture)
    assert corners, "two measured points are the front, which the better third one does not change"
    assert "var(--card)" in picture


def test_readers_that_see_no_picture_are_told_every_number():
    picture = pareto([point(0.24, 9.6e-7, "cpu:0"), point(0.02, 0.3, "envise", modelled=True)], TIME, ERROR)
    for text in ("error against time", "cpu:0 9.6e-07, 240 ms", "envise 3.0e-01, 20 ms"):
        assert text in picture


@pytest.mark.parametrize("size", [WIDE, NARROW])
def test_labels_overlap_neither_each_other_nor_points_and_stay_inside(size, seed):
    generator = random.Random(seed)
    plot = Box(46, 26, size[0] - 14, size[1] - 46)
    count = 24
    places = [
        (
            generator.gauss(0.5, 0.2) % 1 * (plot.right - plot.left) + plot.left,
            generator.choice([0.1, 0.15, 0.8]) * (plot.bottom - plot.top) + plot.top,
        )
        for _ in range(count)
    ]
    points = [point(1, 1, f"device:{number}") for number in range(count)]
    found = [each for each in _labels(points, places, plot) if each is not None]
    boxes = [box for box, _ in found]
    assert len(found) >= count / 2, "hardly a label has a place"
    for number, box in enumerate(boxes):
        assert box.left >= plot.left
        assert box.right <= size[0]
        assert 0 <= box.top < box.bottom <= plot.bottom
        assert not any(box.meets(other) for other in boxes[number + 1 :])
        assert not any(box.left < x < box.right and box.top < y < box.bottom for x, y in places)


def test_points_without_room_for_their_name_are_named_below():
    crowd = [point(1.0, 1.0, f"a-device-with-a-long-name:{number}") for number in range(40)]
    below = re.findall(r'<p class="(?:wide|narrow)">Points without a name: ([^<]*)\.</p>', pareto(crowd, TIME, ERROR))
    assert len(below) == 2
    drawn = re.findall(r'class="name"[^>]*>([^<]*)<', pareto(crowd, TIME, ERROR).partition("</svg>")[0])
    assert sorted([*drawn, *below[0].split(", ")]) == sorted(each.label for each in crowd)


def test_an_axis_keeps_order_and_cuts_empty_decades_short():
    axis = Scale([3e-7, 9e-7, 0.3], 0, 100)
    places = [axis.place(value) for value in (1e-7, 3e-7, 9e-7, 1e-6, 1e-3, 0.1, 0.3, 1.0)]
    assert places == sorted(places)
    assert (places[0], places[-1]) == (0, 100)
    assert len(axis.gaps) == 1
    low, high = axis.gaps[0]
    assert axis.place(1e-6) == pytest.approx(low)
    assert axis.place(0.1) == pytest.approx(high)
    assert high - low < 25, "five empty decades take less room than one full one"
    assert [exponent for exponent, _ in axis.ticks] == [-7, -6, -1, 0]


def test_an_axis_without_long_gaps_is_cut_nowhere():
    axis = Scale([1.5e-3, 2.0, 30.0], 0, 100)
    assert not axis.gaps
    exponents = [exponent for exponent, _ in axis.ticks]
    assert exponents == list(range(-3, 3))
    steps = {round(b[1] - a[1], 6) for a, b in zip(axis.ticks, axis.ticks[1:], strict=False)}
    assert len(steps) == 1


@pytest.mark.parametrize("values", [[], [0.0], [0.0, float("inf"), float("nan")], [1.0], [1e-300, 1e300]])
def test_axes_of_odd_values_are_finite(values):
    axis = Scale(values, 0, 100)
    for value in (*values, 0.0, 1.0, float("inf")):
        assert 0 <= axis.place(value) <= 100


def test_powers_of_ten_are_written_raised():
    assert power(-6) == "10⁻⁶"
    assert power(12) == "10¹²"


class Nested(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.open = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        pass

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_charts_survive_zero_and_values_that_are_not_finite():
    odd = [point(0.0, 0.0, "zero"), point(1e-9, 0.3, "<b>"), point(float("inf"), float("nan"), "odd")]
    mark = Mark(label="odd", parts=(figure(0.0), figure(float("nan"))))
    for picture in (
        pareto(odd, TIME, ERROR),
        pareto([], TIME, ERROR),
        dots([mark], "errors"),
        lines([(mark, [0.0, float("nan"), 1.0])], "layers", behind=[[0.0, 0.1, 0.2]]),
    ):
        Nested(picture)
        assert "<b>" not in picture
        for attribute in re.findall(r' (?:cx|cy|x|y|x1|x2|y1|y2|d|points|style)="([^"]*)"', picture):
            assert "nan" not in attribute
            assert "inf" not in attribute
