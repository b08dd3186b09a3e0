"""ATen's new tensors: constants, ranges, random numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from ...emitter import Emitter, Number, Value
from ..registry import NotLowered, lowers

aten, prims = torch.ops.aten, torch.ops.prims


def _name(dtype: torch.dtype | None) -> str:
    return str(dtype or torch.get_default_dtype()).removeprefix("torch.")


def _on_host(options: dict[str, Any]) -> None:
    if options.get("device") not in (None, torch.device("cpu")) or options.get("layout") not in (None, torch.strided):
        raise NotLowered("on another device or in another layout")


@lowers(aten.full.default)
def full(
    e: Emitter, shape: Sequence[int], number: Number, *, dtype: torch.dtype | None = None, **options: Any
) -> Value:
    _on_host(options)
    if dtype is None:
        natural = {bool: torch.bool, int: torch.int64}
        dtype = natural.get(type(number), torch.get_default_dtype())
    return e.one("fill", shape=tuple(shape), scalar=number, dtype=_name(dtype))


@lowers(aten.full_like.default)
def full_like(e: Emitter, x: Value, number: Number, *, dtype: torch.dtype | None = None, **options: Any) -> Value:
    _on_host(options)
    return e.one("fill", shape=x.shape, scalar=number, dtype=_name(dtype or x.dtype))


@lowers(aten.scalar_tensor.default)
def scalar_tensor(e: Emitter, number: Number, *, dtype: torch.dtype | None = None, **options: Any) -> Value:
    _on_host(options)
    return e.one("fill", shape=(), scalar=number, dtype=_name(dtype))


@lowers(aten.empty.memory_format, aten.empty_strided.default, aten.empty_permuted.default)
def empty(e: Emitter, shape: Sequence[int], *order: Any, dtype: torch.dtype | None = None, **options: Any) -> Value:
    """Zeros, for memory whose content is undefined."""
    _on_host(options)
    return e.one("fill", shape=tuple(shape), scalar=0, dtype=_name(dtype))


@lowers(aten.new_empty_strided.default)
def new_empty(e: Emitter, x: Value, shape: Sequence[int], *order: Any, dtype: Any = None, **options: Any) -> Value:
    _on_host(options)
    return e.one("fill", shape=tuple(shape), scalar=0, dtype=_name(dtype or x.dtype))


@lowers(aten.arange.start_step)
def arange(
    e: Emitter, start: Number, stop: Number, step: Number = 1, *, dtype: torch.dtype | None = None, **options: Any
) -> Value:
    _on_host(options)
    whole = all(isinstance(number, int) for number in (start, stop, step))
    length = max(0, -(-(stop - start) // step) if whole else math.ceil((stop - start) / step))
    kind = dtype or (torch.int64 if whole else torch.get_default_dtype())
    return e.one("iota", length=length, start=start, step=step, dtype=_name(kind))


@lowers(prims.iota.default)
def iota(e: Emitter, length: int, *, start: int, step: int, dtype: torch.dtype, **options: Any) -> Value:
    return e.one("iota", length=length, start=start, step=step, dtype=_name(dtype))


def _random(kind: str) -> Any:
    def draw(e: Emitter, shape: Sequence[int], *, dtype: torch.dtype | None = None, **options: Any) -> Value:
        _on_host(options)
        if options.get("generator") is not None:
            raise NotLowered("from a generator of its own")
        return e.one("random", shape=tuple(shape), kind=kind, dtype=_name(dtype))

    return draw


lowers(aten.rand.default)(_random("uniform"))
lowers(aten.randn.default)(_random("normal"))


@lowers(aten.bernoulli.p)
def bernoulli(e: Emitter, x: Value, probability: float = 0.5, *, generator: Any = None) -> Value:
    if generator is not None:
        raise NotLowered("from a generator of its own")
    return e.one("random", shape=x.shape, kind="bernoulli", probability=probability, dtype=_name(x.dtype))


@lowers(aten.native_dropout.default)
def native_dropout(e: Emitter, x: Value, probability: float, train: bool | None) -> tuple[Value, Value]:
    """(x with elements dropped, what was kept), from the same draws as torch's eager dropout."""
    if train is False or probability == 0:
        return e.copy(x), e.one("fill", shape=x.shape, scalar=True, dtype="bool")
    kept = e.one("random", shape=x.shape, kind="bernoulli", probability=1 - probability, dtype=_name(x.dtype))
    scale = 0.0 if probability == 1 else 1 / (1 - probability)
    return x * kept * scale, e.cast(kept, torch.bool)


def _drawn(e: Emitter, kind: str, shape: Sequence[int], dtype: torch.dtype) -> Value:
    if not dtype.is_floating_point:
        raise NotLowered("of whole numbers")
    return e.one("random", shape=tuple(shape), kind=kind, dtype=_name(dtype))


@lowers(aten.rand_like.default)
def rand_like(e: Emitter, x: Value, *, dtype: torch.dtype | None = None, **options: Any) -> Value:
    _on_host(options)
    return _drawn(e, "uniform", x.shape, dtype or x.dtype)


@lowers(aten.randn_like.default)
def randn_like(e: Emitter, x: Value, *, dtype: torch.dtype | None = None, **options: Any) -> Value:
    _on_host(options)
    return _drawn(e, "normal", x.shape, dtype or x.dtype)


def _own_generator(generator: Any) -> None:
    if generator is not None:
        raise NotLowered("from a generator of its own")


@lowers(aten.uniform.default)
def uniform(e: Emitter, x: Value, low: float = 0.0, high: float = 1.0, *, generator: Any = None) -> Value:
    _own_generator(generator)
    return _drawn(e, "uniform", x.shape, x.dtype) * (high - low) + low


@lowers(aten.normal_functional.default)
def normal_functional(e: Emitter, x: Value, mean: float = 0.0, std: float = 1.0, *, generator: Any = None) -> Value:
    _own_generator(generator)
    return _drawn(e, "normal", x.shape, x.dtype) * std + mean


@lowers(aten.normal.Tensor_Tensor, aten.normal.Tensor_float, aten.normal.float_Tensor)
def normal(e: Emitter, mean: Value | float, std: Value | float = 1.0, *, generator: Any = None) -> Value:
    _own_generator(generator)
    given = [one.tensor for one in (mean, std) if isinstance(one, Value)]
    shape = torch.broadcast_shapes(*(one.shape for one in given))
    return _drawn(e, "normal", shape, given[0].dtype) * std + mean


@lowers(aten.normal.float_float)
def normal_numbers(
    e: Emitter,
    mean: float,
    std: float,
    shape: Sequence[int],
    *,
    generator: Any = None,
    dtype: Any = None,
    **options: Any,
) -> Value:
    _on_host(options)
    _own_generator(generator)
    return _drawn(e, "normal", shape, dtype or torch.get_default_dtype()) * std + mean
