"""ATen's embedding bags: rows of a table gathered by the block mover, and summed, averaged or compared bag by bag.

Index i lies in the bag whose offset is the last one that is not beyond i. Indices of the padding go to a row of their
own behind the bags (or behind the table, in gradients), which is cut off. Sums of narrow types are kept in float32.
"""

from __future__ import annotations

from typing import Any

import torch

from ...emitter import Emitter, Value
from ..registry import NotLowered, lowers

aten = torch.ops.aten
_SUM, _MEAN, _MAX = range(3)


def _zeros(e: Emitter, *shape: int, dtype: str = "float32") -> Value:
    return e.one("fill", shape=shape, scalar=0, dtype=dtype)


def _wide(e: Emitter, x: Value) -> Value:
    """In the type that its sums are kept in."""
    return x if x.dtype == torch.float64 else e.cast(x, torch.float32)


def _kind(x: Value) -> str:
    return str(x.dtype).removeprefix("torch.")


def _column(e: Emitter, x: Value) -> Value:
    return e.reshape(x, (x.shape[0], 1))


def _sums(e: Emitter, rows: Value, places: Value, number: int) -> Value:
    """[n, dim] -> [number, dim]: rows of one place added up."""
    spread = e.broadcast(_column(e, places), rows.shape)
    return e.one("scatter", _zeros(e, number, rows.shape[1], dtype=_kind(rows)), spread, rows, axis=0, combine="add")


def _counts(e: Emitter, places: Value, number: int) -> Value:
    """int64 [number]: how often each place occurs."""
    ones = e.one("fill", shape=places.shape, scalar=1, dtype="int64")
    return e.one("scatter", _zeros(e, number, dtype="int64"), places, ones, axis=0, combine="add")


class _Bags:
    """Indices with their bags.

    Attributes:
        indices, bag: int64 [n]. place: as `bag`, but behind all bags for the padding. number: of bags.
    """

    def __init__(self, e: Emitter, indices: Value, offsets: Value, padding: int, with_last: bool = False) -> None:
        self.indices = e.cast(indices, torch.int64)
        n, self.number = indices.shape[0], offsets.shape[0] - with_last
        begins = e.slice(e.cast(offsets, torch.int64), 0, 0, self.number)
        begun = e.one("scan", _counts(e, begins, n + 1), axis=0, kind="add")
        self.bag = e.slice(begun, 0, 0, n) - 1
        self.place = _without(e, self.indices, padding, self.bag, self.number)

    def sizes(self, e: Emitter) -> Value:
        """int64 [number]: indices in each bag, without the padding."""
        return e.slice(_counts(e, self.place, self.number + 1), 0, 0, self.number)


def _without(e: Emitter, indices: Value, padding: int, places: Value, behind: int) -> Value:
    """`places`, with `behind` where the index is the padding."""
    if padding < 0:
        return places
    return e.one("where", e.one("compare", indices, padding, predicate="eq"), _full(e, behind), places)


def _full(e: Emitter, number: int) -> Value:
    return e.one("fill", shape=(), scalar=number, dtype="int64")


def _largest(e: Emitter, bags: _Bags, rows: Value) -> tuple[Value, Value]:
    """([number, dim], int64 [number, dim]): the largest of each bag, 0 where it is empty, and the index it is of."""
    n, dim, number = *rows.shape, bags.number
    spread = e.broadcast(_column(e, bags.place), rows.shape)
    zeros = _zeros(e, number + 1, dim, dtype=_kind(rows))
    most = e.one("scatter", zeros, spread, rows, axis=0, combine="max", include_self=False)
    hit = e.one("compare", rows, e.one("index", most, bags.place, axes=(0,)), predicate="eq")
    order = _column(e, e.one("iota", length=n, dtype="int64"))
    order = e.one("where", hit, e.broadcast(order, rows.shape), _full(e, n))
    beyond = e.one("fill", shape=(number + 1, dim), scalar=n, dtype="int64")
    first = e.slice(e.one("scatter", beyond, spread, order, axis=0, combine="min"), 0, 0, number)
    names = e.one("concat", bags.indices, _zeros(e, 1, dtype="int64"), axis=0)
    return e.slice(most, 0, 0, number), e.one("index", names, first, axes=(0,))


