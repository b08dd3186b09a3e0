"""Small multiples: a table whose cells hold a bar or a dot over its number, on an axis that a column's cells share.

It is a real table, so that readers that cannot see it read the numbers, and its text keeps its size at every width.
Colours come from the page's style sheet.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

import attrs

from .scale import nice_step

#: The style of the pictures; once on a page that has any.
STYLE = (
    "<style>.strips{table-layout:fixed;font-size:13px}.strips th,.strips td{padding:5px 12px 5px 0;border:0;"
    "vertical-align:middle}.strips tbody th{color:var(--ink);overflow-wrap:anywhere}.strips td{line-height:1.2}"
    ".strips .track{position:relative;display:block;height:9px;margin-bottom:3px;background:var(--track);"
    "border-radius:2px}.strips .track *{position:absolute;top:0;height:9px;border-radius:2px;background:var(--c1)}"
    ".strips .track .dot{width:9px;margin-left:-4px;border-radius:50%}.strips .track .middle{top:-3px;height:15px;"
    "width:2px;margin-left:-1px;background:var(--ink)}</style>"
)


@attrs.frozen
class Mark:
    """One row's value in a strip.

    Attributes:
        start, stop: ends of its bar, in the strip's unit; start is None for a dot. text: written under it. tip: for a
            pointer.
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
            its own, in the middle of the axis. span: (low, high) of the axis, where several charts share it; None for
            that of the marks.
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
    values = [value for value in values if math.isfinite(value)]
    if any(strip.log for strip in strips):
        above = [value for value in values if value > 0] or [1.0]
        low, high = math.floor(math.log10(min(above))), math.ceil(math.log10(max(above)))
        return 10.0**low, 10.0 ** max(high, low + 1)
    middle = strips[0].middle
    if middle is not None:
        reach = max([abs(value - middle) for value in values], default=0.0) or abs(middle) or 1.0
        return middle - reach, middle + reach
    top = max(values, default=0.0) or 1.0
    step = nice_step(top / 4)
    return 0.0, math.ceil(top / step * 0.999) * step


def draw(labels: Sequence[str], strips: Sequence[Strip], *, name: str, first: str) -> str:
    """Rows with their strips, as wide as the place that they are in.

    Args:
        name: what the picture shows. first: heads the column of labels.
    """
    share = 100 / (len(strips) + 1)
    head = f'<th style="width:{share:.4g}%">{escape(first)}</th>'
    head += "".join(f"<th>{escape(strip.title)}</th>" for strip in strips)
    axes = [strip.span or axis_of([strip]) for strip in strips]
    body = ""
    for number, label in enumerate(labels):
        cells = "".join(_cell(strip, strip.marks[number], axis) for strip, axis in zip(strips, axes, strict=True))
        body += f'<tr><th scope="row">{escape(label)}</th>{cells}</tr>'
    return (
        f'<table class="strips" aria-label="{escape(name)}"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'
    )


def _cell(strip: Strip, mark: Mark | None, axis: tuple[float, float]) -> str:
    if mark is None:
        return '<td><span class="none">none</span></td>'
    stop = _place(mark.stop, axis, strip.log)
    if mark.start is None:
        drawn = f'<i class="dot" style="left:{stop:.4g}%"></i>'
    else:
        low, high = sorted((_place(mark.start, axis, strip.log), stop))
        drawn = f'<i style="left:{low:.4g}%;width:max({high - low:.4g}%,2px)"></i>'
    if strip.middle is not None:
        drawn += f'<i class="middle" style="left:{_place(strip.middle, axis, strip.log):.4g}%"></i>'
    return f'<td title="{escape(mark.tip)}"><span class="track">{drawn}</span>{escape(mark.text)}</td>'


def _place(value: float, axis: tuple[float, float], log: bool) -> float:
    """Where a value lies on an axis, percent of its length; what is not finite lies at its end."""
    low, high = axis
    if not math.isfinite(value):
        return 100.0
    share = math.log10(max(value, low) / low) / math.log10(high / low) if log else (value - low) / (high - low)
    return 100 * min(max(share, 0.0), 1.0)
