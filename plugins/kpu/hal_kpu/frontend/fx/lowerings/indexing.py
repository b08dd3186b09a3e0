"""ATen's gathers and scatters, as work of the block mover."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ...emitter import Emitter, Number, Value
from ..registry import NotLowered, lowers

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


@lowers(aten.put.default)
def put(e: Emitter, x: Value, places: Value, source: Value, accumulate: bool = False) -> Value:
    """Into x as one long row."""
    flat = e.reshape(x, (x.tensor.numel(),))
    row, values = (e.reshape(part, (part.tensor.numel(),)) for part in (places, source))
    return e.reshape(
        e.one("index_put", flat, values, e.cast(row, torch.int64), axes=(0,), accumulate=accumulate), x.shape
    )


@lowers(aten.index_reduce.default)
def index_reduce(
    e: Emitter, x: Value, axis: int, rows: Value, source: Value, reduce: str, *, include_self: bool = True
) -> Value:
    if x.ndim == 0:
        return e.reshape(
            index_reduce(e, *_row(e, x), rows, e.reshape(source, (1,)), reduce, include_self=include_self), ()
        )
    axis %= x.ndim
    rows = e.reshape(rows, (rows.tensor.numel(),))
    shape = [size if i == axis else 1 for i, size in enumerate(source.shape)]
    places = e.broadcast(e.reshape(e.cast(rows, torch.int64), shape), source.shape)
    return e.one("scatter", x, places, source, axis=axis, combine=_COMBINE[reduce], include_self=include_self)


def _row(e: Emitter, x: Value) -> tuple[Value, int]:
    """A single number as a row, and the row's axis."""
    return e.reshape(x, (1,)), 0


@lowers(aten.searchsorted.Tensor)
def searchsorted(
    e: Emitter,
    ordered: Value,
    x: Value,
    *,
    out_int32: bool = False,
    right: bool = False,
    side: str | None = None,
    sorter: Value | None = None,
) -> Value:
    """How many of the ordered numbers lie before each of x: all are compared."""
    if sorter is not None:
        ordered = e.one("gather", ordered, sorter, axis=ordered.ndim - 1)
    if ordered.ndim > 1:
        ordered = e.reshape(ordered, (*ordered.shape[:-1], 1, ordered.shape[-1]))
    before = "le" if right or side == "right" else "lt"
    below = e.one("compare", ordered, e.reshape(x, (*x.shape, 1)), predicate=before)
    count = e.sum(below, (below.ndim - 1,))
    return e.cast(count, torch.int32) if out_int32 else count


@lowers(aten.bucketize.Tensor)
def bucketize(e: Emitter, x: Value, ordered: Value, *, out_int32: bool = False, right: bool = False) -> Value:
    return searchsorted(e, ordered, x, out_int32=out_int32, right=right)


@lowers(aten.histc.default)
def histc(e: Emitter, x: Value, bins: int = 100, low: Number = 0, high: Number = 0) -> Value:
    """Each element adds one to the bin it falls in; without bounds from the smallest to the largest element."""
    flat = e.reshape(x, (x.tensor.numel(),))
    kind = str(x.dtype).removeprefix("torch.")
    ends = [e.one("fill", shape=(), scalar=end, dtype=kind) for end in (low, high)]
    if low == high:
        if low != 0:
            raise NotLowered("between equal bounds")
        ends = [e.one(opcode, flat, axes=(0,)) for opcode in ("reduce_min", "reduce_max")]
    place = e.one("floor", (flat - ends[0]) * float(bins) / (ends[1] - ends[0]))
    inside = e.one(
        "and", e.one("compare", flat, ends[0], predicate="ge"), e.one("compare", flat, ends[1], predicate="le")
    )
    place = e.cast(e.one("minimum", e.one("maximum", place, 0.0), float(bins - 1)), torch.int64)
    zero = e.one("fill", shape=(bins,), scalar=0, dtype=kind)
    return e.one("scatter", zero, place, e.cast(inside, x.dtype), axis=0, combine="add")
