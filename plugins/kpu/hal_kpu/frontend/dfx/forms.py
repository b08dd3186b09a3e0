"""The opcodes of DFX 1.0 that the machine has under a more general form: what they take and what they give.

`frontend.expansion` writes them in general forms, which are what runs and what is timed. The values here are torch's
own, by which programs are checked.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import attrs
import torch
import torch.nn.functional as F
from torch import Tensor

from ...simulator.opcodes.table import OPCODES
from ...simulator.opcodes.work import Attributes, Opcode, Specs
from .records import DFXOp


def _names(names: Iterable[str]) -> frozenset[str]:
    return frozenset(names)


@attrs.frozen
class Form:
    """An opcode of DFX 1.0.

    Attributes:
        value: (inputs, attrs) -> outputs, on torch tensors. arity, required, optional, outputs: as of `Opcode`.
        macs: (input specs, output specs) -> multiply-accumulates.
    """

    value: Callable[[tuple[Tensor, ...], Attributes], tuple[Tensor, ...]]
    arity: tuple[int, int]
    required: frozenset[str] = attrs.field(default=frozenset(), converter=_names)
    optional: frozenset[str] = attrs.field(default=frozenset(), converter=_names)
    outputs: int = 1
    macs: Callable[[Specs, Specs], int] = lambda inputs, outputs: 0


def pair(size: Any) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def axes_of(attrs: Attributes) -> tuple[int, ...] | None:
    """The axes that a reduction names; None for all."""
    axis = attrs.get("axis")
    return (axis,) if isinstance(axis, int) else None if axis is None else tuple(axis)


def _one(function: Callable[..., Tensor]) -> Callable[[tuple[Tensor, ...], Attributes], tuple[Tensor, ...]]:
    return lambda inputs, attrs: (function(*inputs),)


def _reduction(function: Callable[..., Tensor]) -> Form:
    """Over all axes the result has shape (1,)."""

    def value(inputs: tuple[Tensor, ...], attrs: Attributes) -> tuple[Tensor, ...]:
        (x,), axes, keep = inputs, axes_of(attrs), attrs.get("keepdims", False)
        out = function(x, list(range(x.dim())) if axes is None else list(axes), keep)
        return (out.reshape(1) if axes is None and not keep else out,)

    return Form(value, (1, 1), optional={"axis", "keepdims"})


def _sum(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    return torch.sum(x, axes, keep, dtype=torch.int64 if x.dtype == torch.bool else x.dtype)


def _padded(operands: tuple[Tensor, ...], number: int) -> list[Tensor | None]:
    """Operands with None for those that were left out."""
    return [*operands, *[None] * (number - len(operands))]


def _layer_norm(inputs: tuple[Tensor, ...], attrs: Attributes) -> tuple[Tensor, ...]:
    x, weight, bias = _padded(inputs, 3)
    assert x is not None
    return (F.layer_norm(x, list(attrs["normalized_shape"]), weight, bias, attrs.get("eps", 1e-5)),)


def _batch_norm(inputs: tuple[Tensor, ...], attrs: Attributes) -> tuple[Tensor, ...]:
    """(x[n, c, h, w], weight, bias) by the batch's own statistics, (x, weight, bias, mean, variance) by given ones."""
    x, weight, bias, mean, variance = _padded(inputs, 5)
    assert x is not None
    if mean is not None and variance is None:
        raise ValueError("a mean without a variance")
    return (F.batch_norm(x, mean, variance, weight, bias, mean is None, 0.0, attrs.get("eps", 1e-5)),)


def window_of(attrs: Attributes) -> dict[str, Any]:
    """Of a convolution, with what 1.0 leaves out."""
    sizes = {name: pair(attrs.get(name, default)) for name, default in (("stride", 1), ("padding", 0), ("dilation", 1))}
    return sizes | {"groups": attrs.get("groups", 1)}


def pool_of(attrs: Attributes) -> dict[str, tuple[int, int]]:
    """Of a pooling, with what 1.0 leaves out."""
    kernel, stride = pair(attrs["kernel_size"]), attrs.get("stride")
    return {
        "kernel": kernel,
        "stride": kernel if stride is None else pair(stride),
        "padding": pair(attrs.get("padding", 0)),
    }


def _conv2d(inputs: tuple[Tensor, ...], attrs: Attributes) -> tuple[Tensor, ...]:
    x, weight, bias = _padded(inputs, 3)
    assert x is not None
    assert weight is not None
    return (F.conv2d(x, weight, bias, **window_of(attrs)),)


def _pool(function: Callable[..., Tensor]) -> Form:
    def value(inputs: tuple[Tensor, ...], attrs: Attributes) -> tuple[Tensor, ...]:
        return (function(inputs[0], *pool_of(attrs).values()),)

    return Form(value, (1, 1), {"kernel_size"}, {"stride", "padding"})


