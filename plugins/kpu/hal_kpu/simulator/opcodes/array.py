"""Operations of the PE array: matrix products, and convolutions as matrix products over gathered windows."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from attrs import evolve
from torch import Tensor

from .specs import DTYPE_BYTES
from .work import Attributes, Opcode, Specs, Work, traffic


def _matmul(inputs: tuple[Tensor, ...], attrs: Attributes) -> tuple[Tensor, ...]:
    """a[..., M, K] @ b[..., K, N]; a third input starts the accumulators: any shape that broadcasts to the result.

    With transpose_a the first comes as [..., K, M], with transpose_b the second as [..., N, K]: the streamer feeds
    columns in place of rows. With accumulators = "int32", int8 operands give what the accumulators hold.
    """
    a, b = inputs[:2]
    a = a.transpose(-1, -2) if attrs.get("transpose_a") else a
    b = b.transpose(-1, -2) if attrs.get("transpose_b") else b
    if attrs.get("accumulators") == "int32":
        return (torch._int_mm(a, b),)
    if len(inputs) == 2:
        return (torch.matmul(a, b),)
    if a.dim() == b.dim() == 2 and inputs[2].dim() <= 2 and inputs[2].dtype == a.dtype:
        return (torch.addmm(inputs[2], a, b),)
    return (torch.matmul(a, b) + inputs[2],)


def _matmul_work(inputs: Specs, outputs: Specs, attrs: Attributes) -> Work:
    *batch, M, N = outputs[0].shape
    K = inputs[0].shape[-2 if attrs.get("transpose_a") else -1]
    return Work(engine="array", batch=math.prod(batch), M=M, N=N, K=K, **traffic(inputs, outputs))


def _grouped(inputs: tuple[Tensor, ...], attrs: Attributes) -> tuple[Tensor, ...]:
    """(a, b, int32 ends of the groups along the axis that is cut): one product for each group, as torch._grouped_mm.

    a[rows, K] with b[groups, K, N] cuts the rows; a[groups, M, K] with b[K, columns] cuts the columns; a[M, inner] with
    b[inner, N] cuts the inner axis, and gives [groups, M, N]. What lies beyond the last end is zero.
    """
    a, b, ends = inputs
    shape = grouped_shape(a.shape, b.shape, ends.shape[0])
    if ends.device.type == "meta":
        return (a.new_empty(shape),)
    out, begin = a.new_zeros(shape), 0
    for group, end in enumerate(ends.tolist()):
        part = slice(begin, end)
        if a.dim() == b.dim():
            out[group] = a[:, part] @ b[part]
        elif a.dim() == 2:
            out[part] = a[part] @ b[group]
        else:
            out[:, part] = a[group] @ b[:, part]
        begin = end
    return (out,)


def grouped_shape(a: Sequence[int], b: Sequence[int], groups: int) -> tuple[int, ...]:
    """Of a grouped product's result."""
    return (groups, a[-2], b[-1]) if len(a) == len(b) else (a[-2], b[-1])


def _grouped_work(inputs: Specs, outputs: Specs, attrs: Attributes) -> Work:
    """As many products as groups, the axis that is cut spread evenly over them: where the ends lie is known only when
    it runs. The multiply-accumulates are the same for all ends that reach the last row.
    """
    a, b, ends = inputs
    groups = ends.shape[0]
    cut, size = ("K", a.shape[1]) if len(a.shape) == len(b.shape) else ("M", a.shape[0])
    if len(a.shape) > len(b.shape):
        cut, size = "N", b.shape[1]
    sizes = {"M": a.shape[-2], "N": b.shape[-1], "K": a.shape[-1]}
    short, more = divmod(size, max(groups, 1))
    moved, works = traffic(inputs, outputs), []
    for number, extent in ((groups - more, short), (more, short + 1)):
        if number and extent:
            one = sizes | {cut: extent}
            read = number * (one["M"] * one["K"] + one["K"] * one["N"]) * DTYPE_BYTES[a.dtype]
            works.append(
                Work(
                    engine="array",
                    batch=number,
                    M=one["M"],
                    N=one["N"],
                    K=one["K"],
                    reads_bytes=read,
                    writes_bytes=number * one["M"] * one["N"] * DTYPE_BYTES[a.dtype],
                    dtype=a.dtype,
                )
            )
    if not works:
        return Work(engine="vector", elements=outputs[0].numel, passes=1, **moved)
    return evolve(works[0], rest=works[1]) if len(works) == 2 else works[0]


