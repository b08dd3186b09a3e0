"""ATen's casts and copies."""

from __future__ import annotations

from typing import Any

import torch

from ...emitter import Emitter, Number, Value
from ..registry import NotLowered, lowers

aten, prims = torch.ops.aten, torch.ops.prims


@lowers(aten._to_copy.default)
def to_copy(e: Emitter, x: Value, dtype: torch.dtype | None = None, **others: Any) -> Value:
    if others.get("device") not in (None, torch.device("cpu")) or others.get("layout") not in (None, torch.strided):
        raise NotLowered("to another device or layout")
    return e.one("cast", x, dtype=str(dtype or x.dtype).removeprefix("torch."))


@lowers(prims.convert_element_type.default)
def convert_element_type(e: Emitter, x: Value, dtype: torch.dtype) -> Value:
    return e.one("cast", x, dtype=str(dtype).removeprefix("torch."))


@lowers(aten.clone.default, aten.lift_fresh_copy.default)
def clone(e: Emitter, x: Value, memory_format: Any = None) -> Value:
    return e.copy(x)


@lowers(aten.alias.default, aten.detach.default, aten.lift_fresh.default)
def alias(e: Emitter, x: Value) -> Value:
    return x


@lowers(aten.copy.default)
def copy(e: Emitter, x: Value, source: Value, non_blocking: bool = False) -> Value:
    same = e.cast(e.broadcast(source, x.shape), x.dtype)
    return e.copy(same) if same is source else same


@lowers(aten.fill.Scalar, aten.fill.Tensor)
def fill(e: Emitter, x: Value, scalar: Value | Number) -> Value:
    if isinstance(scalar, Value):
        return e.broadcast(e.cast(scalar, x.dtype), x.shape)
    return e.one("fill", shape=x.shape, scalar=scalar, dtype=str(x.dtype).removeprefix("torch."))
