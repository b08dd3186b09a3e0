"""ATen's further distributions, from uniform and normal numbers: torch's distributions, though not eager's very
numbers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from ...emitter import Emitter, Number, Value
from ..registry import NotLowered, lowers
from .creation import _drawn, _on_host, _own_generator

aten = torch.ops.aten
_EXACT = 1 << 24  # whole numbers up to here are exact in float32


def _open_uniform(e: Emitter, x: Value) -> Value:
    """In (0, 1]: its logarithm is finite."""
    return 1.0 - _drawn(e, "uniform", x.shape, x.dtype)


@lowers(aten.exponential.default)
def exponential(e: Emitter, x: Value, rate: float = 1.0, *, generator: Any = None) -> Value:
    _own_generator(generator)
    return e.one("log", _open_uniform(e, x)) * (-1 / rate)


@lowers(aten.geometric.default)
def geometric(e: Emitter, x: Value, probability: float, *, generator: Any = None) -> Value:
    """How many draws until one succeeds, 1 at least."""
    _own_generator(generator)
    if not 0 < probability < 1:
        raise NotLowered("with a certain outcome")
    count = e.one("ceil", e.one("log", _open_uniform(e, x)) / math.log1p(-probability))
    return e.one("maximum", count, 1.0)


@lowers(aten.cauchy.default)
def cauchy(e: Emitter, x: Value, median: float = 0.0, sigma: float = 1.0, *, generator: Any = None) -> Value:
    _own_generator(generator)
    angle = (_drawn(e, "uniform", x.shape, x.dtype) - 0.5) * math.pi
    return e.one("sin", angle) / e.one("cos", angle) * sigma + median


@lowers(aten.log_normal.default)
def log_normal(e: Emitter, x: Value, mean: float = 1.0, std: float = 2.0, *, generator: Any = None) -> Value:
    _own_generator(generator)
    return e.one("exp", _drawn(e, "normal", x.shape, x.dtype) * std + mean)


def _whole(e: Emitter, low: Number, high: Number, shape: Sequence[int], dtype: torch.dtype) -> Value:
    """floor of uniform numbers in [low, high); ranges that float32 cannot count are left to the host."""
    if high - low > _EXACT or max(abs(low), abs(high)) > _EXACT:
        raise NotLowered("over more than 2^24 numbers")
    drawn = _drawn(e, "uniform", shape, torch.float32) * float(high - low)
    return e.cast(e.one("minimum", e.one("floor", drawn), float(high - low - 1)) + float(low), dtype)


@lowers(aten.randint.default)
def randint(e: Emitter, high: int, shape: Sequence[int], *, dtype: torch.dtype | None = None, **options: Any) -> Value:
    return randint_low(e, 0, high, shape, dtype=dtype, **options)


@lowers(aten.randint.low)
def randint_low(
    e: Emitter, low: int, high: int, shape: Sequence[int], *, dtype: torch.dtype | None = None, **options: Any
) -> Value:
    _on_host(options)
    return _whole(e, low, high, shape, dtype or torch.int64)


@lowers(aten.randint_like.default)
def randint_like(e: Emitter, x: Value, high: int, *, dtype: torch.dtype | None = None, **options: Any) -> Value:
    return randint_like_low(e, x, 0, high, dtype=dtype, **options)


@lowers(aten.randint_like.low_dtype)
def randint_like_low(
    e: Emitter, x: Value, low: int, high: int, *, dtype: torch.dtype | None = None, **options: Any
) -> Value:
    _on_host(options)
    return _whole(e, low, high, x.shape, dtype or x.dtype)
