"""ATen's functions of each element, as vector operations."""

from __future__ import annotations

import math
from typing import Any

import torch

from ...emitter import Emitter, Number, Value
from ..registry import lowers

aten, prims = torch.ops.aten, torch.ops.prims

_UNARY = {
    "neg": aten.neg,
    "abs": aten.abs,
    "sign": aten.sign,
    "floor": aten.floor,
    "ceil": aten.ceil,
    "round": aten.round,
    "trunc": aten.trunc,
    "not": aten.bitwise_not,
    "reciprocal": aten.reciprocal,
    "sqrt": aten.sqrt,
    "rsqrt": aten.rsqrt,
    "exp": aten.exp,
    "expm1": aten.expm1,
    "log": aten.log,
    "log1p": aten.log1p,
    "sin": aten.sin,
    "cos": aten.cos,
    "asin": aten.asin,
    "acos": aten.acos,
    "atan": aten.atan,
    "sinh": aten.sinh,
    "cosh": aten.cosh,
    "tanh": aten.tanh,
    "asinh": aten.asinh,
    "acosh": aten.acosh,
    "atanh": aten.atanh,
    "erf": aten.erf,
    "sigmoid": aten.sigmoid,
}
_BINARY = {
    "mul": [aten.mul.Tensor, aten.mul.Scalar],
    "div": [aten.div.Tensor, aten.div.Scalar],
    "atan2": [aten.atan2.default],
    "fmod": [aten.fmod.Tensor, aten.fmod.Scalar],
    "remainder": [aten.remainder.Tensor, aten.remainder.Scalar, aten.remainder.Scalar_Tensor],
    "floor_divide": [aten.floor_divide.default],
    "maximum": [aten.maximum.default],
    "minimum": [aten.minimum.default],
    "and": [aten.bitwise_and.Tensor, aten.bitwise_and.Scalar, aten.bitwise_and.Scalar_Tensor],
    "or": [aten.bitwise_or.Tensor, aten.bitwise_or.Scalar, aten.bitwise_or.Scalar_Tensor],
    "xor": [aten.bitwise_xor.Tensor, aten.bitwise_xor.Scalar, aten.bitwise_xor.Scalar_Tensor],
    "shift_left": [aten.bitwise_left_shift.Tensor, aten.bitwise_left_shift.Tensor_Scalar],
    "shift_right": [aten.bitwise_right_shift.Tensor, aten.bitwise_right_shift.Tensor_Scalar],
}


def _register_tables() -> None:
    def unary(opcode: str) -> Any:
        return lambda e, x: e.one(opcode, x)

    def binary(opcode: str) -> Any:
        return lambda e, a, b: e.one(opcode, a, b)

    def comparison(predicate: str) -> Any:
        return lambda e, a, b: e.one("compare", a, b, predicate=predicate)

    for opcode, packet in _UNARY.items():
        lowers(packet.default)(unary(opcode))
    for opcode, overloads in _BINARY.items():
        lowers(*overloads)(binary(opcode))
    for predicate in ("eq", "ne", "lt", "le", "gt", "ge"):
        packet = getattr(aten, predicate)
        lowers(packet.Tensor, packet.Scalar)(comparison(predicate))


_register_tables()


@lowers(aten.add.Tensor, aten.add.Scalar)
def add(e: Emitter, a: Value | Number, b: Value | Number, alpha: Number = 1) -> Value:
    return e.one("add", a, b if alpha == 1 else b * alpha)


@lowers(aten.sub.Tensor, aten.sub.Scalar)
def sub(e: Emitter, a: Value | Number, b: Value | Number, alpha: Number = 1) -> Value:
    return e.one("sub", a, b if alpha == 1 else b * alpha)


@lowers(aten.rsub.Tensor, aten.rsub.Scalar)
def rsub(e: Emitter, a: Value | Number, b: Value | Number, alpha: Number = 1) -> Value:
    return sub(e, b, a, alpha)


@lowers(aten.div.Tensor_mode, aten.div.Scalar_mode)
def div_mode(e: Emitter, a: Value, b: Value | Number, rounding_mode: str | None = None) -> Value:
    if rounding_mode is None:
        return e.one("div", a, b)
    if rounding_mode == "floor":
        return e.one("floor_divide", a, b)
    kind = torch.result_type(a.tensor, b.tensor if isinstance(b, Value) else b)
    if kind.is_floating_point:
        return e.one("trunc", e.one("div", a, b))
    return e.one("floor_divide", e.one("sub", a, e.one("fmod", a, b)), b)  # an exact multiple: no rounding is left


