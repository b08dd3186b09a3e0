"""Special functions of ATen, in float32, from polynomials and recurrences of vector operations.

Sources: Abramowitz and Stegun 1964, sections 6 (gamma), 9.4 and 9.8 (Bessel; absolute or relative error below 3e-7),
22.3 (Chebyshev); Press et al., Numerical Recipes 1992, section 6.2 (erfc, relative error 1.2e-7); Giles 2010 (inverse
error function in single precision). float64 is not lowered: these formulas do not reach it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ...emitter import Emitter, Number, Value
from ..registry import NotLowered, lowers

aten = torch.ops.aten


def _single(e: Emitter, x: Value) -> Value:
    """In float32; 16-bit floats and integers are widened to it."""
    if x.dtype == torch.float64:
        raise NotLowered("in float64")
    return e.cast(x, torch.float32)


def _polynomial(x: Value, coefficients: Sequence[float]) -> Value:
    """Horner's scheme, the constant first."""
    out = x * coefficients[-1] + coefficients[-2]
    for coefficient in reversed(coefficients[:-2]):
        out = out * x + coefficient
    return out


def _where(e: Emitter, predicate: str, x: Value, bound: Number, yes: Value, no: Value) -> Value:
    return e.one("where", e.one("compare", x, bound, predicate=predicate), yes, no)


def _erfc_scaled(e: Emitter, size: Value) -> Value:
    """exp(x^2) erfc(x) for x >= 0."""
    t = e.one("reciprocal", size * 0.5 + 1.0)
    inner = _polynomial(
        t,
        (
            -1.26551223,
            1.00002368,
            0.37409196,
            0.09678418,
            -0.18628806,
            0.27886807,
            -1.13520398,
            1.48851587,
            -0.82215223,
            0.17087277,
        ),
    )
    return t * e.one("exp", inner)


@lowers(aten.erfc.default)
def erfc(e: Emitter, x: Value) -> Value:
    kind, x = x.dtype, _single(e, x)
    right = _erfc_scaled(e, e.one("abs", x)) * e.one("exp", -(x * x))
    out = _where(e, "lt", x, 0, 2.0 - right, right)
    return e.cast(out, kind) if kind.is_floating_point else out


@lowers(aten.special_erfcx.default)
def erfcx(e: Emitter, x: Value) -> Value:
    x = _single(e, x)
    right = _erfc_scaled(e, e.one("abs", x))
    return _where(e, "lt", x, 0, e.one("exp", x * x) * 2.0 - right, right)


def _inverse_error(e: Emitter, x: Value, w: Value) -> Value:
    """erfinv(x), where w = -log((1 - x)(1 + x))."""
    near = _polynomial(
        w - 2.5,
        (
            1.50140941,
            0.246640727,
            -0.00417768164,
            -0.00125372503,
            0.00021858087,
            -4.39150654e-06,
            -3.5233877e-06,
            3.43273939e-07,
            2.81022636e-08,
        ),
    )
    far = _polynomial(
        e.one("sqrt", e.one("maximum", w, 5.0)) - 3.0,
        (
            2.83297682,
            1.00167406,
            0.00943887047,
            -0.0076224613,
            0.00573950773,
            -0.00367342844,
            0.00134934322,
            0.000100950558,
            -0.000200214257,
        ),
    )
    out = _where(e, "lt", w, 5.0, near, far) * x
    return _where(e, "eq", w, math.inf, x * math.inf, out)


@lowers(aten.erfinv.default)
def erfinv(e: Emitter, x: Value) -> Value:
    x = _single(e, x)
    return _inverse_error(e, x, -e.one("log", (1.0 - x) * (x + 1.0)))


@lowers(aten.special_ndtri.default)
def ndtri(e: Emitter, x: Value) -> Value:
    x = _single(e, x)
    return _inverse_error(e, x * 2.0 - 1.0, -e.one("log", x * (1.0 - x) * 4.0)) * math.sqrt(2)


_SHIFT = 8  # steps of the recurrence before the asymptotic series


def _stirling(e: Emitter, z: Value) -> Value:
    inverse = e.one("reciprocal", z)
    series = _polynomial(inverse * inverse, (1 / 12, -1 / 360, 1 / 1260)) * inverse
    return (z - 0.5) * e.one("log", z) - z + 0.5 * math.log(2 * math.pi) + series


def _sine_of_pi(e: Emitter, x: Value) -> Value:
    """|sin(pi x)|, from what is left of x without its whole part."""
    return e.one("abs", e.one("sin", (x - e.one("round", x)) * math.pi))


@lowers(aten.lgamma.default)
def lgamma(e: Emitter, x: Value) -> Value:
    x = _single(e, x)
    z = _where(e, "lt", x, 0.5, 1.0 - x, x)
    product = z
    for step in range(1, _SHIFT):
        product = product * (z + float(step))
    high = _where(e, "gt", z, 1e3, z, z + float(_SHIFT))
    low = _where(e, "gt", z, 1e3, z * 0.0, e.one("log", product))
    right = _stirling(e, high) - low
    left = math.log(math.pi) - e.one("log", _sine_of_pi(e, x)) - right
    out = _where(e, "lt", x, 0.5, left, right)
    return _where(e, "eq", e.one("abs", x), math.inf, e.one("abs", x), out)


