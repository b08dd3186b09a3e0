"""What was learned, as an SVG picture."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

_ROW, _LEFT, _WIDTH = 26, 230, 420


def learned_factors(arms: Mapping[str, tuple[float, float]], totals: Mapping[str, Sequence[float]]) -> str:
    """Bars of each arm's learned factor on its estimate, on a logarithmic scale around 1.

    Args:
        arms: name -> (calls, log of the factor). totals: device -> (calls, seconds, regret, ...).
    """
    rows = sorted((name, *row) for name, row in arms.items())
    reach = max([abs(row[2]) for row in rows] + [math.log(2)])
    middle, scale = _LEFT + _WIDTH / 2, _WIDTH / 2 / reach
    height = _ROW * (len(rows) + 3)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_LEFT + _WIDTH + 90}" height="{height}" '
        f'font-family="sans-serif" font-size="13"><rect width="100%" height="100%" fill="white"/>',
        '<text x="10" y="20" font-weight="bold">Measured time over the device\'s own estimate</text>',
        f'<line x1="{middle}" y1="30" x2="{middle}" y2="{height - 25}" stroke="#888"/>',
        f'<text x="{middle}" y="{height - 8}" text-anchor="middle">as estimated</text>',
    ]
    for number, (name, calls, value) in enumerate(rows):
        y, width = 36 + _ROW * number, abs(value) * scale
        x = middle if value >= 0 else middle - width
        colour = "#c0504d" if value >= 0 else "#4f81bd"
        seconds = totals.get(name, [0, 0.0])[1]
        parts.append(
            f'<text x="10" y="{y + 14}">{escape(name)}</text>'
            f'<rect x="{x:.1f}" y="{y}" width="{max(width, 1):.1f}" height="18" fill="{colour}"/>'
            f'<text x="{_LEFT + _WIDTH + 6}" y="{y + 14}">x{math.exp(value):.2f}</text>'
            f"<title>{escape(name)}: {calls:.0f} calls count, {seconds:.3g} s served</title>"
        )
    return "".join([*parts, "</svg>\n"])
