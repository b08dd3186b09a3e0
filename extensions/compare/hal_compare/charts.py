"""The report's charts: rows of bars and dots as HTML, lines by layer as SVG. Colours and fonts come from the page's
style sheet, so light, dark and every width work: rows keep the size of their text, and positions are shares.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from html import escape

import attrs

from .figures import percent, ratio
from .result import Figure
from .scale import Scale, nice_step, power

#: Width and height of one chart of lines, in units that are about one pixel.
PANEL = (300, 168)
_DASHES = ("", "6 4", "2 3")


@attrs.frozen(kw_only=True)
class Mark:
    """One row of a chart.

    Attributes:
        label: the device or file. colour: index of its colour, or "neutral". modelled: drawn hatched, or hollow.
        parts: figures drawn side by side (bars), or the range of values (dots). text: written at the end.
        note: shown where there is no figure. dash: of a line: 0 solid, 1 dashed, 2 dotted.
    """

    label: str
    colour: int | str = "neutral"
    modelled: bool = False
    parts: tuple[Figure, ...] = ()
    text: str = ""
    note: str = ""
    dash: int = 0


def colour(mark: int | str) -> str:
    """The style sheet's variable of a colour."""
    return "var(--neutral)" if mark == "neutral" else f"var(--c{int(mark) % 8})"


def bars(marks: Sequence[Mark], show: Callable[[float], str], name: str, *, line: float | None = None) -> str:
    """Horizontal bars from 0. With two parts the first is the host's, in grey.

    Args:
        line: a value to mark with a dashed line. name: what the chart shows, for readers that cannot see it.
    """
    top = max([sum(p.high for p in mark.parts) for mark in marks if mark.parts] + [line or 0.0]) or 1.0
    step = nice_step(top / 3)
    top = max(math.ceil(top / step), 1) * step
    ticks = [(100 * i * step / top, show(i * step) if i else "0") for i in range(round(top / step) + 1)]
    body = ""
    for mark in marks:
        drawn, start = "", 0.0
        for place, part in enumerate(mark.parts):
            host = len(mark.parts) == 2 and place == 0
            tip = f"{mark.label}: {show(part.middle)} ({show(part.low)} to {show(part.high)}), {part.origin}"
            hatched = " hatched" if mark.modelled and not host else ""
            drawn += _bar(start / top, part.middle / top, "neutral" if host else mark.colour, tip, hatched)
            start += part.middle
        if mark.parts:
            low, high = (sum(getattr(p, end) for p in mark.parts) for end in ("low", "high"))
            drawn += _span("whisker", 100 * low / top, 100 * high / top) if high > low else ""
        body += _row(mark, drawn)
    return _rows(body, ticks, name, _span("mark", 100 * line / top) if line is not None else "")


def dots(
    marks: Sequence[Mark],
    name: str,
    show: Callable[[float], str] = ratio,
    tick: Callable[[int], str] = power,
) -> str:
    """A hollow dot for the first part and a filled one for the last, joined, on a logarithmic axis.

    Args:
        name: what the chart shows, for readers that cannot see it. show: writes a value. tick: writes a power of ten.
    """
    values = [value for mark in marks for part in mark.parts for value in (part.low, part.middle, part.high)]
    scale = Scale(values, 0.0, 100.0)
    body = ""
    for mark in marks:
        ends = [scale.place(part.middle) for part in mark.parts]
        tone = f"--tone:{colour(mark.colour)}"
        drawn = _span("joined", min(ends), max(ends), tone) if len(set(ends)) > 1 else ""
        for part, place in zip(mark.parts, ends, strict=True):
            drawn += _span("whisker", scale.place(part.low), scale.place(part.high)) if part.high > part.low else ""
            kind = "dot hollow" if place == ends[0] and len(set(ends)) > 1 else "dot"
            tip = f"{mark.label}: {show(part.middle)} ({show(part.low)} to {show(part.high)}), {part.origin}"
            drawn += _span(f"{kind}{' modelled-dot' if mark.modelled else ''}", place, None, tone, tip)
        body += _row(mark, drawn)
    gaps = "".join(_span("gap", *gap) for gap in scale.gaps)
    return _rows(body, [(place, tick(exponent)) for exponent, place in scale.spaced(28)], name, gaps)


