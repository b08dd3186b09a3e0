"""How each operator of the tracing API lowers to DFX opcodes: `RULES[name](emitter, *values, **settings)`."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch

from ..emitter import Emitter, Value
from ..fx.lowerings import elementwise, normalization, reductions, shapes, windows

Rule: TypeAlias = Callable[..., Any]


def _opcode(name: str) -> Rule:
    return lambda e, *values, **attrs: e.one(name, *values, **attrs)


def _binary(name: str) -> Rule:
    """Two tensors, or one and a number on the side that `number_first` says."""

    def rule(e: Emitter, *values: Value, number: float | None = None, number_first: bool = False) -> Value:
        if number is None:
            return e.one(name, *values)
        return e.one(name, number, values[0]) if number_first else e.one(name, values[0], number)

    return rule


def _full_shape(x: Value, axes: Sequence[int] | None, keepdims: bool) -> tuple[int, ...] | None:
    """A reduction over everything has shape (1,); others have their own."""
    return (1,) if axes is None and not keepdims else None


def _sum(e: Emitter, x: Value, *, axes: Sequence[int] | None, keepdims: bool) -> Value:
    out = e.sum(x, axes if axes is not None else tuple(range(x.ndim)), keepdims)
    shape = _full_shape(x, axes, keepdims)
    return out if shape is None else e.reshape(out, shape)


def _mean(e: Emitter, x: Value, *, axes: Sequence[int] | None, keepdims: bool) -> Value:
    out = reductions.mean_axes(e, x, axes, keepdims)
    shape = _full_shape(x, axes, keepdims)
    return out if shape is None else e.reshape(out, shape)


def _matmul(e: Emitter, a: Value, b: Value) -> Value:
    """NumPy's matmul: vectors are rows on the left and columns on the right."""
    left = e.reshape(a, (1, *a.shape)) if a.ndim == 1 else a
    right = e.reshape(b, (*b.shape, 1)) if b.ndim == 1 else b
    out = e.matmul(left, right)
    shape = list(out.shape)
    if b.ndim == 1:
        shape.pop(-1)
    if a.ndim == 1:
        shape.pop(-1 if b.ndim == 1 else -2)
    return e.reshape(out, shape)


def _linear(e: Emitter, x: Value, weight: Value, bias: Value | None) -> Value:
    return e.matmul(x, e.transpose(weight, (1, 0)), bias)


def _layer_norm(
    e: Emitter, x: Value, weight: Value | None, bias: Value | None, *, shape: tuple[int, ...], eps: float
) -> Value:
    return normalization.layer_norm(e, x, shape, weight, bias, eps)[0]


def _batch_norm(
    e: Emitter, x: Value, mean: Value, variance: Value, weight: Value | None, bias: Value | None, *, eps: float
) -> Value:
    return normalization.batch_norm_inference(e, x, weight, bias, mean, variance, 0.0, eps)[0]


def _conv2d(e: Emitter, x: Value, weight: Value, bias: Value | None, **window: Any) -> Value:
    return e.one(
        "convolution", x, weight, *(() if bias is None else (bias,)), **window, transposed=False, output_padding=(0, 0)
    )


def _attention(
    e: Emitter, q: Value, k: Value, v: Value, mask: Value | None, *, is_causal: bool, scale: float | None
) -> Value:
    """softmax(q k^T scale + mask) v; a boolean mask keeps what is true; causal is top-left, as torch's."""
    factor = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    order = (*range(k.ndim - 2), k.ndim - 1, k.ndim - 2)
    scores = e.matmul(q * factor, e.transpose(k, order))
    if is_causal:
        rows = e.reshape(e.one("iota", length=q.shape[-2], dtype="int64"), (q.shape[-2], 1))
        seen = e.one("compare", rows, e.one("iota", length=k.shape[-2], dtype="int64"), predicate="ge")
        scores = _keep(e, scores, seen)
    if mask is not None:
        scores = _keep(e, scores, mask) if mask.dtype == torch.bool else scores + mask
    return e.matmul(e.one("softmax", scores, axis=scores.ndim - 1), v)


def _keep(e: Emitter, scores: Value, mask: Value) -> Value:
    nothing = e.one("fill", shape=(), scalar=-math.inf, dtype=str(scores.dtype).removeprefix("torch."))
    return e.one("where", mask, scores, nothing)


def _multi_head(
    e: Emitter,
    query: Value,
    key: Value,
    value: Value,
    in_weight: Value,
    out_weight: Value,
    in_bias: Value | None,
    out_bias: Value | None,
    mask: Value | None,
    *,
    heads: int,
    is_causal: bool,
) -> Value:
    """query, key, value [batch, length, width]; in_weight [3 width, width] as torch.nn.MultiheadAttention's."""
    width = query.shape[-1]

    def project(x: Value, part: int) -> Value:
        weight = e.slice(in_weight, 0, part * width, (part + 1) * width)
        bias = None if in_bias is None else e.slice(in_bias, 0, part * width, (part + 1) * width)
        out = _linear(e, x, weight, bias)
        return e.transpose(e.reshape(out, (*x.shape[:-1], heads, width // heads)), (0, 2, 1, 3))

    q, k, v = (project(x, part) for part, x in enumerate((query, key, value)))
    out = _attention(e, q, k, v, mask, is_causal=is_causal, scale=None)
    joined = e.reshape(e.transpose(out, (0, 2, 1, 3)), query.shape)
    return _linear(e, joined, out_weight, out_bias)


RULES: dict[str, Rule] = {
    "add": _binary("add"),
    "sub": _binary("sub"),
    "mul": _binary("mul"),
    "div": _binary("div"),
    "cast": lambda e, x, *, dtype: e.one("cast", x, dtype=dtype),
    "relu": elementwise.relu,
    "gelu": elementwise.gelu,
    "silu": elementwise.silu,
    "sigmoid": _opcode("sigmoid"),
    "tanh": _opcode("tanh"),
    "exp": _opcode("exp"),
    "log": _opcode("log"),
    "sqrt": _opcode("sqrt"),
    "softmax": _opcode("softmax"),
    "sum": _sum,
    "mean": _mean,
    "reshape": lambda e, x, *, shape: e.reshape(x, shape),
    "transpose": lambda e, x, *, axes: e.transpose(x, axes),
    "matmul": _matmul,
    "linear": _linear,
    "layer_norm": _layer_norm,
    "batch_norm2d": _batch_norm,
    "conv2d": _conv2d,
    "max_pool2d": lambda e, x, **window: e.many("max_pool", x, dilation=(1, 1), **window)[0],
    "avg_pool2d": _opcode("avg_pool"),
    "adaptive_avg_pool2d": windows.adaptive_avg_pool2d,
    "concat": lambda e, *parts, axis: shapes.cat(e, parts, axis),
    "scaled_dot_product_attention": _attention,
    "multi_head_attention": _multi_head,
}
