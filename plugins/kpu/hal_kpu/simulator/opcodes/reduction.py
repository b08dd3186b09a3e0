"""Operations of the vector unit that combine elements: reductions, scans, sorting, windows.

Passes are assumed: 1 operation per element read for a reduction; a bitonic network's log2(n)(log2(n) + 1) / 2 steps for
a sort; 3 sweeps (largest, exponentials with their sum, scaling) for a softmax.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .work import Attributes, Opcode, Specs, Work, traffic, vector_work


def _axes(x: Tensor, attrs: Attributes) -> list[int]:
    """The axes to reduce; all where none are named."""
    axes = attrs.get("axes")
    return list(range(x.dim())) if axes is None else list(axes)


def _sum(inputs: tuple[Tensor, ...], attrs: Attributes) -> tuple[Tensor, ...]:
    (x,) = inputs
    dtype = torch.int64 if x.dtype == torch.bool else x.dtype  # truths are counted; other types stay
    return (torch.sum(x, _axes(x, attrs), keepdim=attrs.get("keepdims", False), dtype=dtype),)


def _prod(inputs: tuple[Tensor, ...], attrs: Attributes) -> tuple[Tensor, ...]:
    (x,) = inputs
    return (torch.prod(x, attrs["axis"], keepdim=attrs.get("keepdims", False), dtype=x.dtype),)


def _extreme(function: Callable[..., Tensor]) -> Callable[[tuple[Tensor, ...], Attributes], tuple[Tensor, ...]]:
    def value(inputs: tuple[Tensor, ...], attrs: Attributes) -> tuple[Tensor, ...]:
        (x,) = inputs
        return (function(x, _axes(x, attrs), keepdim=attrs.get("keepdims", False)),)

    return value


def _argument(function: Callable[..., Tensor]) -> Callable[[tuple[Tensor, ...], Attributes], tuple[Tensor, ...]]:
    """int64: the first place of the largest or smallest along `axis`."""

    def value(inputs: tuple[Tensor, ...], attrs: Attributes) -> tuple[Tensor, ...]:
        return (function(inputs[0], attrs["axis"], keepdim=attrs.get("keepdims", False)),)

    return value


_SCANS: dict[str, Callable[[Tensor, int], Tensor]] = {
    "add": lambda x, axis: torch.cumsum(x, axis, dtype=x.dtype),
    "mul": lambda x, axis: torch.cumprod(x, axis, dtype=x.dtype),
    "max": lambda x, axis: torch.cummax(x, axis)[0],
    "min": lambda x, axis: torch.cummin(x, axis)[0],
}


def _scan(inputs: tuple[Tensor, ...], attrs: Attributes) -> tuple[Tensor, ...]:
    """Running `kind` (add, mul, max, min) along `axis`."""
    return (_SCANS[attrs["kind"]](inputs[0], attrs["axis"]),)


def _sort(inputs: tuple[Tensor, ...], attrs: Attributes) -> tuple[Tensor, ...]:
    """(values, int64 places) in order along `axis`; equal ones keep their order."""
    return tuple(torch.sort(inputs[0], dim=attrs["axis"], descending=attrs.get("descending", False), stable=True))


def _sort_work(inputs: Specs, outputs: Specs, attrs: Attributes) -> Work:
    spec = inputs[0]
    depth = max(1, math.ceil(math.log2(max(2, spec.shape[attrs["axis"]] if spec.shape else 1))))
    steps = depth * (depth + 1) // 2
    return Work(engine="vector", elements=spec.numel, passes=steps, **traffic(inputs, outputs))


def _softmax(inputs: tuple[Tensor, ...], attrs: Attributes) -> tuple[Tensor, ...]:
    return (torch.softmax(inputs[0], attrs["axis"]),)


def _max_pool(inputs: tuple[Tensor, ...], attrs: Attributes) -> tuple[Tensor, ...]:
    """x[n, c, h, w] -> (values, int64 places h * width + w in each plane), over windows of `kernel`."""
    options = (list(attrs["kernel"]), list(attrs["stride"]), list(attrs["padding"]), list(attrs["dilation"]))
    return tuple(torch.ops.aten.max_pool2d_with_indices.default(inputs[0], *options, attrs.get("ceil_mode", False)))


def _average_options(attrs: Attributes) -> tuple[Any, ...]:
    options = (list(attrs["kernel"]), list(attrs["stride"]), list(attrs["padding"]), attrs.get("ceil_mode", False))
    return (*options, attrs.get("count_include_pad", True), attrs.get("divisor"))


def _avg_pool(inputs: tuple[Tensor, ...], attrs: Attributes) -> tuple[Tensor, ...]:
    """x[n, c, h, w] -> means over windows of `kernel`, or over `output_size` windows of nearly equal size."""
    if "output_size" in attrs:
        rows, columns = attrs["output_size"]
        return (F.adaptive_avg_pool2d(inputs[0], (rows, columns)),)
    return (F.avg_pool2d(inputs[0], *_average_options(attrs)),)


def _avg_pool_grad(inputs: tuple[Tensor, ...], attrs: Attributes) -> tuple[Tensor, ...]:
    """(grad_out, x) -> the gradient of `avg_pool`'s x."""
    if "output_size" in attrs:
        return (torch.ops.aten._adaptive_avg_pool2d_backward.default(*inputs),)
    return (torch.ops.aten.avg_pool2d_backward.default(*inputs, *_average_options(attrs)),)


def _window_work(inputs: Specs, outputs: Specs, attrs: Attributes) -> Work:
    """Each window's elements once, for each result."""
    if "output_size" in attrs:
        size, passes = max(inputs, key=lambda spec: spec.numel).numel, 1
    else:
        size, passes = min(inputs[0].numel, outputs[0].numel), math.prod(attrs["kernel"])
    return Work(engine="vector", elements=size, passes=passes, **traffic(inputs[:1], outputs))


_REDUCE = frozenset({"axes", "keepdims"})
_WINDOW = frozenset({"kernel", "stride", "padding", "ceil_mode"})
_AVERAGE = _WINDOW | {"count_include_pad", "divisor", "output_size"}

REDUCTION = [
    Opcode("sum", _sum, vector_work(1, "inputs"), (1, 1), optional=_REDUCE),
    Opcode("prod", _prod, vector_work(1, "inputs"), (1, 1), {"axis"}, {"keepdims"}),
    Opcode("reduce_max", _extreme(torch.amax), vector_work(1, "inputs"), (1, 1), optional=_REDUCE),
    Opcode("reduce_min", _extreme(torch.amin), vector_work(1, "inputs"), (1, 1), optional=_REDUCE),
    Opcode("argmax", _argument(torch.argmax), vector_work(2, "inputs"), (1, 1), {"axis"}, {"keepdims"}),
    Opcode("argmin", _argument(torch.argmin), vector_work(2, "inputs"), (1, 1), {"axis"}, {"keepdims"}),
    Opcode("scan", _scan, vector_work(2, "inputs"), (1, 1), {"axis", "kind"}),
    Opcode("sort", _sort, _sort_work, (1, 1), {"axis"}, {"descending"}, outputs=2),
    Opcode("softmax", _softmax, vector_work(10, "inputs"), (1, 1), {"axis"}),
    Opcode(
        "max_pool", _max_pool, _window_work, (1, 1), _WINDOW - {"ceil_mode"} | {"dilation"}, {"ceil_mode"}, outputs=2
    ),
    Opcode("avg_pool", _avg_pool, _window_work, (1, 1), optional=_AVERAGE),
    Opcode("avg_pool_grad", _avg_pool_grad, _window_work, (2, 2), optional=_AVERAGE),
]
