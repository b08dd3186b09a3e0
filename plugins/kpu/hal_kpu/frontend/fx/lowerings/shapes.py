"""ATen's views and rearrangements, as work of the block mover."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from ...emitter import Emitter, Value
from ..registry import NotLowered, lowers

aten = torch.ops.aten


@lowers(aten.view.default, aten.reshape.default, aten._unsafe_view.default)
def view(e: Emitter, x: Value, shape: Sequence[int]) -> Value:
    sizes = list(shape)
    if -1 in sizes:
        known = math.prod(size for size in sizes if size != -1)
        sizes[sizes.index(-1)] = x.tensor.numel() // known if known else 0
    return e.reshape(x, sizes)


@lowers(aten.unsqueeze.default)
def unsqueeze(e: Emitter, x: Value, axis: int) -> Value:
    axis %= x.ndim + 1
    return e.reshape(x, (*x.shape[:axis], 1, *x.shape[axis:]))


@lowers(aten.squeeze.default)
def squeeze(e: Emitter, x: Value) -> Value:
    return e.reshape(x, [size for size in x.shape if size != 1])


@lowers(aten.squeeze.dim, aten.squeeze.dims)
def squeeze_dims(e: Emitter, x: Value, axes: int | Sequence[int]) -> Value:
    gone = {axis % max(x.ndim, 1) for axis in ([axes] if isinstance(axes, int) else axes)}
    return e.reshape(x, [size for axis, size in enumerate(x.shape) if size != 1 or axis not in gone])


@lowers(aten.permute.default)
def permute(e: Emitter, x: Value, order: Sequence[int]) -> Value:
    return e.transpose(x, order)


@lowers(aten.transpose.int)
def transpose(e: Emitter, x: Value, first: int, second: int) -> Value:
    if x.ndim == 0:
        return x
    order = list(range(x.ndim))
    order[first], order[second] = order[second], order[first]
    return e.transpose(x, order)


@lowers(aten.t.default)
def t(e: Emitter, x: Value) -> Value:
    return x if x.ndim < 2 else e.transpose(x, (1, 0))


@lowers(aten.expand.default)
def expand(e: Emitter, x: Value, shape: Sequence[int], implicit: bool = False) -> Value:
    new = len(shape) - x.ndim
    return e.broadcast(x, [x.shape[i - new] if size == -1 else size for i, size in enumerate(shape)])


@lowers(aten.repeat.default)
def repeat(e: Emitter, x: Value, counts: Sequence[int]) -> Value:
    """Each axis as [1, size] broadcast to [count, size]."""
    sizes = (1,) * (len(counts) - x.ndim) + x.shape
    if all(count == 1 for count in counts):
        return e.copy(e.reshape(x, sizes))
    split = e.reshape(x, [part for size in sizes for part in (1, size)])
    wide = e.broadcast(split, [part for pair in zip(counts, sizes, strict=True) for part in pair])
    return e.reshape(wide, [count * size for count, size in zip(counts, sizes, strict=True)])


def bounds(size: int, start: int | None, stop: int | None) -> tuple[int, int]:
    """Python's slice rules: (start, stop) with 0 <= start <= stop <= size."""
    first, last, _ = slice(start, stop).indices(size)
    return first, max(first, last)


@lowers(aten.slice.Tensor)
def slice_tensor(
    e: Emitter, x: Value, axis: int = 0, start: int | None = None, stop: int | None = None, step: int = 1
) -> Value:
    return e.slice(x, axis, *bounds(x.shape[axis], start, stop), step)


@lowers(aten.slice_scatter.default)
def slice_scatter(
    e: Emitter, x: Value, part: Value, axis: int = 0, start: int | None = None, stop: int | None = None, step: int = 1
) -> Value:
    first, last = bounds(x.shape[axis], start, stop)
    return e.one("slice_update", x, part, axis=axis % x.ndim, start=first, stop=last, step=step)


@lowers(aten.select.int)
def select(e: Emitter, x: Value, axis: int, index: int) -> Value:
    axis, index = axis % x.ndim, index % x.shape[axis]
    return e.reshape(e.slice(x, axis, index, index + 1), x.shape[:axis] + x.shape[axis + 1 :])


@lowers(aten.select_scatter.default)
def select_scatter(e: Emitter, x: Value, part: Value, axis: int, index: int) -> Value:
    axis, index = axis % x.ndim, index % x.shape[axis]
    part = e.reshape(part, (*part.shape[:axis], 1, *part.shape[axis:]))
    return e.one("slice_update", x, part, axis=axis, start=index, stop=index + 1)


@lowers(aten.split_with_sizes.default)
def split_with_sizes(e: Emitter, x: Value, sizes: Sequence[int], axis: int = 0) -> list[Value]:
    ends = [sum(sizes[: index + 1]) for index in range(len(sizes))]
    return [e.slice(x, axis, end - size, end) for size, end in zip(sizes, ends, strict=True)]


@lowers(aten.split.Tensor)
def split(e: Emitter, x: Value, size: int, axis: int = 0) -> list[Value]:
    whole = x.shape[axis]
    return [e.slice(x, axis, start, min(start + size, whole)) for start in range(0, max(whole, 1), max(size, 1))]


@lowers(aten.unbind.int)
def unbind(e: Emitter, x: Value, axis: int = 0) -> list[Value]:
    return [select(e, x, axis, index) for index in range(x.shape[axis])]