def activate(kind: str, x: Tensor, attrs: Attributes) -> Tensor:
    if kind == "gelu":
        return F.gelu(x, approximate=attrs.get("approximate", "none"))
    return {"relu": torch.relu, "silu": F.silu}[kind](x)


def _activation(kind: str) -> Form:
    optional = {"approximate"} if kind == "gelu" else set()
    return Form(lambda inputs, attrs: (activate(kind, inputs[0], attrs),), (1, 1), optional=optional)


def _fused(kind: str, operands: int) -> Form:
    """a[..., M, K] @ b[..., K, N] (+ bias[N]), then the activation."""

    def value(inputs: tuple[Tensor, ...], attrs: Attributes) -> tuple[Tensor, ...]:
        out = torch.matmul(inputs[0], inputs[1])
        return (activate(kind, out + inputs[2] if operands == 3 else out, attrs),)

    optional = {"M", "K", "N", "fused_from", *(["approximate"] if kind == "gelu" else [])}
    return Form(value, (operands, operands), optional=optional, macs=lambda i, o: o[0].numel * i[0].shape[-1])


def _copied(inputs: tuple[Tensor, ...], attrs: Attributes) -> tuple[Tensor, ...]:
    return (inputs[0].clone(),)


def _transpose(inputs: tuple[Tensor, ...], attrs: Attributes) -> tuple[Tensor, ...]:
    return (inputs[0].permute(order_of(inputs[0].dim(), attrs)),)


def order_of(ndim: int, attrs: Attributes) -> tuple[int, ...]:
    """The permutation of a transposition; all axes in reverse where none are named."""
    return tuple(reversed(range(ndim))) if attrs["axes"] is None else tuple(attrs["axes"])


FORMS: dict[str, Form] = {
    **dict.fromkeys(("load", "store", "prefetch", "copy"), Form(_copied, (1, 1))),
    **dict.fromkeys(("barrier", "nop"), Form(lambda inputs, attrs: (), (0, 1 << 20), outputs=0)),
    **{kind: _activation(kind) for kind in ("relu", "gelu", "silu")},
    "linear": Form(_one(F.linear), (2, 3), optional={"M", "K", "N"}, macs=lambda i, o: o[0].numel * i[1].shape[-1]),
    "conv2d": Form(
        _conv2d,
        (2, 3),
        optional={"stride", "padding", "dilation", "groups"},
        macs=lambda i, o: o[0].numel * math.prod(i[1].shape[1:]),
    ),
    "layer_norm": Form(_layer_norm, (1, 3), {"normalized_shape"}, {"eps"}),
    "batch_norm": Form(_batch_norm, (1, 5), optional={"eps", "training"}),
    "maxpool2d": _pool(F.max_pool2d),
    "avgpool2d": _pool(F.avg_pool2d),
    "adaptive_avgpool2d": Form(
        lambda inputs, attrs: (F.adaptive_avg_pool2d(inputs[0], pair(attrs["output_size"])),), (1, 1), {"output_size"}
    ),
    "sum": _reduction(_sum),
    "mean": _reduction(torch.mean),
    "max": _reduction(torch.amax),
    "min": _reduction(torch.amin),
    "transpose": Form(_transpose, (1, 1), {"axes"}),
    "concat": Form(lambda inputs, attrs: (torch.cat(inputs, attrs["dim"]),), (1, 1 << 20), {"dim"}),
    "flatten": Form(
        lambda inputs, attrs: (inputs[0].flatten(attrs.get("start_dim", 0), attrs.get("end_dim", -1)),),
        (1, 1),
        optional={"start_dim", "end_dim"},
    ),
    **{f"fused_matmul_bias_{kind}": _fused(kind, 3) for kind in ("relu", "gelu", "silu")},
    "fused_matmul_relu": _fused("relu", 2),
}
#: Of an opcode of both versions, the attribute by which 1.0's form is known.
_MARKS = {"sum": "axis", "transpose": "axes", "concat": "dim"}


def form_of(op: DFXOp) -> Form | None:
    """The form of DFX 1.0 that an operation has; None where it is a general one or unknown."""
    mark = _MARKS.get(op.opcode)
    return FORMS.get(op.opcode) if mark is None or mark in op.attrs else None


def definition(op: DFXOp) -> Form | Opcode | None:
    """What an operation is: a form of DFX 1.0 or a general opcode; None where nothing has its name."""
    return form_of(op) or OPCODES.get(op.opcode)


def macs_of(op: DFXOp, inputs: Specs, outputs: Specs) -> int:
    """Multiply-accumulates of an operation."""
    form = form_of(op)
    return OPCODES[op.opcode].work(inputs, outputs, op.attrs).macs if form is None else form.macs(inputs, outputs)
