"""The report's charts as inline SVG. Colours and fonts come from the page's style sheet, so light and dark both
work.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from html import escape

import attrs

from .figures import percent, ratio
from .result import Figure

WIDTH, LABEL, RIGHT, ROW = 540, 148, 84, 34
_PLOT = WIDTH - LABEL - RIGHT
_RAISED = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


@attrs.frozen(kw_only=True)
class Mark:
    """One row of a chart.

    Attributes:
        label: the device or file. colour: index of its colour, or "neutral". modelled: drawn hatched.
        parts: figures drawn side by side (bars), or the range of values (dots). text: written at the end.
        note: shown where there is no figure.
    """

    label: str
    colour: int | str = "neutral"
    modelled: bool = False
    parts: tuple[Figure, ...] = ()
    text: str = ""
    note: str = ""


def colour(mark: int | str) -> str:
    """The style sheet's variable of a colour."""
    return "var(--neutral)" if mark == "neutral" else f"var(--c{int(mark) % 8})"


def bars(marks: Sequence[Mark], show: Callable[[float], str], name: str, *, line: float | None = None) -> str:
    """Horizontal bars from 0. With two parts the first is the host's, in grey.

    Args:
        line: a value to mark with a dashed line. name: what the chart shows, for readers that cannot see it.
    """
    top = max([sum(p.high for p in mark.parts) for mark in marks if mark.parts] + [line or 0.0]) or 1.0
    step = nice_step(top / 4)
    top = max(math.ceil(top / step), 1) * step
    ticks = [(i * step / top, show(i * step) if i else "0") for i in range(round(top / step) + 1)]
    body = _axis(ticks, len(marks))
    if line is not None:
        x = LABEL + line / top * _PLOT
        body += f'<line class="mark" x1="{x:.1f}" x2="{x:.1f}" y1="0" y2="{len(marks) * ROW}"/>'
    for number, mark in enumerate(marks):
        body += _label(mark, number)
        y, start = number * ROW + 8, 0.0
        for place, part in enumerate(mark.parts):
            host = len(mark.parts) == 2 and place == 0
            fill = "var(--neutral)" if host else colour(mark.colour)
            width = part.middle / top * _PLOT
            tip = f"{mark.label}: {show(part.middle)} ({show(part.low)} to {show(part.high)}), {part.origin}"
            body += _bar(LABEL + start / top * _PLOT, y, width, fill, tip, mark.modelled and not host)
            start += part.middle
        if mark.parts:
            low, high = (sum(getattr(p, end) for p in mark.parts) for end in ("low", "high"))
            body += _whisker(LABEL + low / top * _PLOT, LABEL + high / top * _PLOT, y + 9)
            body += _text(LABEL + max(start, high) / top * _PLOT + 7, y + 13, mark.text, "value")
        else:
            body += _text(LABEL + 6, y + 13, mark.note, "muted")
    return _svg(body, len(marks) * ROW + 26, name)