@lowers(aten.pow.Tensor_Tensor, aten.pow.Scalar)
def pow_tensor(e: Emitter, a: Value | Number, b: Value) -> Value:
    return e.one("pow", a, b)


@lowers(aten.pow.Tensor_Scalar)
def pow_scalar(e: Emitter, x: Value, exponent: Number) -> Value:
    """Small powers as products, roots as roots."""
    if exponent == 2:
        return x * x
    if exponent == 3:
        return x * x * x
    cheap = {0.5: "sqrt", -0.5: "rsqrt", -1: "reciprocal"}.get(exponent)
    return e.one(cheap, x) if cheap and x.dtype.is_floating_point else e.one("pow", x, exponent)


@lowers(aten.exp2.default)
def exp2(e: Emitter, x: Value) -> Value:
    return e.one("pow", 2.0, x)


@lowers(aten.log2.default)
def log2(e: Emitter, x: Value) -> Value:
    return e.one("log", x) * (1 / math.log(2))


@lowers(aten.log10.default)
def log10(e: Emitter, x: Value) -> Value:
    return e.one("log", x) * (1 / math.log(10))


@lowers(aten.tan.default)
def tan(e: Emitter, x: Value) -> Value:
    return e.one("sin", x) / e.one("cos", x)


def is_true(e: Emitter, x: Value) -> Value:
    return x if x.dtype == torch.bool else e.one("compare", x, 0, predicate="ne")


@lowers(aten.logical_not.default)
def logical_not(e: Emitter, x: Value) -> Value:
    return e.one("not", x) if x.dtype == torch.bool else e.one("compare", x, 0, predicate="eq")


@lowers(aten.logical_and.default)
def logical_and(e: Emitter, a: Value, b: Value) -> Value:
    return e.one("and", is_true(e, a), is_true(e, b))


@lowers(aten.logical_or.default)
def logical_or(e: Emitter, a: Value, b: Value) -> Value:
    return e.one("or", is_true(e, a), is_true(e, b))


@lowers(aten.logical_xor.default)
def logical_xor(e: Emitter, a: Value, b: Value) -> Value:
    return e.one("xor", is_true(e, a), is_true(e, b))


@lowers(aten.isnan.default)
def isnan(e: Emitter, x: Value) -> Value:
    return e.one("compare", x, x, predicate="ne")


@lowers(aten.isinf.default)
def isinf(e: Emitter, x: Value) -> Value:
    if not x.dtype.is_floating_point:
        return e.one("fill", shape=x.shape, scalar=False, dtype="bool")
    return e.one("compare", e.one("abs", x), math.inf, predicate="eq")


@lowers(aten.signbit.default)
def signbit(e: Emitter, x: Value) -> Value:
    """The sign of 1/x tells -0.0 from 0.0; nothing tells a negative not-a-number, which torch reports by its bit."""
    below = e.one("compare", x, 0, predicate="lt")
    if not x.dtype.is_floating_point:
        return below
    return e.one("or", below, e.one("compare", e.one("reciprocal", x), -math.inf, predicate="eq"))


@lowers(aten.copysign.Tensor, aten.copysign.Scalar)
def copysign(e: Emitter, x: Value, sign: Value | Number) -> Value:
    size = e.one("abs", x)
    if isinstance(sign, Value):
        return e.one("where", signbit(e, sign), -size, size)
    return -size if math.copysign(1, sign) < 0 else size


@lowers(aten.clamp.default, aten.clamp.Tensor, aten.clamp_min.default, aten.clamp_min.Tensor, aten.hardtanh.default)
def clamp(e: Emitter, x: Value, low: Any = None, high: Any = None) -> Value:
    x = x if low is None else e.one("maximum", x, low)
    return x if high is None else e.one("minimum", x, high)


@lowers(aten.clamp_max.default, aten.clamp_max.Tensor)
def clamp_max(e: Emitter, x: Value, high: Any) -> Value:
    return e.one("minimum", x, high)


@lowers(aten.fmax.default)
def fmax(e: Emitter, a: Value, b: Value) -> Value:
    """The larger; the other one where one is not a number."""
    return e.one("where", isnan(e, a), b, e.one("where", isnan(e, b), a, e.one("maximum", a, b)))


@lowers(aten.fmin.default)
def fmin(e: Emitter, a: Value, b: Value) -> Value:
    """The smaller; the other one where one is not a number."""
    return e.one("where", isnan(e, a), b, e.one("where", isnan(e, b), a, e.one("minimum", a, b)))


