"""Small multiples as inline SVG: named rows, and beside them narrow charts that share the rows.

Colours and fonts come from the page's style sheet, so light and dark both work.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

import attrs

from .scale import nice_step

ROW, TOP, LABEL, GAP = 24, 34, 150, 18


@attrs.frozen
class Mark:
    """One row's value in a strip.

    Attributes:
        start, stop: ends of its bar, in the strip's unit; start is None for a dot. text: written beside it. tip: for a
            pointer and for screen readers. low, high: colours of the parts before and after the strip's `middle`.
    """

    start: float | None
    stop: float
    text: str
    tip: str


@attrs.frozen(kw_only=True)
class Strip:
    """A narrow chart: a mark for each row, or None.

    Attributes:
        title: above it. marks: in the rows' order. log: whether the axis is logarithmic. middle: a value with a line of
            its own; bars of two colours meet there. span: (low, high) of the axis, where several charts share it; None
            for that of the marks.
    """

    title: str
    marks: Sequence[Mark | None]
    log: bool = False
    middle: float | None = None
    span: tuple[float, float] | None = None


def axis_of(strips: Sequence[Strip]) -> tuple[float, float]:
    """The axis that holds every mark of some strips: whole decades, or from 0 to a round number."""
    marks = [mark for strip in strips for mark in strip.marks if mark is not None]
    values = [value for mark in marks for value in (mark.start, mark.stop) if value is not None]
    values += [strip.middle for strip in strips if strip.middle is not None]
    values = [value for value in values if math.isfinite(value)]
    if any(strip.log for strip in strips):
        above = [value for value in values if value > 0] or [1.0]
        low, high = math.floor(math.log10(min(above))), math.ceil(math.log10(max(above)))
        return 10.0**low, 10.0 ** max(high, low + 1)
    middle = strips[0].middle
    if middle is not None:
        reach = max([abs(value - middle) for value in values], default=0.0) or abs(middle) or 1.0
        return middle - reach * 1.05, middle + reach * 1.05
    top = max(values, default=0.0) or 1.0
    step = nice_step(top / 2)
    return 0.0, math.ceil(top / step * 0.999) * step


def draw(labels: Sequence[str], strips: Sequence[Strip], *, name: str, colour: str = "var(--c1)") -> str:
    """Rows with their strips, as wide as they need to be.

    Args:
        name: what the picture shows, for readers that cannot see it. colour: of the marks, a style sheet's variable.
    """
    width = 540
    plot = (width - LABEL - GAP * len(strips)) / max(len(strips), 1)
    height, body = TOP + ROW * len(labels) + 8, ""
    for number, label in enumerate(labels):
        short = label if len(label) <= 24 else f"…{label[-23:]}"
        body += _text(LABEL - 10, TOP + ROW * number + 16, short, "label", "end", label)
    for place, strip in enumerate(strips):
        body += _strip(strip, LABEL + GAP + place * (plot + GAP), plot - GAP, height, colour)
    return f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(name)}">{body}</svg>'


def _strip(strip: Strip, left: float, width: float, height: int, colour: str) -> str:
    low, high = strip.span or axis_of([strip])

    def at(value: float) -> float:
        if not math.isfinite(value):
            return left + width
        if strip.log:
            share = math.log10(max(value, low) / low) / math.log10(high / low)
        else:
            share = (value - low) / (high - low)
        return left + min(max(share, 0.0), 1.0) * width

    body = _text(left, 13, strip.title, "label")
    for edge in (low, high) if strip.middle is None else (strip.middle,):
        body += f'<line class="grid" x1="{at(edge):.1f}" x2="{at(edge):.1f}" y1="{TOP - 6}" y2="{height - 6}"/>'
    for number, mark in enumerate(strip.marks):
        y = TOP + ROW * number
        if mark is None:
            body += _text(left, y + 16, "none", "muted")
            continue
        stop, title = at(mark.stop), f"<title>{escape(mark.tip)}</title>"
        if mark.start is None:
            body += f'<circle cx="{stop:.1f}" cy="{y + 12}" r="4.5" fill="{colour}">{title}</circle>'
        else:
            first, last = sorted((at(mark.start), stop))
            body += (
                f'<rect x="{first:.1f}" y="{y + 5}" width="{max(last - first, 1):.1f}" height="14" rx="2" '
                f'fill="{colour}">{title}</rect>'
            )
            stop = last
        room = left + width + GAP - stop
        inside = room < 8 + 6.2 * len(mark.text)
        first = stop if mark.start is None else min(at(mark.start), stop)
        x = (first if inside else stop) + (-8 if inside else 8)
        body += _text(x, y + 16, mark.text, "value", "end" if inside else "start")
    return body


def _text(x: float, y: float, text: str, kind: str, anchor: str = "start", tip: str = "") -> str:
    title = f"<title>{escape(tip)}</title>" if tip and tip != text else ""
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}{title}</text>'