def dots(marks: Sequence[Mark], name: str) -> str:
    """A hollow dot for the first part and a filled one for the last, joined, on a logarithmic axis."""
    values = [v for mark in marks for part in mark.parts for v in (part.low, part.high) if v > 0]
    first, last = decades(values)
    ticks = [((d - first) / (last - first), f"1e{d}") for d in range(first, last + 1, 1 + (last - first) // 9)]
    body = _axis(ticks, len(marks))

    def place(value: float) -> float:
        share = (log10(value) - first) / (last - first)
        return LABEL + min(max(share, 0.0), 1.0) * _PLOT

    for number, mark in enumerate(marks):
        body += _label(mark, number)
        y, fill = number * ROW + 17, colour(mark.colour)
        ends = [place(part.middle) for part in mark.parts]
        dash = ' stroke-dasharray="4 3"' if mark.modelled else ""
        body += (
            f'<line x1="{ends[0]:.1f}" x2="{ends[-1]:.1f}" y1="{y}" y2="{y}" stroke="{fill}" stroke-width="2"{dash}/>'
        )
        for part, x in zip(mark.parts, ends, strict=True):
            body += _whisker(place(part.low), place(part.high), y) if part.high > part.low else ""
            hollow = "var(--card)" if x == ends[0] and len(ends) > 1 else fill
            tip = f"{mark.label}: {ratio(part.middle)} ({ratio(part.low)} to {ratio(part.high)}), {part.origin}"
            body += (
                f'<circle cx="{x:.1f}" cy="{y}" r="5.5" fill="{hollow}" stroke="{fill}" stroke-width="2">'
                f"<title>{escape(tip)}</title></circle>"
            )
        body += _text(max(ends) + 12, y + 4, mark.text, "value")
    return _svg(body, len(marks) * ROW + 26, name)


def lines(series: Sequence[tuple[Mark, Sequence[float]]], name: str) -> str:
    """Values by layer on a logarithmic axis; modelled series are dashed."""
    height, left, right = 230, 40, WIDTH - 156
    values = [v for _, row in series for v in row if v > 0]
    first, last = decades(values)
    count = max(len(row) for _, row in series)

    def at(index: int, value: float) -> tuple[float, float]:
        x = left + index / max(count - 1, 1) * (right - left)
        share = (log10(value) - first) / (last - first)
        return x, 10 + (1 - min(max(share, 0.0), 1.0)) * (height - 20)

    body = ""
    for decade in range(first, last + 1):
        y = at(0, 10.0**decade)[1]
        body += f'<line class="grid" x1="{left}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>'
        body += _text(left - 7, y + 4, f"1e{decade}", "tick", "end")
    for index in range(0, count, 1 + count // 13):
        body += _text(at(index, 1)[0], height + 12, "embed" if index == 0 else str(index), "tick", "middle")
    taken: list[float] = []
    for mark, row in sorted(series, key=lambda pair: -pair[1][-1]):
        points = [at(index, value) for index, value in enumerate(row)]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        dash = ' stroke-dasharray="5 4"' if mark.modelled else ""
        body += f'<polyline points="{path}" fill="none" stroke="{colour(mark.colour)}" stroke-width="2.2"{dash}/>'
        for (x, y), value, layer in zip(points, row, range(count), strict=False):
            body += (
                f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour(mark.colour)}"><title>{escape(mark.label)}, '
                f"layer {layer}: {ratio(value)}</title></circle>"
            )
        y = max(points[-1][1] + 4, (taken[-1] + 15) if taken else 0.0)
        taken.append(y)
        body += f'<rect x="{right + 10}" y="{y - 8:.1f}" width="8" height="8" rx="2" fill="{colour(mark.colour)}"/>'
        body += _text(right + 23, y, mark.label, "value")
    return _svg(body, max(height + 20, round(max(taken, default=0)) + 6), name)


def shares(rows: Sequence[tuple[str, int | str, float]], name: str) -> str:
    """Shares of 1 as bars: (label, colour, share)."""
    body = _axis([(i / 4, f"{25 * i}%") for i in range(5)], len(rows))
    for number, (label, fill, share) in enumerate(rows):
        body += _label(Mark(label=label), number)
        y = number * ROW + 8
        body += _bar(LABEL, y, _PLOT, "var(--track)", label, False)
        body += _bar(LABEL, y, share * _PLOT, colour(fill), f"{label}: {percent(share)}", False)
        body += _text(LABEL + _PLOT + 10, y + 13, percent(share), "value")
    return _svg(body, len(rows) * ROW + 26, name)


def nice_step(value: float) -> float:
    """1, 2 or 5 times a power of ten, at least `value`."""
    scale = 10.0 ** math.floor(math.log10(value)) if value > 0 else 1.0
    return next((scale * m for m in (1, 2, 5) if scale * m >= value * 0.999), scale * 10)


def power(exponent: int) -> str:
    """A power of ten: "10⁻⁶"."""
    return "10" + str(exponent).translate(_RAISED)


def decades(values: Sequence[float]) -> tuple[int, int]:
    """Exponents of the powers of ten around all values, two different ones at least."""
    values = [value for value in values if math.isfinite(value)]
    if not values:
        return -8, 0
    first, last = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
    return first, max(last, first + 1)


def log10(value: float) -> float:
    """log10 with a bound for 0, for NaN and for infinity, which a chart draws at its edges."""
    if math.isnan(value) or value == math.inf:
        return 400.0
    return math.log10(value) if value > 0 else -400.0


def _svg(body: str, height: int, name: str) -> str:
    return f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(name)}">{body}</svg>'


def _axis(ticks: Sequence[tuple[float, str]], rows: int) -> str:
    body = ""
    for share, text in ticks:
        x = LABEL + share * _PLOT
        body += f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="0" y2="{rows * ROW}"/>'
        body += _text(x, rows * ROW + 17, text, "tick", "middle")
    return body


def _label(mark: Mark, number: int) -> str:
    return _text(LABEL - 12, number * ROW + 21, shortened(mark.label), "label", "end")


def shortened(label: str) -> str:
    """A label that fits its column, the end kept."""
    return label if len(label) <= 22 else f"…{label[-21:]}"


def _bar(x: float, y: float, width: float, fill: str, tip: str, hatched: bool) -> str:
    shape = f'<rect x="{x:.1f}" y="{y}" width="{max(width, 1.0):.1f}" height="18" rx="2"'
    drawn = f'{shape} fill="{fill}"><title>{escape(tip)}</title></rect>'
    return drawn + (f'{shape} fill="url(#hatch)" pointer-events="none"/>' if hatched else "")


def _whisker(low: float, high: float, y: float) -> str:
    if high - low < 1.5:
        return ""
    return f'<path class="whisker" d="M{low:.1f} {y - 4}V{y + 4}M{low:.1f} {y}H{high:.1f}M{high:.1f} {y - 4}V{y + 4}"/>'


def _text(x: float, y: float, text: str, kind: str, anchor: str = "start") -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'
