"""Figures over the length of the texts, a line for each device, as inline SVG on logarithmic axes.

As the scatter charts of `hal_compare.pareto`, a chart is drawn for wide and for narrow pages.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from html import escape

import attrs

from ..charts import colour
from ..pareto import NARROW, WIDE, Axis
from ..result import Figure
from ..scale import Scale

HEIGHT = 320
_LEFT, _TOP, _BOTTOM = 46, 26, 46
#: Room for the names at the right, in a drawing of each width.
_NAMES = {WIDE[0]: 150, NARROW[0]: 116}
_LINE = 15


@attrs.frozen(kw_only=True)
class Curve:
    """The figures of one device.

    Attributes:
        label: written at its end. colour: index of a colour. modelled: drawn dashed.
        points: (tokens, figure), by tokens.
    """

    label: str
    colour: int | str
    modelled: bool
    points: Sequence[tuple[int, Figure]]


def curves(series: Sequence[Curve], lengths: Sequence[int], axis: Axis) -> str:
    """A chart over lengths; values that are 0 or not finite lie on the edge. "" where no device has a figure.

    Args:
        lengths: all that the axis has, in ascending order. axis: of the figures.
    """
    series = [one for one in series if one.points]
    if not series:
        return ""
    name = f"{axis.name} by tokens: " + "; ".join(
        f"{one.label} {axis.show(one.points[0][1].middle)} to {axis.show(one.points[-1][1].middle)}" for one in series
    )
    height = max(HEIGHT, _TOP + _LINE * (len(series) + 1))
    drawn = "".join(
        f'<svg class="{kind}" viewBox="0 0 {width} {height}" role="img" aria-label="{escape(name)}">'
        f"{_drawing(series, lengths, axis, width - _NAMES[width])}</svg>"
        for kind, (width, _) in (("wide", WIDE), ("narrow", NARROW))
    )
    return f'<div class="pareto">{drawn}</div>'


def _drawing(series: Sequence[Curve], lengths: Sequence[int], axis: Axis, right: int) -> str:
    """The picture, whose plot ends at `right`."""
    bottom = HEIGHT - _BOTTOM
    rows = Scale([figure.middle for one in series for _, figure in one.points], bottom, _TOP)

    def across(length: int) -> float:
        span = math.log(lengths[-1] / lengths[0]) or 1.0
        return _LEFT + 12 + math.log(length / lengths[0]) / span * (right - _LEFT - 24)

    body, ends = _grid(rows, lengths, across, right, bottom, axis), []
    for one in sorted(series, key=lambda curve: rows.place(curve.points[-1][1].middle)):
        places = [(across(length), rows.place(figure.middle)) for length, figure in one.points]
        tone, dash = colour(one.colour), ' stroke-dasharray="5 4"' if one.modelled else ""
        line = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        body += f'<polyline points="{line}" fill="none" stroke="{tone}" stroke-width="2"{dash}/>'
        for (x, y), (length, figure) in zip(places, one.points, strict=True):
            tip = f"{one.label}, {length} tokens: {axis.show(figure.middle)} ({figure.origin})"
            body += f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="{tone}"><title>{escape(tip)}</title></circle>'
        ends.append((places[-1], one))
    return body + _names(ends, right, bottom)


def _grid(
    rows: Scale, lengths: Sequence[int], across: Callable[[int], float], right: float, bottom: float, axis: Axis
) -> str:
    body = ""
    for _, place in rows.ticks:
        body += f'<line class="grid" x1="{_LEFT}" x2="{right}" y1="{place:.1f}" y2="{place:.1f}"/>'
    for exponent, place in rows.spaced(_LINE):
        body += f'<text class="tick" x="{_LEFT - 6}" y="{place + 4:.1f}" text-anchor="end">{axis.tick(exponent)}</text>'
    for low, high in rows.gaps:
        for place in ((low + high) / 2 - 3, (low + high) / 2 + 3):
            body += f'<line class="gap" x1="{_LEFT}" x2="{right}" y1="{place:.1f}" y2="{place:.1f}"/>'
    after = -math.inf
    for length in lengths:
        x = across(length)
        body += f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP}" y2="{bottom}"/>'
        if x >= after:
            body += f'<text class="tick" x="{x:.1f}" y="{bottom + 16}" text-anchor="middle">{length:,}</text>'
            after = x + 44
    body += f'<text class="axis" x="{right}" y="{bottom + 36}" text-anchor="end">tokens of a text →</text>'
    return body + f'<text class="axis" x="2" y="13">↑ {escape(axis.name)}</text>'


def _names(ends: Sequence[tuple[tuple[float, float], Curve]], right: float, bottom: float) -> str:
    """Names at the ends of the lines, moved apart, with a line from each to its own end."""
    body, after = "", float(_TOP - _LINE)
    room = bottom - _LINE * len(ends)
    for number, ((x, y), one) in enumerate(ends):
        after = max(min(y, max(room + _LINE * (number + 1), after)), after + _LINE) if number else max(y - 4, _TOP)
        body += f'<path class="leader" d="M{x + 5:.1f} {y:.1f}L{right + 8} {after:.1f}"/>'
        body += f'<text class="name" x="{right + 11}" y="{after + 4:.1f}">{escape(one.label)}</text>'
    return body
