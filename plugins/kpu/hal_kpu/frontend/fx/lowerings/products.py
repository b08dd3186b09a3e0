"""ATen's matrix products and convolutions, on the PE array."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ...emitter import Emitter, Number, Value
from ..registry import NotLowered, lowers

aten = torch.ops.aten


@lowers(aten.mm.default, aten.bmm.default)
def product(e: Emitter, a: Value, b: Value) -> Value:
    return e.matmul(a, b)


@lowers(aten.addmm.default, aten.baddbmm.default)
def product_and_sum(e: Emitter, start: Value, a: Value, b: Value, *, beta: Number = 1, alpha: Number = 1) -> Value:
    """The accumulators start from the summand; factors go through the vector unit."""
    if alpha == 1 and beta == 1 and start.dtype == a.dtype:
        return e.matmul(a, b, start)
    out = e.matmul(a, b)
    out = out if alpha == 1 else out * alpha
    return out if beta == 0 else out + (start if beta == 1 else start * beta)


@lowers(aten._int_mm.default)
def integer_product(e: Emitter, a: Value, b: Value) -> Value:
    """int8 operands, on the arrays that multiply them; the sums are int32."""
    return e.matmul(a, b, accumulators="int32")


@lowers(aten._grouped_mm.default)
def grouped_product(
    e: Emitter,
    a: Value,
    b: Value,
    ends: Value | None = None,
    bias: Value | None = None,
    out_dtype: torch.dtype | None = None,
) -> Value:
    """Products of experts: one for each group of rows. Without ends the groups are equal, and it is a plain batch."""
    if bias is not None or out_dtype not in (None, a.dtype):
        raise NotLowered("with a bias" if bias is not None else f"with a result in {out_dtype}")
    return e.matmul(a, b) if ends is None else e.one("grouped_matmul", a, b, ends)


@lowers(aten.dot.default, aten.vdot.default)
def dot(e: Emitter, a: Value, b: Value) -> Value:
    return e.reshape(e.matmul(e.reshape(a, (1, a.shape[0])), e.reshape(b, (b.shape[0], 1))), ())


@lowers(aten.mv.default)
def mv(e: Emitter, a: Value, x: Value) -> Value:
    return e.reshape(e.matmul(a, e.reshape(x, (x.shape[0], 1))), (a.shape[0],))


def _window(
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
    space: int,
) -> dict[str, object]:
    def full(sizes: Sequence[int]) -> tuple[int, ...]:
        return tuple(sizes) * (space if len(sizes) == 1 else 1)

    return {
        "stride": full(stride),
        "padding": full(padding),
        "dilation": full(dilation),
        "transposed": transposed,
        "output_padding": full(output_padding or [0]),
        "groups": groups,
    }


@lowers(aten.convolution.default)
def convolution(
    e: Emitter,
    x: Value,
    w: Value,
    bias: Value | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
) -> Value:
    window = _window(stride, padding, dilation, transposed, output_padding, groups, w.ndim - 2)
    batched = e.reshape(x, (1, *x.shape)) if x.ndim == w.ndim - 1 else x
    out = e.one("convolution", batched, w, *(() if bias is None else (bias,)), **window)
    return out if batched is x else e.reshape(out, out.shape[1:])


@lowers(aten.convolution_backward.default)
def convolution_backward(
    e: Emitter,
    grad: Value,
    x: Value,
    w: Value,
    bias_sizes: Sequence[int] | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
    mask: Sequence[bool],
) -> tuple[Value | None, ...]:
    if x.ndim != w.ndim:
        raise NotLowered("without a batch axis")
    window = _window(stride, padding, dilation, transposed, output_padding, groups, w.ndim - 2)
    return (
        e.one("convolution_input_grad", grad, x, w, **window) if mask[0] else None,
        e.one("convolution_weight_grad", grad, x, w, **window) if mask[1] else None,
        e.sum(grad, (0, *range(2, grad.ndim))) if mask[2] else None,
    )


@lowers(aten.addbmm.default)
def product_sum(e: Emitter, start: Value, a: Value, b: Value, *, beta: Number = 1, alpha: Number = 1) -> Value:
    """The sum over a batch of products: one product over batch and inner axis together."""
    batch, rows, inner = a.shape
    wide = e.reshape(e.transpose(a, (1, 0, 2)), (rows, batch * inner))
    return product_and_sum(e, start, wide, e.reshape(b, (batch * inner, b.shape[2])), beta=beta, alpha=alpha)


@lowers(aten._trilinear.default)
def trilinear(
    e: Emitter,
    a: Value,
    b: Value,
    c: Value,
    new_a: Sequence[int],
    new_b: Sequence[int],
    new_c: Sequence[int],
    summed: Sequence[int],
    unroll: int = 1,
) -> Value:
    """Three factors with axes of size 1 put in, multiplied and summed."""

    def widened(x: Value, axes: Sequence[int]) -> Value:
        sizes = list(x.shape)
        for axis in sorted(axes):
            sizes.insert(axis, 1)
        return e.reshape(x, sizes)

    return e.sum(widened(a, new_a) * widened(b, new_b) * widened(c, new_c), tuple(summed))