@lowers(aten.cat.default)
def cat(e: Emitter, parts: Sequence[Value], axis: int = 0) -> Value:
    parts = [part for part in parts if part.shape != (0,)] or list(parts[:1])  # torch lets empty lists of any rank in
    return e.one("concat", *parts, axis=axis % max(parts[0].ndim, 1))


@lowers(aten.stack.default)
def stack(e: Emitter, parts: Sequence[Value], axis: int = 0) -> Value:
    return cat(e, [unsqueeze(e, part, axis) for part in parts], axis % (parts[0].ndim + 1))


@lowers(aten.constant_pad_nd.default)
def constant_pad_nd(e: Emitter, x: Value, widths: Sequence[int], value: float = 0) -> Value:
    return e.one("pad", x, widths=tuple(widths), fill=value)


@lowers(aten.flip.default)
def flip(e: Emitter, x: Value, axes: Sequence[int]) -> Value:
    return e.one("reverse", x, axes=tuple(axis % max(x.ndim, 1) for axis in axes)) if axes else e.copy(x)


def row_major(shape: Sequence[int]) -> list[int]:
    """Strides of a dense tensor, in elements."""
    return [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]


@lowers(aten.diagonal.default)
def diagonal(e: Emitter, x: Value, offset: int = 0, first: int = 0, second: int = 1) -> Value:
    first, second, strides = first % x.ndim, second % x.ndim, row_major(x.shape)
    down, right = max(-offset, 0), max(offset, 0)
    length = max(0, min(x.shape[first] - down, x.shape[second] - right))
    rest = [axis for axis in range(x.ndim) if axis not in (first, second)]
    return e.one(
        "strided",
        x,
        shape=(*(x.shape[axis] for axis in rest), length),
        strides=(*(strides[axis] for axis in rest), strides[first] + strides[second]),
        offset=down * strides[first] + right * strides[second] if length else 0,
    )


@lowers(aten.unfold.default)
def unfold(e: Emitter, x: Value, axis: int, size: int, step: int) -> Value:
    if x.ndim == 0:
        return e.slice(e.reshape(x, (1,)), 0, 0, size)
    axis, strides = axis % x.ndim, row_major(x.shape)
    shape = [*x.shape, size]
    shape[axis] = (x.shape[axis] - size) // step + 1
    steps = [*strides, strides[axis]]
    steps[axis] *= step
    return e.one("strided", x, shape=tuple(shape), strides=tuple(steps))


@lowers(aten.as_strided.default)
def as_strided(e: Emitter, x: Value, shape: Sequence[int], strides: Sequence[int], offset: Any = None) -> Value:
    """Of tensors that the graph keeps dense in memory: others show bytes that their values do not tell."""
    if x.tensor.is_meta and not x.tensor.is_contiguous():
        raise NotLowered("of a tensor that is not contiguous")
    return e.one("strided", x, shape=tuple(shape), strides=tuple(strides), offset=offset or 0)


@lowers(aten.as_strided_scatter.default)
def as_strided_scatter(
    e: Emitter, x: Value, source: Value, shape: Sequence[int], strides: Sequence[int], offset: Any = None
) -> Value:
    """The places that `as_strided` would read, found by reading it of 0, 1, 2, ..., are written instead."""
    if x.tensor.is_meta and not x.tensor.is_contiguous():
        raise NotLowered("of a tensor that is not contiguous")
    count = x.tensor.numel()
    places = e.one("iota", length=count, dtype="int64")
    places = e.one("strided", places, shape=tuple(shape), strides=tuple(strides), offset=offset or 0)
    flat = (math.prod(shape),)
    sides = (e.reshape(x, (count,)), e.reshape(places, flat), e.reshape(source, flat))
    return e.reshape(e.one("scatter", *sides, axis=0, combine="replace"), x.shape)


@lowers(aten.diagonal_scatter.default)
def diagonal_scatter(e: Emitter, x: Value, source: Value, offset: int = 0, first: int = 0, second: int = 1) -> Value:
    """The places of the diagonal, found by reading it of 0, 1, 2, ..., are written."""
    count = x.tensor.numel()
    places = diagonal(e, e.reshape(e.one("iota", length=count, dtype="int64"), x.shape), offset, first, second)
    flat = (places.tensor.numel(),)
    sides = (e.reshape(x, (count,)), e.reshape(places, flat), e.reshape(source, flat))
    return e.reshape(e.one("scatter", *sides, axis=0, combine="replace"), x.shape)


@lowers(aten.as_strided_copy.default)
def as_strided_copy(e: Emitter, x: Value, shape: Sequence[int], strides: Sequence[int], offset: Any = None) -> Value:
    return e.copy(as_strided(e, x, shape, strides, offset))


@lowers(aten.view_copy.default)
def view_copy(e: Emitter, x: Value, shape: Sequence[int]) -> Value:
    return e.copy(view(e, x, shape))


@lowers(aten.permute_copy.default)
def permute_copy(e: Emitter, x: Value, order: Sequence[int]) -> Value:
    return e.copy(e.transpose(x, order))


@lowers(aten.narrow_copy.default)
def narrow_copy(e: Emitter, x: Value, axis: int, start: int, length: int) -> Value:
    return e.copy(slice_tensor(e, x, axis, start, start + length if start >= 0 else x.shape[axis] + start + length))


@lowers(aten.unbind_copy.int)
def unbind_copy(e: Emitter, x: Value, axis: int = 0) -> list[Value]:
    return [e.copy(part) for part in unbind(e, x, axis)]