@lowers(aten._embedding_bag.default)
def embedding_bag(
    e: Emitter,
    table: Value,
    indices: Value,
    offsets: Value,
    scale_by_freq: bool = False,
    mode: int = _SUM,
    sparse: bool = False,
    factors: Value | None = None,
    with_last: bool = False,
    padding: int = -1,
) -> tuple[Value, ...]:
    """(result, bag of each index, size of each bag, index of each maximum), the last three in the offsets' type and,
    where torch's CPU kernel leaves them out, of the size that it gives them.
    """
    bags = _Bags(e, indices, offsets, padding, with_last)
    rows = _wide(e, e.one("index", table, bags.indices, axes=(0,)))
    sizes = bags.sizes(e)
    places = sizes
    if mode == _MAX:
        out, places = _largest(e, bags, rows)
    else:
        rows = rows if factors is None else rows * _column(e, _wide(e, factors))
        out = e.slice(_sums(e, rows, bags.place, bags.number + 1), 0, 0, bags.number)
        if mode == _MEAN:
            out = out / _column(e, e.cast(e.one("maximum", sizes, 1), out.dtype))
    plain = table.dtype in (torch.float32, torch.float16) and padding < 0 and mode == _SUM
    bag = e.slice(bags.bag, 0, 0, 0) if plain else bags.bag
    kept = [e.cast(part, offsets.dtype) for part in (bag, sizes, places)]
    return (e.cast(out, table.dtype), *kept)


@lowers(aten._embedding_bag_forward_only.default)
def embedding_bag_forward(e: Emitter, table: Value, indices: Value, offsets: Value, *options: Any) -> tuple[Value, ...]:
    """As above; the sizes have as many entries as torch.compile is told: as many as there are offsets."""
    out, bag, sizes, places = embedding_bag(e, table, indices, offsets, *options)
    more = offsets.shape[0] - sizes.shape[0]
    return out, bag, e.one("pad", sizes, widths=(0, more)) if more else sizes, places


def _gradient(
    e: Emitter,
    grad: Value,
    indices: Value,
    bag: Value,
    sizes: Value,
    places: Value,
    number: int,
    by_freq: bool,
    mode: int,
    factors: Value | None,
    padding: int,
) -> Value:
    """Of the table, [number, dim]. bag: int64 [n]."""
    wide = _wide(e, grad)
    if mode == _MAX:
        filled = e.one("compare", _column(e, sizes), 0, predicate="gt")
        wide = wide * e.cast(filled, wide.dtype)
        zeros = _zeros(e, number, grad.shape[1], dtype=_kind(wide))
        out = e.one("scatter", zeros, e.cast(places, torch.int64), wide, axis=0, combine="add")
        return e.cast(out, grad.dtype)
    if mode == _MEAN:
        wide = wide / _column(e, e.cast(e.one("maximum", sizes, 1), wide.dtype))
    rows = e.one("index", wide, bag, axes=(0,))
    if factors is not None:
        rows = rows * _column(e, _wide(e, factors))
    if by_freq:
        often = e.one("index", _counts(e, indices, number), indices, axes=(0,))
        rows = rows / _column(e, e.cast(often, rows.dtype))
    target = _without(e, indices, padding, indices, number)
    return e.cast(e.slice(_sums(e, rows, target, number + 1), 0, 0, number), grad.dtype)


@lowers(aten._embedding_bag_backward.default)
def embedding_bag_backward(
    e: Emitter,
    grad: Value,
    indices: Value,
    offsets: Value,
    bag: Value,
    sizes: Value,
    places: Value,
    number: int,
    by_freq: bool,
    mode: int,
    sparse: bool,
    factors: Value | None,
    padding: int = -1,
) -> Value:
    if sparse:
        raise NotLowered("a sparse gradient")
    bags = _Bags(e, indices, offsets, padding, offsets.shape[0] > sizes.shape[0])
    return _gradient(e, grad, bags.indices, bags.bag, sizes, places, number, by_freq, mode, factors, padding)


@lowers(aten._embedding_bag_dense_backward.default)
def embedding_bag_dense_backward(
    e: Emitter,
    grad: Value,
    indices: Value,
    bag: Value,
    sizes: Value,
    places: Value,
    number: int,
    by_freq: bool,
    mode: int,
    factors: Value | None,
    padding: int = -1,
) -> Value:
    words, at = e.cast(indices, torch.int64), e.cast(bag, torch.int64)
    return _gradient(e, grad, words, at, sizes, places, number, by_freq, mode, factors, padding)


@lowers(aten._embedding_bag_per_sample_weights_backward.default)
def embedding_bag_factors_backward(
    e: Emitter, grad: Value, table: Value, indices: Value, offsets: Value, bag: Value, mode: int, padding: int = -1
) -> Value:
    """[n]: each gathered row times its bag's gradient; nothing for the padding."""
    bags = _Bags(e, indices, offsets, padding, offsets.shape[0] > grad.shape[0])
    rows = _wide(e, e.one("index", table, bags.indices, axes=(0,)))
    out = e.sum(rows * e.one("index", _wide(e, grad), bags.bag, axes=(0,)), (1,))
    if padding >= 0:
        kept = e.one("compare", bags.indices, padding, predicate="ne")
        out = out * e.cast(kept, out.dtype)
    return e.cast(out, grad.dtype)
