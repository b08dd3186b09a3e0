"""Chebyshev polynomials of all four kinds, plain and shifted, by their trigonometric forms (Abramowitz and Stegun
22.3).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ...emitter import Emitter, Value
from ..registry import NotLowered, lowers

aten = torch.ops.aten


def _chebyshev(e: Emitter, kind: str, x: Value, degree: Value) -> Value:
    """With x = cos(a) inside [-1, 1], and |x| = cosh(a) outside, where the sign of x comes back by the degree.

    Degrees are whole numbers; those below 0 give 0.
    """
    if x.dtype == torch.float64 or degree.dtype == torch.float64:
        raise NotLowered("in float64")
    x, n = e.cast(x, torch.float32), e.one("trunc", e.cast(degree, torch.float32))
    size = e.one("abs", x)
    inside = e.one("acos", e.one("maximum", e.one("minimum", x, 1.0), -1.0))
    outside = e.one("acosh", e.one("maximum", size, 1.0))
    wave = _inside(e, kind, n, inside)
    grown = _outside(e, kind, n, outside, x)
    out = e.one("where", e.one("compare", size, 1, predicate="lt"), wave, grown)
    return e.one("where", e.one("compare", n, 0, predicate="lt"), out * 0.0, out)


def _inside(e: Emitter, kind: str, n: Value, angle: Value) -> Value:
    def ratio(function: str, multiple: Value, divisor: float) -> Value:
        return e.one(function, multiple * angle) / e.one(function, angle * divisor)

    if kind == "t":
        return e.one("cos", n * angle)
    if kind == "u":
        return ratio("sin", n + 1.0, 1.0)
    return ratio("cos" if kind == "v" else "sin", n + 0.5, 0.5)


def _outside(e: Emitter, kind: str, n: Value, rate: Value, x: Value) -> Value:
    """Where sinh(0) / sinh(0) would come up, at |x| = 1, its limit: the multiple over the divisor."""

    def ratio(multiple: Value, divisor: float) -> Value:
        below = e.one("sinh", rate * divisor)
        flat = e.one("compare", below, 0, predicate="eq")
        safe = e.one("where", flat, below + 1.0, below)
        return e.one("where", flat, multiple / divisor, e.one("sinh", multiple * rate) / safe)

    def even(multiple: Value, divisor: float) -> Value:
        return e.one("cosh", multiple * rate) / e.one("cosh", rate * divisor)

    odd = e.one("compare", e.one("remainder", n, 2.0), 1, predicate="eq")
    negative = e.one("compare", x, 0, predicate="lt")
    if kind == "t":
        right = left = e.one("cosh", n * rate)
    elif kind == "u":
        right = left = ratio(n + 1.0, 1.0)
    else:
        grown, flat = ratio(n + 0.5, 0.5), even(n + 0.5, 0.5)
        right, left = (flat, grown) if kind == "v" else (grown, flat)
    out = e.one("where", negative, left, right)
    return e.one("where", e.one("and", odd, negative), -out, out)


def _register() -> None:
    def plain(kind: str) -> Callable[..., Any]:
        return lambda e, x, n: _chebyshev(e, kind, x, n)

    def shifted(kind: str) -> Callable[..., Any]:
        return lambda e, x, n: _chebyshev(e, kind, x * 2.0 - 1.0, n)

    for kind in "tuvw":
        lowers(getattr(aten, f"special_chebyshev_polynomial_{kind}").default)(plain(kind))
        lowers(getattr(aten, f"special_shifted_chebyshev_polynomial_{kind}").default)(shifted(kind))


_register()