@lowers(aten.hypot.default)
def hypot(e: Emitter, a: Value, b: Value) -> Value:
    """Larger times sqrt(1 + (smaller / larger)^2): no square overflows."""
    a, b = e.one("abs", a), e.one("abs", b)
    large, small = e.one("maximum", a, b), e.one("minimum", a, b)
    ratio = small / e.one("where", e.one("compare", large, 0, predicate="eq"), large + 1, large)
    return large * e.one("sqrt", ratio * ratio + 1.0)


@lowers(aten.where.self)
def where(e: Emitter, condition: Value, a: Value, b: Value) -> Value:
    return e.one("where", condition, a, b)


@lowers(aten.relu.default)
def relu(e: Emitter, x: Value) -> Value:
    return e.one("maximum", x, 0)


@lowers(aten.gelu.default)
def gelu(e: Emitter, x: Value, approximate: str = "none") -> Value:
    """x times the normal distribution's Phi(x), by erf or by the tanh formula of Hendrycks and Gimpel 2016."""
    kind, x = x.dtype, widen(e, x)
    if approximate == "tanh":
        inner = (x + x * x * x * 0.044715) * math.sqrt(2 / math.pi)
        return e.cast(x * 0.5 * (e.one("tanh", inner) + 1.0), kind)
    return e.cast(x * 0.5 * (e.one("erf", x * math.sqrt(0.5)) + 1.0), kind)


@lowers(aten.silu.default)
def silu(e: Emitter, x: Value) -> Value:
    kind, x = x.dtype, widen(e, x)
    return e.cast(x * e.one("sigmoid", x), kind)


@lowers(aten.elu.default)
def elu(e: Emitter, x: Value, alpha: Number = 1, scale: Number = 1, input_scale: Number = 1) -> Value:
    low = e.one("expm1", e.one("minimum", x, 0) * input_scale) * (alpha * scale)
    return e.one("where", e.one("compare", x, 0, predicate="gt"), x * scale, low)


@lowers(aten.leaky_relu.default)
def leaky_relu(e: Emitter, x: Value, slope: Number = 0.01) -> Value:
    return e.one("where", e.one("compare", x, 0, predicate="gt"), x, x * slope)


def widen(e: Emitter, x: Value) -> Value:
    """16-bit floats in float32, as torch computes functions of several steps."""
    return e.cast(x, torch.float32) if x.dtype in (torch.float16, torch.bfloat16) else x


@lowers(aten.ldexp.Tensor)
def ldexp(e: Emitter, x: Value, exponent: Value) -> Value:
    return x * e.one("pow", 2.0, exponent)


@lowers(aten.frexp.Tensor)
def frexp(e: Emitter, x: Value) -> tuple[Value, Value]:
    """x = mantissa 2^exponent with 0.5 <= |mantissa| < 1. The logarithm may be one off, which the mantissa then
    shows.
    """
    size = e.one("abs", x)
    special = e.one("or", e.one("compare", size, 0, predicate="eq"), e.one("not", _is_finite(e, size)))
    safe = e.one("where", special, e.one("fill", shape=(), scalar=0.5, dtype=str(x.dtype).removeprefix("torch.")), size)
    exponent = e.one("floor", log2(e, safe)) + 1
    mantissa = safe / e.one("pow", 2.0, exponent)
    high = e.cast(e.one("compare", mantissa, 1, predicate="ge"), x.dtype)
    low = e.cast(e.one("compare", mantissa, 0.5, predicate="lt"), x.dtype)
    exponent = exponent + high - low
    mantissa = mantissa * (1.0 - high * 0.5) * (low + 1.0)
    signed = e.one("where", e.one("compare", x, 0, predicate="lt"), -mantissa, mantissa)
    zero = e.one("fill", shape=(), scalar=0, dtype=str(x.dtype).removeprefix("torch."))
    return e.one("where", special, x, signed), e.cast(e.one("where", special, zero, exponent), torch.int32)


def _is_finite(e: Emitter, size: Value) -> Value:
    return e.one("compare", size, math.inf, predicate="lt")


@lowers(aten.round.decimals)
def round_decimals(e: Emitter, x: Value, *, decimals: int) -> Value:
    if decimals == 0:
        return e.one("round", x)
    scale = 10.0 ** abs(decimals)
    return e.one("round", x * scale) / scale if decimals > 0 else e.one("round", x / scale) * scale


@lowers(aten.angle.default)
def angle(e: Emitter, x: Value) -> Value:
    """Of real numbers: 0, or pi for negative ones."""
    x = x if x.dtype.is_floating_point else e.cast(x, torch.float32)
    below = e.cast(e.one("compare", x, 0, predicate="lt"), x.dtype)
    return e.one("where", isnan(e, x), x, below * math.pi)
