"""Logarithmic axes: where values lie, which powers of ten are marked, and which empty stretches are cut short."""

from __future__ import annotations

import math
from collections.abc import Sequence

_RAISED = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
#: Length of an axis that stands for three or more empty decades, in decades.
_GAP = 0.5


class Scale:
    """A logarithmic axis between two places of a drawing. Runs of three or more decades without a value are cut short.

    Args:
        values: all that has to have a place; those that are 0 or not finite lie on the edge.
        start, end: where the axis begins and ends; `end` may lie before `start`.

    Attributes:
        ticks: (exponent, place) of the powers of ten. minor: places of their doubles and fives. gaps: (from, to) of
            what is cut.
    """

    def __init__(self, values: Sequence[float], start: float, end: float) -> None:
        first, last = decades([value for value in values if value > 0])
        held = {math.floor(log10(value)) for value in values if 0 < value < math.inf}
        lengths: list[tuple[int, int, float]] = []  # (first exponent, last exponent, length in decades)
        for cell in range(first, last):
            if cell in held or not lengths or lengths[-1][0] in held:
                lengths.append((cell, cell + 1, 1.0))
            else:
                begin = lengths.pop()[0]
                lengths.append((begin, cell + 1, float(cell + 1 - begin)))
        lengths = [(low, high, _GAP if high - low >= 3 else size) for low, high, size in lengths]
        unit = (end - start) / sum(size for _, _, size in lengths)
        self._pieces: list[tuple[int, int, float, float]] = []
        self.ticks: list[tuple[int, float]] = [(first, start)]
        self.minor: list[float] = []
        self.gaps: list[tuple[float, float]] = []
        place = start
        for low, high, size in lengths:
            after = place + size * unit
            self._pieces.append((low, high, place, after))
            whole = high - low == size
            self.ticks += [(low + step, place + step * unit) for step in range(1, high - low)] if whole else []
            self.ticks.append((high, after))
            self.minor += [place + math.log10(step) * unit for step in (2, 5)] if size == 1.0 else []
            self.gaps += [] if whole else [(place, after)]
            place = after

    def place(self, value: float) -> float:
        """Where a value lies."""
        exponent = log10(value)
        for low, high, begin, end in self._pieces:
            if exponent <= high:
                return begin + min(max((exponent - low) / (high - low), 0.0), 1.0) * (end - begin)
        return self._pieces[-1][3]

    def spaced(self, room: float) -> list[tuple[int, float]]:
        """The ticks that are at least `room` from the one before."""
        chosen: list[tuple[int, float]] = []
        for exponent, place in self.ticks:
            if not chosen or abs(place - chosen[-1][1]) >= room:
                chosen.append((exponent, place))
        return chosen


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


def nice_step(value: float) -> float:
    """1, 2 or 5 times a power of ten, at least `value`."""
    scale = 10.0 ** math.floor(math.log10(value)) if value > 0 else 1.0
    return next((scale * m for m in (1, 2, 5) if scale * m >= value * 0.999), scale * 10)
