"""ATen's reductions, norms and softmax, as vector operations."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeAlias

import torch

from ...emitter import Emitter, Number, Value
from ..registry import NotLowered, lowers
from .elementwise import is_true, widen

aten = torch.ops.aten
Axes: TypeAlias = int | Sequence[int] | None


def axes_of(x: Value, axes: Axes) -> tuple[int, ...]:
    """Axes as numbers from 0; all where none or an empty list is given."""
    if axes is None or (not isinstance(axes, int) and len(axes) == 0):
        return tuple(range(x.ndim))
    return tuple(axis % max(x.ndim, 1) for axis in ([axes] if isinstance(axes, int) else axes)) if x.ndim else ()


def accumulator(dtype: torch.dtype, wanted: torch.dtype | None) -> torch.dtype:
    """What sums and products are kept in: integers in int64."""
    return wanted or (dtype if dtype.is_floating_point else torch.int64)


@lowers(aten.sum.dim_IntList)
def sum_axes(e: Emitter, x: Value, axes: Axes, keepdim: bool = False, *, dtype: torch.dtype | None = None) -> Value:
    x = e.cast(x, accumulator(x.dtype, dtype))
    return e.sum(x, axes_of(x, axes), keepdim) if x.ndim else e.copy(x)


@lowers(aten.sum.default)
def sum_all(e: Emitter, x: Value, *, dtype: torch.dtype | None = None) -> Value:
    return sum_axes(e, x, None, dtype=dtype)


@lowers(aten.mean.dim)
def mean_axes(e: Emitter, x: Value, axes: Axes, keepdim: bool = False, *, dtype: torch.dtype | None = None) -> Value:
    kind = dtype or x.dtype
    x = widen(e, e.cast(x, dtype))
    return e.cast(e.mean(x, axes_of(x, axes), keepdim), kind)


@lowers(aten.mean.default)
def mean_all(e: Emitter, x: Value, *, dtype: torch.dtype | None = None) -> Value:
    return mean_axes(e, x, None, dtype=dtype)


@lowers(aten.prod.dim_int)
def prod_axis(e: Emitter, x: Value, axis: int, keepdim: bool = False, *, dtype: torch.dtype | None = None) -> Value:
    x = e.cast(x, accumulator(x.dtype, dtype))
    return e.one("prod", x, axis=axis % x.ndim, keepdims=keepdim) if x.ndim else e.copy(x)


@lowers(aten.prod.default)
def prod_all(e: Emitter, x: Value, *, dtype: torch.dtype | None = None) -> Value:
    return prod_axis(e, e.reshape(x, (x.tensor.numel(),)), 0, dtype=dtype)


def _extreme(e: Emitter, opcode: str, x: Value, axes: Axes, keepdim: bool) -> Value:
    return e.one(opcode, x, axes=axes_of(x, axes), keepdims=keepdim) if x.ndim else e.copy(x)


@lowers(aten.amax.default)
def amax(e: Emitter, x: Value, axes: Axes = (), keepdim: bool = False) -> Value:
    return _extreme(e, "reduce_max", x, axes, keepdim)


@lowers(aten.amin.default)
def amin(e: Emitter, x: Value, axes: Axes = (), keepdim: bool = False) -> Value:
    return _extreme(e, "reduce_min", x, axes, keepdim)


@lowers(aten.max.default)
def max_all(e: Emitter, x: Value) -> Value:
    return _extreme(e, "reduce_max", x, None, False)


@lowers(aten.min.default)
def min_all(e: Emitter, x: Value) -> Value:
    return _extreme(e, "reduce_min", x, None, False)


def _extreme_with_place(e: Emitter, opcode: str, x: Value, axis: int, keepdim: bool) -> tuple[Value, Value]:
    if x.ndim == 0:
        return e.copy(x), e.one("fill", shape=(), scalar=0, dtype="int64")
    axis %= x.ndim
    place = e.one(opcode, x, axis=axis, keepdims=True)
    values = e.one("gather", x, place, axis=axis)
    if keepdim:
        return values, place
    shape = x.shape[:axis] + x.shape[axis + 1 :]
    return e.reshape(values, shape), e.reshape(place, shape)


@lowers(aten.max.dim)
def max_axis(e: Emitter, x: Value, axis: int, keepdim: bool = False) -> tuple[Value, Value]:
    return _extreme_with_place(e, "argmax", x, axis, keepdim)


@lowers(aten.min.dim)
def min_axis(e: Emitter, x: Value, axis: int, keepdim: bool = False) -> tuple[Value, Value]:
    return _extreme_with_place(e, "argmin", x, axis, keepdim)


def _place(e: Emitter, opcode: str, x: Value, axis: int | None, keepdim: bool) -> Value:
    if axis is None:
        place = e.one(opcode, e.reshape(x, (x.tensor.numel(),)), axis=0)
        return e.reshape(place, (1,) * x.ndim) if keepdim else place
    if x.ndim == 0:
        return e.one("fill", shape=(), scalar=0, dtype="int64")
    return e.one(opcode, x, axis=axis % x.ndim, keepdims=keepdim)


@lowers(aten.argmax.default)
def argmax(e: Emitter, x: Value, axis: int | None = None, keepdim: bool = False) -> Value:
    return _place(e, "argmax", x, axis, keepdim)


@lowers(aten.argmin.default)
def argmin(e: Emitter, x: Value, axis: int | None = None, keepdim: bool = False) -> Value:
    return _place(e, "argmin", x, axis, keepdim)


@lowers(aten.any.default, aten.any.dim, aten.any.dims)
def any_axes(e: Emitter, x: Value, axes: Axes = None, keepdim: bool = False) -> Value:
    return _truth(e, "reduce_max", x, axes, keepdim)


@lowers(aten.all.default, aten.all.dim, aten.all.dims)
def all_axes(e: Emitter, x: Value, axes: Axes = None, keepdim: bool = False) -> Value:
    return _truth(e, "reduce_min", x, axes, keepdim)


def _truth(e: Emitter, opcode: str, x: Value, axes: Axes, keepdim: bool) -> Value:
    truth = is_true(e, x)
    out = _extreme(e, opcode, truth, axes, keepdim)
    return e.cast(out, torch.uint8) if x.dtype == torch.uint8 else out


def moment(e: Emitter, x: Value, axes: tuple[int, ...], correction: Number, keepdim: bool) -> tuple[Value, Value]:
    """(variance, mean): the mean of squared distances from the mean, divided by count - correction."""
    mean = e.mean(x, axes, keepdims=True)
    away = x - mean
    count = math.prod(x.shape[axis] for axis in axes)
    total = e.sum(away * away, axes, keepdim)
    below = max(0.0, count - correction)
    variance = total / float(below)
    return variance, mean if keepdim else e.reshape(mean, variance.shape)


@lowers(aten.var.correction)
def var(e: Emitter, x: Value, axes: Axes = None, *, correction: Number | None = None, keepdim: bool = False) -> Value:
    return var_mean(e, x, axes, correction=correction, keepdim=keepdim)[0]


@lowers(aten.var_mean.correction)
def var_mean(
    e: Emitter, x: Value, axes: Axes = None, *, correction: Number | None = None, keepdim: bool = False
) -> tuple[Value, Value]:
    if x.ndim == 0:
        raise NotLowered("of a single number")
    variance, mean = moment(e, widen(e, x), axes_of(x, axes), 1 if correction is None else correction, keepdim)
    return e.cast(variance, x.dtype), e.cast(mean, x.dtype)


@lowers(aten._softmax.default)
def softmax(e: Emitter, x: Value, axis: int, half_to_float: bool = False) -> Value:
    if x.ndim == 0:
        return e.one("fill", shape=(), scalar=1, dtype=str(x.dtype).removeprefix("torch."))
    return e.one("softmax", x, axis=axis % x.ndim)


@lowers(aten._log_softmax.default)
def log_softmax(e: Emitter, x: Value, axis: int, half_to_float: bool = False) -> Value:
    if x.ndim == 0:
        return e.one("fill", shape=(), scalar=0, dtype=str(x.dtype).removeprefix("torch."))
    kind, x, axis = x.dtype, widen(e, x), axis % x.ndim
    x = x - e.one("reduce_max", x, axes=(axis,), keepdims=True)
    return e.cast(x - e.one("log", e.sum(e.one("exp", x), (axis,), keepdims=True)), kind)


@lowers(aten.linalg_vector_norm.default)
def vector_norm(
    e: Emitter,
    x: Value,
    order: Number = 2,
    axes: Axes = None,
    keepdim: bool = False,
    *,
    dtype: torch.dtype | None = None,
) -> Value:
    x = e.one("abs", e.cast(x, dtype))
    axes = axes_of(x, axes)
    if x.ndim == 0:
        x, axes = e.reshape(x, (1,)), (0,)
    if order == 0:
        return e.sum(e.cast(is_true(e, x), x.dtype), axes, keepdim)
    if order == 1:
        return e.sum(x, axes, keepdim)
    if math.isinf(order):
        return e.one("reduce_max" if order > 0 else "reduce_min", x, axes=axes, keepdims=keepdim)
    if order == 2:
        return e.one("sqrt", e.sum(x * x, axes, keepdim))
    return e.one("pow", e.sum(e.one("pow", x, float(order)), axes, keepdim), 1 / order)


@lowers(aten._cdist_forward.default)
def cdist(e: Emitter, a: Value, b: Value, order: float, mode: int | None) -> Value:
    """Norms of all differences, [..., rows of a, rows of b]."""
    left = e.reshape(a, (*a.shape[:-1], 1, a.shape[-1]))
    right = e.reshape(b, (*b.shape[:-2], 1, *b.shape[-2:]))
    return vector_norm(e, left - right, order, (-1,))


@lowers(aten._pdist_forward.default)
def pdist(e: Emitter, x: Value, order: float = 2.0) -> Value:
    """The part of `cdist` of x with itself above the diagonal, row after row."""
    rows = x.shape[0]
    if rows > 256:
        raise NotLowered("of more than 256 rows")
    if rows < 2:
        return e.one("fill", shape=(0,), scalar=0, dtype=str(x.dtype).removeprefix("torch."))
    parts = []
    for row in range(rows - 1):
        away = e.slice(x, 0, row + 1, rows) - e.slice(x, 0, row, row + 1)
        parts.append(vector_norm(e, away, order, (-1,)))
    return e.one("concat", *parts, axis=0)