def _convolution(inputs: tuple[Tensor, ...], attrs: Attributes) -> tuple[Tensor, ...]:
    """x[n, c_in, ...] with w[c_out, c_in / groups, ...] and, where given, a bias [c_out], over 1 to 3 axes of space.

    Transposed: w[c_in, c_out / groups, ...], as torch.conv_transpose2d.
    """
    x, w = inputs[:2]
    bias = inputs[2] if len(inputs) == 3 else None
    return (
        torch.convolution(
            x,
            w,
            bias,
            list(attrs["stride"]),
            list(attrs["padding"]),
            list(attrs["dilation"]),
            attrs["transposed"],
            list(attrs["output_padding"]),
            attrs["groups"],
        ),
    )


def _window_work(
    data: Specs, weight: Specs, out: Specs, groups: int, transposed: bool, reads: Specs, writes: Specs
) -> Work:
    """A convolution as `groups` products [positions, window] by [window, channels]."""
    batch, space = out[0].shape[0], math.prod((data if transposed else out)[0].shape[2:])
    first, second, *window = weight[0].shape  # [c_out, c_in / groups, ...], or [c_in, c_out / groups, ...]
    if transposed:
        M, N, K = batch * space, second * math.prod(window), first // groups
    else:
        M, N, K = batch * space, first // groups, second * math.prod(window)
    return Work(engine="array", batch=groups, M=M, N=N, K=K, **traffic(reads, writes))


def _convolution_work(inputs: Specs, outputs: Specs, attrs: Attributes) -> Work:
    return _window_work(inputs[:1], inputs[1:2], outputs, attrs["groups"], attrs["transposed"], inputs, outputs)


def _convolution_grad(which: int) -> Opcode:
    """Gradient of a convolution: inputs (grad_out, x, w) -> the gradient of x (which = 0) or of w (which = 1)."""

    def value(inputs: tuple[Tensor, ...], attrs: Attributes) -> tuple[Tensor, ...]:
        mask = [index == which for index in range(3)]
        grads = torch.ops.aten.convolution_backward.default(
            *inputs,
            None,
            list(attrs["stride"]),
            list(attrs["padding"]),
            list(attrs["dilation"]),
            attrs["transposed"],
            list(attrs["output_padding"]),
            attrs["groups"],
            mask,
        )
        return (grads[which],)

    def work(inputs: Specs, outputs: Specs, attrs: Attributes) -> Work:
        grad, x, w = inputs
        groups, transposed = attrs["groups"], attrs["transposed"]
        if which == 0:  # the opposite convolution, of grad with w
            return _window_work((grad,), (w,), (x,), groups, not transposed, (grad, w), outputs)
        # one product per group: windows of one side, [channels x window, positions] by [positions, channels]
        wide, narrow = (grad, x) if transposed else (x, grad)
        positions = narrow.shape[0] * math.prod(narrow.shape[2:])
        rows = wide.shape[1] // groups * math.prod(w.shape[2:])
        size = {"M": rows, "N": narrow.shape[1] // groups, "K": positions}
        return Work(engine="array", batch=groups, **size, **traffic((grad, x), outputs))

    name = ("convolution_input_grad", "convolution_weight_grad")[which]
    return Opcode(name, value, work, arity=(3, 3), required=_WINDOW)


_PRODUCT = frozenset({"M", "K", "N", "transpose_a", "transpose_b", "accumulators"})
_WINDOW = frozenset({"stride", "padding", "dilation", "transposed", "output_padding", "groups"})

ARRAY = [
    Opcode("matmul", _matmul, _matmul_work, (2, 3), optional=_PRODUCT),
    Opcode("grouped_matmul", _grouped, _grouped_work, (3, 3)),
    Opcode("convolution", _convolution, _convolution_work, (2, 3), required=_WINDOW),
    _convolution_grad(0),
    _convolution_grad(1),
]