@lowers(aten.digamma.default)
def digamma(e: Emitter, x: Value) -> Value:
    x = _single(e, x)
    z = _where(e, "lt", x, 0.5, 1.0 - x, x)
    shifted = z + float(_SHIFT)
    inverse = e.one("reciprocal", shifted)
    square = inverse * inverse
    out = e.one("log", shifted) - inverse * 0.5 - _polynomial(square, (0.0, 1 / 12, -1 / 120, 1 / 252))
    for step in range(_SHIFT):
        out = out - e.one("reciprocal", z + float(step))
    turn = (x - e.one("round", x)) * math.pi
    left = out - e.one("cos", turn) / e.one("sin", turn) * math.pi
    return _where(e, "lt", x, 0.5, left, out)


def _hurwitz(e: Emitter, s: Value | float, q: Value) -> Value:
    """Sum of (q + k)^-s over k >= 0: 20 terms and Euler and Maclaurin's rest. For whole s also where q > -10."""

    def power(base: Value, less: float) -> Value:
        exponent = -(s + less) if isinstance(s, Value) else float(-(s + less))
        return e.one("pow", base, exponent)

    out = power(q, 0.0)
    for step in range(1, 20):
        out = out + power(q + float(step), 0.0)
    end = q + 20.0
    lowered = s - 1.0
    out = out + power(end, -1.0) / lowered + power(end, 0.0) * 0.5
    rising: Any = s
    for order, (number, factorial) in enumerate(((1 / 6, 2.0), (-1 / 30, 24.0), (1 / 42, 720.0))):
        out = out + power(end, 2.0 * order + 1) * rising * (number / factorial)
        rising = rising * (s + (2.0 * order + 1)) * (s + (2.0 * order + 2))
    return out


@lowers(aten.special_zeta.default)
def zeta(e: Emitter, s: Value, q: Value) -> Value:
    s, q = _single(e, s), _single(e, q)
    out = _hurwitz(e, s, q)
    nothing = e.one("fill", shape=(), scalar=math.nan, dtype="float32")
    infinite = e.one("fill", shape=(), scalar=math.inf, dtype="float32")
    whole = e.one("and", e.one("compare", q, 0, predicate="le"), e.one("compare", q, e.one("floor", q), predicate="eq"))
    broken = e.one("compare", s, e.one("floor", s), predicate="ne")
    broken = e.one("and", broken, e.one("compare", q, 0, predicate="le"))
    out = e.one("where", whole, infinite, e.one("where", broken, nothing, out))
    return _where(e, "eq", s, 1, infinite, _where(e, "lt", s, 1, nothing, out))


@lowers(aten.polygamma.default)
def polygamma(e: Emitter, order: int, x: Value) -> Value:
    if order == 0:
        return digamma(e, x)
    if order > 8:
        raise NotLowered("of an order above 8")
    return _hurwitz(e, float(order + 1), _single(e, x)) * float((-1) ** (order + 1) * math.factorial(order))


def _i(e: Emitter, order: int, x: Value) -> tuple[Value, Value]:
    """Modified Bessel I of order 0 or 1 of |x|, plain and times exp(-|x|)."""
    size = e.one("abs", x)
    inner, outer = (
        (
            (1.0, 3.5156229, 3.0899424, 1.2067492, 0.2659732, 0.0360768, 0.0045813),
            (
                0.39894228,
                0.01328592,
                0.00225319,
                -0.00157565,
                0.00916281,
                -0.02057706,
                0.02635537,
                -0.01647633,
                0.00392377,
            ),
        ),
        (
            (0.5, 0.87890594, 0.51498869, 0.15084934, 0.02658733, 0.00301532, 0.00032411),
            (
                0.39894228,
                -0.03988024,
                -0.00362018,
                0.00163801,
                -0.01031555,
                0.02282967,
                -0.02895312,
                0.01787654,
                -0.00420059,
            ),
        ),
    )[order]
    ratio = e.one("minimum", size, 3.75) / 3.75
    small = _polynomial(ratio * ratio, inner)
    small = small * e.one("minimum", size, 3.75) if order else small
    large = e.one("maximum", size, 3.75)
    scaled = _polynomial(e.one("reciprocal", large / 3.75), outer) * e.one("rsqrt", large)
    plain = _where(e, "lt", size, 3.75, small, scaled * e.one("exp", large))
    shrunk = _where(e, "lt", size, 3.75, small * e.one("exp", -size), scaled)
    return plain, shrunk


def _odd(e: Emitter, x: Value, of_size: Value) -> Value:
    return _where(e, "lt", x, 0, -of_size, of_size)


@lowers(aten.i0.default, aten.special_modified_bessel_i0.default)
def i0(e: Emitter, x: Value) -> Value:
    return _i(e, 0, _single(e, x))[0]


