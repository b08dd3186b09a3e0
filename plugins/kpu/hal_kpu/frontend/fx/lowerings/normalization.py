"""ATen's normalizations, as vector operations."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from ...emitter import Emitter, Value
from ..registry import lowers
from .elementwise import widen
from .reductions import moment

aten = torch.ops.aten


def _affine(e: Emitter, x: Value, weight: Value | None, bias: Value | None, shape: Sequence[int]) -> Value:
    x = x if weight is None else x * e.reshape(weight, shape)
    return x if bias is None else x + e.reshape(bias, shape)


@lowers(aten.native_layer_norm.default)
def layer_norm(
    e: Emitter, x: Value, shape: Sequence[int], weight: Value | None, bias: Value | None, eps: float
) -> tuple[Value, Value, Value]:
    """(result, mean, 1/deviation), over the last axes."""
    kind, x = x.dtype, widen(e, x)
    axes = tuple(range(x.ndim - len(shape), x.ndim))
    variance, mean = moment(e, x, axes, 0, keepdim=True)
    scale = e.one("rsqrt", variance + eps)
    out = _affine(e, (x - mean) * scale, weight, bias, tuple(shape))
    return e.cast(out, kind), e.cast(mean, kind), e.cast(scale, kind)


@lowers(aten.native_group_norm.default)
def group_norm(
    e: Emitter, x: Value, weight: Value | None, bias: Value | None, n: int, c: int, space: int, groups: int, eps: float
) -> tuple[Value, Value, Value]:
    kind = x.dtype
    grouped = widen(e, e.reshape(x, (n, groups, c // groups * space)))
    variance, mean = moment(e, grouped, (2,), 0, keepdim=True)
    scale = e.one("rsqrt", variance + eps)
    out = e.reshape((grouped - mean) * scale, x.shape)
    out = _affine(e, out, weight, bias, (1, c, *(1,) * (x.ndim - 2)))
    return e.cast(out, kind), e.cast(e.reshape(mean, (n, groups)), kind), e.cast(e.reshape(scale, (n, groups)), kind)


def _channels(x: Value) -> tuple[int, ...]:
    return (1, x.shape[1], *(1,) * (x.ndim - 2))


def _batch_statistics(e: Emitter, x: Value, eps: float) -> tuple[Value, Value, Value]:
    """(variance, mean, 1/deviation) of each channel, [1, c, 1, ...]."""
    variance, mean = moment(e, x, (0, *range(2, x.ndim)), 0, keepdim=True)
    return variance, mean, e.one("rsqrt", variance + eps)


@lowers(aten._native_batch_norm_legit_no_training.default)
def batch_norm_inference(
    e: Emitter,
    x: Value,
    weight: Value | None,
    bias: Value | None,
    mean: Value,
    variance: Value,
    momentum: float,
    eps: float,
) -> tuple[Value, Value, Value]:
    kind, shape = x.dtype, _channels(x)
    weight, bias = (None if one is None else widen(e, one) for one in (weight, bias))
    scale = e.one("rsqrt", widen(e, variance) + eps)
    scale = scale if weight is None else scale * weight
    offset = widen(e, mean) * scale
    offset = -offset if bias is None else bias - offset
    out = e.cast(widen(e, x) * e.reshape(scale, shape) + e.reshape(offset, shape), kind)
    empty = e.one("fill", shape=(0,), scalar=0, dtype=str(kind).removeprefix("torch."))
    return out, empty, empty


@lowers(aten._native_batch_norm_legit.no_stats)
def batch_norm_no_stats(
    e: Emitter, x: Value, weight: Value | None, bias: Value | None, training: bool, momentum: float, eps: float
) -> tuple[Value, Value, Value]:
    kind, shape, x = x.dtype, _channels(x), widen(e, x)
    _, mean, scale = _batch_statistics(e, x, eps)
    out = e.cast(_affine(e, (x - mean) * scale, weight, bias, shape), kind)
    return out, e.cast(e.reshape(mean, (shape[1],)), kind), e.cast(e.reshape(scale, (shape[1],)), kind)


@lowers(aten._native_batch_norm_legit_functional.default)
def batch_norm_training(
    e: Emitter,
    x: Value,
    weight: Value | None,
    bias: Value | None,
    mean: Value,
    variance: Value,
    training: bool,
    momentum: float,
    eps: float,
) -> tuple[Value, Value, Value, Value, Value]:
    """(result, mean, 1/deviation, new running mean, new running variance): the running variance divides by count -
    1.
    """
    if not training:
        out, first, second = batch_norm_inference(e, x, weight, bias, mean, variance, momentum, eps)
        return out, first, second, mean, variance
    kind, shape, x = x.dtype, _channels(x), widen(e, x)
    here, centre, scale = _batch_statistics(e, x, eps)
    out = e.cast(_affine(e, (x - centre) * scale, weight, bias, shape), kind)
    flat = (shape[1],)
    count = math.prod(x.shape) // max(shape[1], 1)
    unbiased = e.reshape(here, flat) * (count / max(count - 1, 1))
    new_mean = widen(e, mean) * (1 - momentum) + e.reshape(centre, flat) * momentum
    new_variance = widen(e, variance) * (1 - momentum) + unbiased * momentum
    saved = [e.cast(e.reshape(one, flat), kind) for one in (centre, scale)]
    return out, saved[0], saved[1], new_mean, new_variance


@lowers(aten._batch_norm_with_update_functional.default)
def batch_norm_with_update(
    e: Emitter,
    x: Value,
    weight: Value | None,
    bias: Value | None,
    mean: Value,
    variance: Value,
    momentum: float,
    eps: float,
) -> tuple[Value, ...]:
    out, centre, scale, *running = batch_norm_training(e, x, weight, bias, mean, variance, True, momentum, eps)
    reserve = e.one("fill", shape=(0,), scalar=0, dtype="uint8")
    return out, centre, scale, reserve, *running
