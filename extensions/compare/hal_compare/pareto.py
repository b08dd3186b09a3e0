"""Scatter charts on logarithmic axes with Pareto fronts and names beside the points, as inline SVG.

A chart is drawn twice, for wide and for narrow pages, because labels that must not overlap have to be placed for one
size; the style sheet shows the one that fits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from html import escape
from typing import Literal, NamedTuple

import attrs

from .charts import colour
from .result import Figure
from .scale import Scale, power

#: Width and height of the drawings, in units that are about one pixel.
WIDE, NARROW = (560, 360), (340, 380)
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 14, 26, 46
_FONT, _RADIUS = 12.0, 5.0
#: Width of a character in shares of the font's size: an upper bound of the average in common sans-serif fonts.
_CHARACTER = 0.62


@attrs.frozen(kw_only=True)
class Point:
    """One result in a scatter chart.

    Attributes:
        label: written beside it. x, y: its figures; smaller is better for both. colour: index of a colour, or
            "neutral". shape: "circle" for hardware, "square" for an emulation, "diamond" for a simulation.
        modelled: whether one of its figures is modelled: such points have a front of their own, dashed.
        ranked: False for a point in no front, drawn hollow: one of its figures is an assumption of the user's.
        note: added to the text that a pointer shows.
    """

    label: str
    x: Figure
    y: Figure
    colour: int | str = "neutral"
    shape: Literal["circle", "square", "diamond"] = "circle"
    modelled: bool = False
    ranked: bool = True
    note: str = ""


@attrs.frozen
class Axis:
    """What an axis shows.

    Attributes:
        name: its title, with the statistic. show: writes a value. tick: writes a power of ten, from its exponent.
    """

    name: str
    show: Callable[[float], str]
    tick: Callable[[int], str] = power


class Box(NamedTuple):
    """A rectangle: left, top, right, bottom."""

    left: float
    top: float
    right: float
    bottom: float

    def meets(self, other: Box) -> bool:
        return (
            self.left < other.right and other.left < self.right and self.top < other.bottom and other.top < self.bottom
        )

    def crosses(self, x1: float, y1: float, x2: float, y2: float) -> bool:
        """Whether a line runs through it (by 12 points of the line)."""
        steps = [step / 12 for step in range(13)]
        points = [(x1 + (x2 - x1) * share, y1 + (y2 - y1) * share) for share in steps]
        return any(self.left < x < self.right and self.top < y < self.bottom for x, y in points)


def front(points: Sequence[Point]) -> list[Point]:
    """The points that no other one beats in both figures, from left to right. Of equal points all are in it."""

    def beaten(point: Point) -> bool:
        x, y = point.x.middle, point.y.middle
        return any(
            other.x.middle <= x and other.y.middle <= y and (other.x.middle < x or other.y.middle < y)
            for other in points
        )

    return sorted((p for p in points if not beaten(p)), key=lambda p: (p.x.middle, -p.y.middle))


def pareto(points: Sequence[Point], x: Axis, y: Axis) -> str:
    """A scatter chart, smaller is better, on logarithmic axes.

    Measured and modelled points have a front each, because a model's figures are no measurements. Values that are 0
    or not finite lie on the edge.

    Returns:
        HTML: the chart for wide and for narrow pages. "" without points.
    """
    if not points:
        return ""
    name = f"{y.name} against {x.name}: " + "; ".join(
        f"{point.label} {y.show(point.y.middle)}, {x.show(point.x.middle)}" for point in points
    )
    drawn = ""
    for kind, (width, height) in (("wide", WIDE), ("narrow", NARROW)):
        picture, unnamed = _drawing(points, x, y, width, height)
        drawn += (
            f'<svg class="{kind}" viewBox="0 0 {width} {height}" role="img" aria-label="{escape(name)}">{picture}</svg>'
        )
        drawn += f'<p class="{kind}">Points without a name: {escape(", ".join(unnamed))}.</p>' if unnamed else ""
    return f'<div class="pareto">{drawn}</div>'


def _drawing(points: Sequence[Point], x: Axis, y: Axis, width: int, height: int) -> tuple[str, list[str]]:
    """The picture, and the labels for which it has no room."""
    plot = Box(_LEFT, _TOP, width - _RIGHT, height - _BOTTOM)
    columns = Scale(_values(point.x for point in points), plot.left, plot.right)
    rows = Scale(_values(point.y for point in points), plot.bottom, plot.top)
    across, up = columns.place, rows.place
    body = _grid(plot, columns, rows, x, y)
    for modelled in (False, True):
        best = front([point for point in points if point.ranked and point.modelled is modelled])
        corners = [(across(point.x.middle), up(point.y.middle)) for point in best]
        dash = ' stroke-dasharray="5 4"' if modelled else ""
        body += f'<path class="front" d="{_stairs(corners)}"{dash}/>' if len(corners) > 1 else ""
    places = [(across(point.x.middle), up(point.y.middle)) for point in points]
    for point, (cx, cy) in zip(points, places, strict=True):
        tone = colour(point.colour)
        for figure, path in (
            (point.x, f"M{across(point.x.low):.1f} {cy:.1f}H{across(point.x.high):.1f}"),
            (point.y, f"M{cx:.1f} {up(point.y.low):.1f}V{up(point.y.high):.1f}"),
        ):
            body += f'<path class="range" stroke="{tone}" d="{path}"/>' if figure.low < figure.high else ""
    labels, dots, unnamed = "", "", []
    for point, (cx, cy), found in zip(points, places, _labels(points, places, plot), strict=True):
        tip = (
            f"{point.label}: {y.show(point.y.middle)} ({point.y.origin}), {x.show(point.x.middle)} ({point.x.origin})"
            f"{point.note}"
        )
        dots += f"{_shape(point, cx, cy)}<title>{escape(tip)}</title></path>"
        if found is None:
            unnamed.append(point.label)
            continue
        label, line = found
        body += f'<path class="leader" d="M{line[0]:.1f} {line[1]:.1f}L{cx:.1f} {cy:.1f}"/>' if line else ""
        labels += f'<text class="name" x="{label.left:.1f}" y="{label.bottom - 3.5:.1f}">{escape(point.label)}</text>'
    return body + dots + labels, unnamed


def _values(figures: Iterator[Figure]) -> list[float]:
    return [value for figure in figures for value in (figure.low, figure.middle, figure.high)]


def _grid(plot: Box, columns: Scale, rows: Scale, x: Axis, y: Axis) -> str:
    def vertical(place: float, kind: str) -> str:
        return f'<line class="{kind}" x1="{place:.1f}" x2="{place:.1f}" y1="{plot.top}" y2="{plot.bottom}"/>'

    def horizontal(place: float, kind: str) -> str:
        return f'<line class="{kind}" x1="{plot.left}" x2="{plot.right}" y1="{place:.1f}" y2="{place:.1f}"/>'

    body = "".join(vertical(place, "grid minor") for place in columns.minor)
    body += "".join(horizontal(place, "grid minor") for place in rows.minor)
    body += "".join(vertical(place, "grid") for _, place in columns.ticks)
    body += "".join(horizontal(place, "grid") for _, place in rows.ticks)
    for exponent, place in columns.spaced(56):
        anchor = "end" if place > plot.right - 20 else "middle"
        body += _tick(place, plot.bottom + 16, x.tick(exponent), anchor)
    for exponent, place in rows.spaced(15):
        body += _tick(plot.left - 6, place + 4, y.tick(exponent), "end")
    for low, high in columns.gaps:
        body += vertical(low + (high - low) / 2 - 3, "gap") + vertical(low + (high - low) / 2 + 3, "gap")
    for low, high in rows.gaps:
        body += horizontal(low + (high - low) / 2 - 3, "gap") + horizontal(low + (high - low) / 2 + 3, "gap")
    body += f'<text class="axis" x="{plot.right}" y="{plot.bottom + 36}" text-anchor="end">{escape(x.name)} →</text>'
    return body + f'<text class="axis" x="2" y="13">↑ {escape(y.name)}</text>'


def _tick(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text class="tick" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _stairs(corners: Sequence[tuple[float, float]]) -> str:
    """A front as steps: what lies above and to the right of it is beaten."""
    path = f"M{corners[0][0]:.1f} {corners[0][1]:.1f}"
    return path + "".join(f"H{cx:.1f}V{cy:.1f}" for cx, cy in corners[1:])


def _shape(point: Point, x: float, y: float) -> str:
    r = _RADIUS
    outlines = {
        "circle": f"M{x - r:.1f} {y:.1f}a{r} {r} 0 1 0 {2 * r} 0a{r} {r} 0 1 0 {-2 * r} 0z",
        "square": f"M{x - r:.1f} {y - r:.1f}h{2 * r}v{2 * r}h{-2 * r}z",
        "diamond": f"M{x:.1f} {y - r - 1.5:.1f}l{r + 1.5} {r + 1.5}l{-r - 1.5} {r + 1.5}l{-r - 1.5} {-r - 1.5}z",
    }
    tone = colour(point.colour)
    fill, edge = (tone, "") if point.ranked else ("var(--card)", f' style="stroke:{tone};stroke-width:2"')
    return f'<path class="point" fill="{fill}"{edge} d="{outlines[point.shape]}">'


_Found = tuple[Box, tuple[float, float] | None]


def _labels(points: Sequence[Point], places: Sequence[tuple[float, float]], plot: Box) -> list[_Found | None]:
    """A place for each label that meets no other one and no point, and where a line to its point starts, if far.

    None for a label for which there is no room. Several orders are tried: crowded points first, from the left, from
    the right, from above, from below.
    """

    def crowd(number: int) -> float:
        x, y = places[number]
        return -sum(abs(x - other[0]) < 90 and abs(y - other[1]) < 40 for other in places)

    orders: list[Callable[[int], float]] = [
        crowd,
        lambda number: places[number][0],
        lambda number: -places[number][0],
        lambda number: places[number][1],
        lambda number: -places[number][1],
    ]
    best: list[_Found | None] = []
    for order in orders:
        found = _placed(points, places, plot, sorted(range(len(points)), key=order))
        if not best or found.count(None) < best.count(None):
            best = found
        if None not in best:
            break
    return best


def _placed(
    points: Sequence[Point], places: Sequence[tuple[float, float]], plot: Box, order: Sequence[int]
) -> list[_Found | None]:
    dots = [Box(x - 7, y - 7, x + 7, y + 7) for x, y in places]
    found: list[_Found | None] = [None] * len(points)
    taken: list[Box] = []
    lines: list[tuple[float, float, float, float]] = []
    for number in order:
        x, y = places[number]
        for box in _candidates(points[number].label, x, y):
            inside = plot.left + 3 <= box.left and box.right <= plot.right + _RIGHT and plot.top - 6 <= box.top
            if not inside or box.bottom > plot.bottom or any(box.meets(other) for other in (*taken, *dots)):
                continue
            if any(box.crosses(*line) for line in lines):
                continue
            start = min(max(x, box.left), box.right), min(max(y, box.top + 2), box.bottom - 2)
            far = math.hypot(start[0] - x, start[1] - y) > 14
            if far and any(other.crosses(*start, x, y) for other in taken):
                continue
            found[number] = box, start if far else None
            taken.append(box)
            lines += [(*start, x, y)] if far else []
            break
    return found


def _candidates(label: str, x: float, y: float) -> Iterator[Box]:
    """Places for a label around a point, nearest first."""
    width, height = len(label) * _FONT * _CHARACTER, _FONT + 3
    for distance in (9, 13, 20, 30, 42, 56, 72, 90, 110):
        for turn in range(16):
            angle = turn * math.pi / 8
            dx, dy = math.cos(angle), math.sin(angle)
            left = x + dx * distance - (0 if dx > 0.3 else width if dx < -0.3 else width / 2)
            top = y + dy * distance - height / 2
            if abs(dx) <= 0.3:
                top = y + dy * distance - (0 if dy > 0 else height)
            yield Box(left, top, left + width, top + height)


__all__ = ["NARROW", "WIDE", "Axis", "Box", "Point", "front", "pareto"]
