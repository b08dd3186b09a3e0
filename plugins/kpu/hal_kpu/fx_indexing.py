"""ATen's gathers and scatters, as work of the block mover."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .emitter import Emitter, Number, Value
from .fx_registry import NotLowered, lowers

aten = torch.ops.aten
_INTEGERS = (torch.int8, torch.int16, torch.int32, torch.int64)


def _indices(e: Emitter, indices: Sequence[Value | None]) -> tuple[list[Value], tuple[int, ...]]:
    """Integer indices with their axes. Truth masks give results whose size depends on values: those are not lowered."""
    if any(index is not None and index.dtype not in _INTEGERS for index in indices):
        raise NotLowered("by a mask: the size of the result depends on values")
    axes = tuple(axis for axis, index in enumerate(indices) if index is not None)
    if not axes:
        raise NotLowered("by no index")
    return [e.cast(index, torch.int64) for index in indices if index is not None], axes


@lowers(aten.index.Tensor, aten._unsafe_index.Tensor)
def index(e: Emitter, x: Value, indices: Sequence[Value | None]) -> Value:
    places, axes = _indices(e, indices)
    return e.one("index", x, *places, axes=axes)


@lowers(aten.index_put.default, aten._unsafe_index_put.default)
def index_put(
    e: Emitter, x: Value, indices: Sequence[Value | None], values: Value, accumulate: bool = False, unsafe: bool = False
) -> Value:
    if all(i is None or i.dtype == torch.bool for i in indices) and values.tensor.numel() == 1 and not accumulate:
        return _masked_fill(e, x, indices, values)
    places, axes = _indices(e, indices)
    return e.one("index_put", x, values, *places, axes=axes, accumulate=accumulate)


def _masked_fill(e: Emitter, x: Value, indices: Sequence[Value | None], values: Value) -> Value:
    """x[mask] = one number."""
    if len(indices) != 1 or indices[0] is None:
        raise NotLowered("by several masks")
    mask = indices[0]
    mask = e.reshape(mask, (*mask.shape, *(1,) * (x.ndim - mask.ndim)))
    return e.one("where", mask, e.reshape(values, ()), x)


@lowers(aten.embedding.default)
def embedding(
    e: Emitter, table: Value, rows: Value, padding: int = -1, scale_by_freq: bool = False, sparse: bool = False
) -> Value:
    return e.one("index", table, e.cast(rows, torch.int64), axes=(0,))


@lowers(aten.index_select.default)
def index_select(e: Emitter, x: Value, axis: int, rows: Value) -> Value:
    if x.ndim == 0:
        return e.reshape(e.one("index", e.reshape(x, (1,)), e.cast(rows, torch.int64), axes=(0,)), ())
    rows = e.reshape(e.cast(rows, torch.int64), (rows.tensor.numel(),))
    return e.one("index", x, rows, axes=(axis % x.ndim,))


@lowers(aten.gather.default)
def gather(e: Emitter, x: Value, axis: int, places: Value, *, sparse_grad: bool = False) -> Value:
    return e.one("gather", x, e.cast(places, torch.int64), axis=axis)


@lowers(aten.scatter.src)
def scatter(e: Emitter, x: Value, axis: int, places: Value, source: Value) -> Value:
    return e.one("scatter", x, places, source, axis=axis, combine="replace")


@lowers(aten.scatter.value)
def scatter_value(e: Emitter, x: Value, axis: int, places: Value, number: Number) -> Value:
    source = e.one("fill", shape=places.shape, scalar=number, dtype=str(x.dtype).removeprefix("torch."))
    return e.one("scatter", x, places, source, axis=axis, combine="replace")


@lowers(aten.scatter_add.default)
def scatter_add(e: Emitter, x: Value, axis: int, places: Value, source: Value) -> Value:
    return e.one("scatter", x, places, source, axis=axis, combine="add")


_COMBINE = {"sum": "add", "add": "add", "prod": "mul", "multiply": "mul", "amax": "max", "amin": "min", "mean": "mean"}


@lowers(aten.scatter_reduce.two, aten.scatter.reduce)
def scatter_reduce(
    e: Emitter, x: Value, axis: int, places: Value, source: Value, reduce: str, *, include_self: bool = True
) -> Value:
    return e.one("scatter", x, places, source, axis=axis, combine=_COMBINE[reduce], include_self=include_self)


@lowers(aten.scatter.value_reduce)
def scatter_value_reduce(e: Emitter, x: Value, axis: int, places: Value, number: Number, *, reduce: str) -> Value:
    source = e.one("fill", shape=places.shape, scalar=number, dtype=str(x.dtype).removeprefix("torch."))
    return scatter_reduce(e, x, axis, places, source, reduce)


@lowers(aten.masked_scatter.default)
def masked_scatter(e: Emitter, x: Value, mask: Value, source: Value) -> Value:
    """The n-th true place takes source's n-th element: a running count of the mask says which."""
    shape = torch.broadcast_shapes(x.shape, mask.shape)
    mask = e.broadcast(mask, shape)
    count = e.one("scan", e.cast(e.reshape(mask, (mask.tensor.numel(),)), torch.int64), axis=0, kind="add")
    place = e.one("maximum", count - 1, 0)
    flat = e.reshape(source, (source.tensor.numel(),))
    if not flat.shape[0]:
        raise NotLowered("from an empty source")
    picked = e.one("index", flat, e.one("minimum", place, flat.shape[0] - 1), axes=(0,))
    return e.one("where", mask, e.reshape(picked, shape), x)