@lowers(aten.special_i0e.default)
def i0e(e: Emitter, x: Value) -> Value:
    return _i(e, 0, _single(e, x))[1]


@lowers(aten.special_i1.default, aten.special_modified_bessel_i1.default)
def i1(e: Emitter, x: Value) -> Value:
    x = _single(e, x)
    return _odd(e, x, _i(e, 1, x)[0])


@lowers(aten.special_i1e.default)
def i1e(e: Emitter, x: Value) -> Value:
    x = _single(e, x)
    return _odd(e, x, _i(e, 1, x)[1])


def _k(e: Emitter, order: int, x: Value, scaled: bool) -> Value:
    """Modified Bessel K of order 0 or 1 for x > 0."""
    inner, outer = (
        (
            (-0.57721566, 0.42278420, 0.23069756, 0.03488590, 0.00262698, 0.00010750, 0.00000740),
            (1.25331414, -0.07832358, 0.02189568, -0.01062446, 0.00587872, -0.00251540, 0.00053208),
        ),
        (
            (1.0, 0.15443144, -0.67278579, -0.18156897, -0.01919402, -0.00110404, -0.00004686),
            (1.25331414, 0.23498619, -0.03655620, 0.01504268, -0.00780353, 0.00325614, -0.00068245),
        ),
    )[order]
    near, far = e.one("minimum", x, 2.0), e.one("maximum", x, 2.0)
    half = near * 0.5
    product = e.one("log", half) * _i(e, order, near)[0]
    small = _polynomial(half * half, inner)
    small = small / near + product if order else small - product
    large = _polynomial(2.0 * e.one("reciprocal", far), outer) * e.one("rsqrt", far)
    if scaled:
        return _where(e, "le", x, 2.0, small * e.one("exp", near), large)
    return _where(e, "le", x, 2.0, small, large * e.one("exp", -far))


_J = (
    (
        (1.0, -2.2499997, 1.2656208, -0.3163866, 0.0444479, -0.0039444, 0.0002100),
        (0.36746691, 0.60559366, -0.74350384, 0.25300117, -0.04261214, 0.00427916, -0.00024846),
        (0.79788456, -0.00000077, -0.00552740, -0.00009512, 0.00137237, -0.00072805, 0.00014476),
        (-0.78539816, -0.04166397, -0.00003954, 0.00262573, -0.00054125, -0.00029333, 0.00013558),
    ),
    (
        (0.5, -0.56249985, 0.21093573, -0.03954289, 0.00443319, -0.00031761, 0.00001109),
        (-0.6366198, 0.2212091, 2.1682709, -1.3164827, 0.3123951, -0.0400976, 0.0027873),
        (0.79788456, 0.00000156, 0.01659667, 0.00017105, -0.00249511, 0.00113653, -0.00020033),
        (-2.35619449, 0.12499612, 0.00005650, -0.00637879, 0.00074348, 0.00079824, -0.00029166),
    ),
)


def _j(e: Emitter, order: int, x: Value, second: bool) -> Value:
    """Bessel J, or Y (`second`), of order 0 or 1: a polynomial up to 3, a damped wave beyond."""
    inner, other, size, phase = _J[order]
    absolute = e.one("abs", x)
    near, far = e.one("minimum", absolute, 3.0), e.one("maximum", absolute, 3.0)
    square = near * near / 9.0
    small = _polynomial(square, inner)
    small = small * near if order else small
    if second:
        rest = _polynomial(square, other)
        small = e.one("log", near * 0.5) * small * (2 / math.pi) + (rest / near if order else rest)
    t = e.one("reciprocal", far) * 3.0
    angle = far + _polynomial(t, phase)
    large = _polynomial(t, size) * e.one("rsqrt", far) * e.one("sin" if second else "cos", angle)
    out = _where(e, "le", absolute, 3.0, small, large)
    if second:
        return _where(e, "lt", x, 0, x * math.nan, out)
    return _odd(e, x, out) if order else out


def _register_bessel() -> None:
    def bessel(order: int, second: bool) -> Callable[..., Value]:
        return lambda e, x: _j(e, order, _single(e, x), second)

    def modified(order: int, scaled: bool) -> Callable[..., Value]:
        return lambda e, x: _k(e, order, _single(e, x), scaled)

    for order in (0, 1):
        lowers(getattr(aten, f"special_bessel_j{order}").default)(bessel(order, False))
        lowers(getattr(aten, f"special_bessel_y{order}").default)(bessel(order, True))
        lowers(getattr(aten, f"special_modified_bessel_k{order}").default)(modified(order, False))
        lowers(getattr(aten, f"special_scaled_modified_bessel_k{order}").default)(modified(order, True))


_register_bessel()


@lowers(aten.special_spherical_bessel_j0.default)
def spherical_j0(e: Emitter, x: Value) -> Value:
    x = _single(e, x)
    series = _polynomial(x * x, (1.0, -1 / 6, 1 / 120, -1 / 5040))
    return _where(e, "lt", e.one("abs", x), 0.5, series, e.one("sin", x) / x)
