"""ATen's pooling."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch

from ...emitter import Emitter, Value
from ..registry import NotLowered, lowers

aten = torch.ops.aten


def _pair(sizes: Sequence[int]) -> tuple[int, ...]:
    return tuple(sizes) * (2 if len(sizes) == 1 else 1)


def _batched(e: Emitter, x: Value, rank: int = 4) -> tuple[Value, bool]:
    """x with a batch axis, and whether one was added."""
    return (e.reshape(x, (1, *x.shape)), True) if x.ndim == rank - 1 else (x, False)


@lowers(aten.max_pool2d_with_indices.default)
def max_pool2d(
    e: Emitter,
    x: Value,
    kernel: Sequence[int],
    stride: Sequence[int] = (),
    padding: Sequence[int] = (0,),
    dilation: Sequence[int] = (1,),
    ceil_mode: bool = False,
) -> tuple[Value, ...]:
    x, added = _batched(e, x)
    out = e.many(
        "max_pool",
        x,
        kernel=_pair(kernel),
        stride=_pair(stride or kernel),
        padding=_pair(padding),
        dilation=_pair(dilation),
        ceil_mode=ceil_mode,
    )
    return tuple(e.reshape(part, part.shape[1:]) for part in out) if added else out


@lowers(aten.max_pool2d_with_indices_backward.default)
def max_pool2d_backward(
    e: Emitter,
    grad: Value,
    x: Value,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    ceil_mode: bool,
    places: Value,
) -> Value:
    """Each gradient is added where its largest element was."""
    *lead, height, width = x.shape
    planes = (math.prod(lead), height * width)
    flat = (planes[0], grad.shape[-2] * grad.shape[-1])
    zero = e.one("fill", shape=planes, scalar=0, dtype=str(grad.dtype).removeprefix("torch."))
    out = e.one("scatter", zero, e.reshape(places, flat), e.reshape(grad, flat), axis=1, combine="add")
    return e.reshape(out, x.shape)


def _average(
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    ceil_mode: bool,
    include: bool,
    divisor: int | None,
) -> dict[str, object]:
    return {
        "kernel": _pair(kernel),
        "stride": _pair(stride or kernel),
        "padding": _pair(padding),
        "ceil_mode": ceil_mode,
        "count_include_pad": include,
        "divisor": divisor,
    }


@lowers(aten.avg_pool2d.default)
def avg_pool2d(
    e: Emitter,
    x: Value,
    kernel: Sequence[int],
    stride: Sequence[int] = (),
    padding: Sequence[int] = (0,),
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Value:
    x, added = _batched(e, x)
    out = e.one("avg_pool", x, **_average(kernel, stride, padding, ceil_mode, count_include_pad, divisor_override))
    return e.reshape(out, out.shape[1:]) if added else out


@lowers(aten.avg_pool2d_backward.default)
def avg_pool2d_backward(
    e: Emitter,
    grad: Value,
    x: Value,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    ceil_mode: bool,
    count_include_pad: bool,
    divisor_override: int | None,
) -> Value:
    options = _average(kernel, stride, padding, ceil_mode, count_include_pad, divisor_override)
    return e.one("avg_pool_grad", grad, x, **options)


@lowers(aten._adaptive_avg_pool2d.default)
def adaptive_avg_pool2d(e: Emitter, x: Value, output_size: Sequence[int]) -> Value:
    x, added = _batched(e, x)
    height, width = x.shape[-2:]
    if tuple(output_size) == (1, 1) and height * width:
        out = e.mean(x, (2, 3), keepdims=True)
    else:
        out = e.one("avg_pool", x, output_size=tuple(output_size))
    return e.reshape(out, out.shape[1:]) if added else out


@lowers(aten._adaptive_avg_pool2d_backward.default)
def adaptive_avg_pool2d_backward(e: Emitter, grad: Value, x: Value) -> Value:
    return e.one("avg_pool_grad", grad, x, output_size=grad.shape[-2:])


@lowers(aten.avg_pool3d.default)
def avg_pool3d(
    e: Emitter,
    x: Value,
    kernel: Sequence[int],
    stride: Sequence[int] = (),
    padding: Sequence[int] = (0,),
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Value:
    """Means of means: over height and width, then over depth. Only where every window has the same count."""
    if ceil_mode or divisor_override or (any(padding) and not count_include_pad):
        raise NotLowered("with windows of different counts")
    x, added = _batched(e, x, 5)
    kernel, stride, padding = (tuple(s) * (3 if len(s) == 1 else 1) for s in (kernel, stride or kernel, padding))
    n, c, depth, height, width = x.shape
    flat = e.reshape(x, (n, c * depth, height, width))
    flat = e.one("avg_pool", flat, kernel=kernel[1:], stride=stride[1:], padding=padding[1:])
    rows, columns = flat.shape[2:]
    deep = e.reshape(flat, (n, c, depth, rows * columns))
    out = e.one("avg_pool", deep, kernel=(kernel[0], 1), stride=(stride[0], 1), padding=(padding[0], 0))
    out = e.reshape(out, (n, c, out.shape[2], rows, columns))
    return e.reshape(out, out.shape[1:]) if added else out


@lowers(aten._adaptive_avg_pool3d.default)
def adaptive_avg_pool3d(e: Emitter, x: Value, output_size: Sequence[int]) -> Value:
    """Means over height and width, then over depth: each window is a product of three ranges."""
    x, added = _batched(e, x, 5)
    n, c, depth, height, width = x.shape
    deep, rows, columns = output_size
    flat = e.one("avg_pool", e.reshape(x, (n, c * depth, height, width)), output_size=(rows, columns))
    out = e.one("avg_pool", e.reshape(flat, (n, c, depth, rows * columns)), output_size=(deep, rows * columns))
    out = e.reshape(out, (n, c, deep, rows, columns))
    return e.reshape(out, out.shape[1:]) if added else out


def _ranges(size: int, windows: int) -> list[tuple[int, int]]:
    """torch's adaptive windows: from floor(i size / windows) to ceil((i + 1) size / windows)."""
    return [(i * size // windows, -(-(i + 1) * size // windows)) for i in range(windows)]


def _adaptive_max(e: Emitter, x: Value, output_size: Sequence[int]) -> tuple[Value, Value]:
    """Largest elements of windows, one after the other, and their places in the plane or volume."""
    space = x.shape[-len(output_size) :]
    lead = x.shape[: x.ndim - len(space)]
    if math.prod(output_size) > 512:
        raise NotLowered("to more than 512 windows")
    places = e.reshape(e.one("iota", length=math.prod(space), dtype="int64"), (*(1,) * len(lead), *space))
    places = e.broadcast(places, x.shape)
    values, found = [], []
    for windows in itertools.product(*(_ranges(*pair) for pair in zip(space, output_size, strict=True))):
        part, where = x, places
        for offset, (start, stop) in enumerate(windows):
            part = e.slice(part, len(lead) + offset, start, stop)
            where = e.slice(where, len(lead) + offset, start, stop)
        part, where = (e.reshape(one, (*lead, math.prod(one.shape[len(lead) :]))) for one in (part, where))
        best = e.one("argmax", part, axis=len(lead), keepdims=True)
        values.append(e.one("gather", part, best, axis=len(lead)))
        found.append(e.one("gather", where, best, axis=len(lead)))
    shape = (*lead, *output_size)
    joined = [e.reshape(e.one("concat", *parts, axis=len(lead)), shape) for parts in (values, found)]
    return joined[0], joined[1]


@lowers(aten.adaptive_max_pool2d.default, aten.adaptive_max_pool3d.default)
def adaptive_max_pool(e: Emitter, x: Value, output_size: Sequence[int]) -> tuple[Value, Value]:
    return _adaptive_max(e, x, output_size)


@lowers(aten.max_pool3d_with_indices.default)
def max_pool3d(
    e: Emitter,
    x: Value,
    kernel: Sequence[int],
    stride: Sequence[int] = (),
    padding: Sequence[int] = (0,),
    dilation: Sequence[int] = (1,),
    ceil_mode: bool = False,
) -> tuple[Value, Value]:
    """Height and width first; then, over depth, the best of those, which carries its place along."""
    x, added = _batched(e, x, 5)
    full = [tuple(s) * (3 if len(s) == 1 else 1) for s in (kernel, stride or kernel, padding, dilation)]
    n, c, depth, height, width = x.shape
    over, deep = (
        {key: part[1:] for key, part in zip(_WINDOW_NAMES, full, strict=True)},
        {key: (part[0], one) for key, part, one in zip(_WINDOW_NAMES, full, (1, 1, 0, 1), strict=True)},
    )
    flat, place = e.many("max_pool", e.reshape(x, (n, c * depth, height, width)), **over, ceil_mode=ceil_mode)
    rows, columns = flat.shape[2:]
    layers = e.reshape(flat, (n, c, depth, rows * columns))
    out, best = e.many("max_pool", layers, **deep, ceil_mode=ceil_mode)  # best: depth * (rows * columns) + column
    count = out.shape[2]
    chosen = e.reshape(best, (n, c, count * rows * columns))
    inside = e.one("gather", e.reshape(place, (n, c, depth * rows * columns)), chosen, axis=2)
    layer = e.one("floor_divide", chosen, rows * columns)
    shape = (n, c, count, rows, columns)
    results = [e.reshape(out, shape), e.reshape(layer * (height * width) + inside, shape)]
    first, second = (e.reshape(one, shape[1:]) for one in results) if added else results
    return first, second


_WINDOW_NAMES = ("kernel", "stride", "padding", "dilation")