def shares(rows: Sequence[tuple[str, int | str, float]], name: str) -> str:
    """Shares of 1 as bars: (label, colour, share)."""
    body = ""
    for label, fill, share in rows:
        drawn = _bar(0, 1, "track", label) + _bar(0, share, fill, f"{label}: {percent(share)}")
        body += _row(Mark(label=label, text=percent(share)), drawn)
    return _rows(body, [(25 * i, f"{25 * i}%") for i in range(0, 5, 2)], name)


def lines(
    series: Sequence[tuple[Mark, Sequence[float]]],
    name: str,
    *,
    behind: Sequence[Sequence[float]] = (),
) -> str:
    """Values by layer on a logarithmic axis, small: one of several charts side by side.

    Args:
        series: what the chart is about. behind: the lines of all other charts, drawn thin and grey; they set the axis
            too, so that charts with the same lines have one axis. name: for readers that cannot see it.
    """
    width, height = PANEL
    left, right, top, bottom = 40, width - 10, 8, height - 22
    every = [*(row for _, row in series), *behind]
    scale = Scale([value for row in every for value in row], bottom, top)
    count = max(len(row) for row in every)

    def at(index: int) -> float:
        return left + index / max(count - 1, 1) * (right - left)

    body = ""
    for exponent, y in scale.spaced(15):
        body += f'<line class="grid" x1="{left}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>'
        body += _text(left - 5, y + 4, power(exponent), "end")
    for low, high in scale.gaps:
        y = (low + high) / 2
        body += f'<line class="gap" x1="{left}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>'
    for index in range(0, count, 1 + (count - 1) // 6):
        body += _text(at(index), height - 6, "in" if index == 0 else str(index), "middle")
    for row in behind:
        body += f'<polyline class="behind" points="{_path(row, at, scale)}"/>'
    for mark, row in series:
        dash = f' stroke-dasharray="{_DASHES[mark.dash % 3]}"' if mark.dash else ""
        tone = colour(mark.colour)
        body += f'<polyline class="series" points="{_path(row, at, scale)}" stroke="{tone}"{dash}/>'
        for layer, value in enumerate(row):
            body += (
                f'<circle cx="{at(layer):.1f}" cy="{scale.place(value):.1f}" r="2.6" fill="{tone}">'
                f"<title>{escape(mark.label)}, layer {layer}: {ratio(value)}</title></circle>"
            )
    return f'<svg class="panel" viewBox="0 0 {width} {height}" role="img" aria-label="{escape(name)}">{body}</svg>'


def _path(row: Sequence[float], at: Callable[[int], float], scale: Scale) -> str:
    return " ".join(f"{at(index):.1f},{scale.place(value):.1f}" for index, value in enumerate(row))


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text class="tick" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _rows(body: str, ticks: Sequence[tuple[float, str]], name: str, over: str = "") -> str:
    """Rows over an axis with (percent, text), and what is drawn over all of them."""
    grid = "".join(_span("grid", place) for place, _ in ticks)
    marks = ""
    for number, (place, text) in enumerate(ticks):
        side = " first" if place < 10 else " last" if place > 90 else ""
        inner = " inner" if 0 < number < len(ticks) - 1 else ""  # narrow pages have no room for it
        marks += f'<span class="tick{side}{inner}" style="left:{place:.2f}%">{escape(text)}</span>'
    return (
        f'<div class="rows" role="img" aria-label="{escape(name)}"><div class="over"><div class="plot">{grid}{over}'
        f'</div></div>{body}<div class="ticks"><div class="plot">{marks}</div></div></div>'
    )


def _row(mark: Mark, drawn: str) -> str:
    inside = drawn or f'<span class="absent">{escape(mark.note)}</span>'
    return (
        f'<div class="line"><span class="what">{escape(mark.label)}</span><span class="plot">{inside}</span>'
        f'<span class="value">{escape(mark.text)}</span></div>'
    )


def _bar(start: float, length: float, fill: int | str, tip: str, kind: str = "") -> str:
    tone = "var(--track)" if fill == "track" else colour(fill)
    return (
        f'<span class="bar{kind}" style="left:{100 * start:.2f}%;width:{100 * length:.2f}%;--tone:{tone}" '
        f'title="{escape(tip)}"></span>'
    )


def _span(kind: str, low: float, high: float | None = None, style: str = "", tip: str = "") -> str:
    width = f";width:{high - low:.2f}%" if high is not None else ""
    title = f' title="{escape(tip)}"' if tip else ""
    return f'<span class="{kind}" style="left:{low:.2f}%{width}{";" + style if style else ""}"{title}></span>'
