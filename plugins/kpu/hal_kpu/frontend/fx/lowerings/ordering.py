"""ATen's scans, sorts and what is found by sorting, as vector operations."""

from __future__ import annotations

import torch

from ...emitter import Emitter, Value
from ..registry import lowers
from .reductions import accumulator

aten = torch.ops.aten


@lowers(aten.cumsum.default)
def cumsum(e: Emitter, x: Value, axis: int, *, dtype: torch.dtype | None = None) -> Value:
    return _scan(e, "add", e.cast(x, accumulator(x.dtype, dtype)), axis)


@lowers(aten.cumprod.default)
def cumprod(e: Emitter, x: Value, axis: int, *, dtype: torch.dtype | None = None) -> Value:
    return _scan(e, "mul", e.cast(x, accumulator(x.dtype, dtype)), axis)


def _scan(e: Emitter, kind: str, x: Value, axis: int) -> Value:
    return e.one("scan", x, axis=axis % x.ndim, kind=kind) if x.ndim else e.copy(x)


def _cumulative_extreme(e: Emitter, kind: str, x: Value, axis: int) -> tuple[Value, Value]:
    """Running extremes, and where each was last seen: the running maximum of the places that equal it."""
    if x.ndim == 0:
        return e.copy(x), e.one("fill", shape=(), scalar=0, dtype="int64")
    axis %= x.ndim
    values = e.one("scan", x, axis=axis, kind=kind)
    counted = e.one("iota", length=x.shape[axis], dtype="int64")
    counted = e.reshape(counted, [size if i == axis else 1 for i, size in enumerate(x.shape)])
    zero = e.one("fill", shape=(), scalar=0, dtype="int64")
    seen = e.one("where", e.one("compare", x, values, predicate="eq"), counted, zero)
    return values, e.one("scan", seen, axis=axis, kind="max")


@lowers(aten.cummax.default)
def cummax(e: Emitter, x: Value, axis: int) -> tuple[Value, Value]:
    return _cumulative_extreme(e, "max", x, axis)


@lowers(aten.cummin.default)
def cummin(e: Emitter, x: Value, axis: int) -> tuple[Value, Value]:
    return _cumulative_extreme(e, "min", x, axis)


@lowers(aten.logcumsumexp.default)
def logcumsumexp(e: Emitter, x: Value, axis: int) -> Value:
    """Over exponentials of distances from the largest: safe where they do not span float32's range."""
    if x.ndim == 0:
        return e.copy(x)
    axis %= x.ndim
    top = e.one("reduce_max", x, axes=(axis,), keepdims=True)
    return e.one("log", _scan(e, "add", e.one("exp", x - top), axis)) + top


@lowers(aten.sort.default)
def sort(e: Emitter, x: Value, axis: int = -1, descending: bool = False) -> tuple[Value, ...]:
    if x.ndim == 0:
        return e.copy(x), e.one("fill", shape=(), scalar=0, dtype="int64")
    return e.many("sort", x, axis=axis % x.ndim, descending=descending)


@lowers(aten.sort.stable)
def sort_stable(
    e: Emitter, x: Value, *, stable: bool | None = None, dim: int = -1, descending: bool = False
) -> tuple[Value, ...]:
    return sort(e, x, dim, descending)


@lowers(aten.topk.default)
def topk(e: Emitter, x: Value, k: int, axis: int = -1, largest: bool = True, ordered: bool = True) -> tuple[Value, ...]:
    if x.ndim == 0:
        return sort(e, x)
    return tuple(e.slice(part, axis, 0, k) for part in sort(e, x, axis, largest))


@lowers(aten.kthvalue.default)
def kthvalue(e: Emitter, x: Value, k: int, axis: int = -1, keepdim: bool = False) -> tuple[Value, ...]:
    if x.ndim == 0:
        return sort(e, x)
    axis %= x.ndim
    shape = (*x.shape[:axis], *((1,) if keepdim else ()), *x.shape[axis + 1 :])
    return tuple(e.reshape(e.slice(part, axis, k - 1, k), shape) for part in sort(e, x, axis))


def _isnan(e: Emitter, x: Value) -> Value:
    return e.one("compare", x, x, predicate="ne")


def _median(e: Emitter, x: Value, axis: int, keepdim: bool, skip_nan: bool) -> tuple[Value, Value]:
    """The lower median: after sorting, which puts what is not a number last, the one in the middle."""
    if x.ndim == 0:
        return e.copy(x), e.one("fill", shape=(), scalar=0, dtype="int64")
    axis %= x.ndim
    values, places = e.many("sort", x, axis=axis)
    size = x.shape[axis]
    if skip_nan:
        count = e.sum(e.one("not", _isnan(e, values)), (axis,), keepdims=True)
        middle = e.one("maximum", e.one("floor_divide", count - 1, 2), 0)
    else:
        shape = tuple(1 if i == axis else length for i, length in enumerate(x.shape))
        middle = e.one("fill", shape=shape, scalar=(size - 1) // 2, dtype="int64")
        if x.dtype.is_floating_point:  # one of them makes the median one: the first, wherever it was
            bad = e.sum(_isnan(e, values), (axis,), keepdims=True)
            first = e.one("sub", size, bad)
            middle = e.one("where", e.one("compare", bad, 0, predicate="gt"), first, middle)
    found = [e.one("gather", part, middle, axis=axis) for part in (values, places)]
    if not keepdim:
        found = [e.reshape(part, x.shape[:axis] + x.shape[axis + 1 :]) for part in found]
    return found[0], found[1]


@lowers(aten.median.dim)
def median_axis(e: Emitter, x: Value, axis: int, keepdim: bool = False) -> tuple[Value, Value]:
    return _median(e, x, axis, keepdim, skip_nan=False)


@lowers(aten.nanmedian.dim)
def nanmedian_axis(e: Emitter, x: Value, axis: int, keepdim: bool = False) -> tuple[Value, Value]:
    return _median(e, x, axis, keepdim, skip_nan=True)


@lowers(aten.median.default)
def median_all(e: Emitter, x: Value) -> Value:
    return _median(e, e.reshape(x, (x.tensor.numel(),)), 0, False, skip_nan=False)[0]


@lowers(aten.nanmedian.default)
def nanmedian_all(e: Emitter, x: Value) -> Value:
    return _median(e, e.reshape(x, (x.tensor.numel(),)), 0, False, skip_nan=True)[0]
