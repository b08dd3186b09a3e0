"""Operations of the block mover: values are carried elsewhere and do not change."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .work import Attributes, Opcode, Specs, Work, mover_work, no_work, traffic


def _reshape(inputs: tuple[Tensor, ...], attrs: Attributes) -> tuple[Tensor, ...]:
    return (inputs[0].reshape(tuple(attrs["shape"])),)


def _transpose(inputs: tuple[Tensor, ...], attrs: Attributes) -> tuple[Tensor, ...]:
    """Axis i of the result is axis permutation[i] of the input."""
    return (inputs[0].permute(tuple(attrs["permutation"])),)


def _broadcast(inputs: tuple[Tensor, ...], attrs: Attributes) -> tuple[Tensor, ...]:
    return (inputs[0].expand(tuple(attrs["shape"])),)


def _part(x: Tensor, attrs: Attributes) -> Tensor:
    """x[..., start:stop:step, ...] along `axis`; step > 0."""
    place = [slice(None)] * x.dim()
    place[attrs["axis"]] = slice(attrs["start"], attrs["stop"], attrs.get("step", 1))
    return x[tuple(place)]


def _slice(inputs: tuple[Tensor, ...], attrs: Attributes) -> tuple[Tensor, ...]:
    return (_part(inputs[0], attrs),)


def _slice_update(inputs: tuple[Tensor, ...], attrs: Attributes) -> tuple[Tensor, ...]:
    """(x, part) -> x with part written over x[..., start:stop:step, ...]."""
    out = inputs[0].clone(memory_format=torch.contiguous_format)
    _part(out, attrs).copy_(inputs[1])
    return (out,)


def _concat(inputs: tuple[Tensor, ...], attrs: Attributes) -> tuple[Tensor, ...]:
    return (torch.cat(inputs, attrs["axis"]),)


def _pad(inputs: tuple[Tensor, ...], attrs: Attributes) -> tuple[Tensor, ...]:
    """`widths` as torch.nn.functional.pad: (before, after) of the last axis first; negative ones cut. Filled by
    `fill`.
    """
    return (F.pad(inputs[0], list(attrs["widths"]), value=attrs.get("fill", 0)),)


def _reverse(inputs: tuple[Tensor, ...], attrs: Attributes) -> tuple[Tensor, ...]:
    return (inputs[0].flip(tuple(attrs["axes"])),)


def _gather(inputs: tuple[Tensor, ...], attrs: Attributes) -> tuple[Tensor, ...]:
    """(x, int64 index) -> along `axis`, the element each index names, as torch.gather."""
    return (torch.gather(inputs[0], attrs["axis"], inputs[1]),)


def _scatter(inputs: tuple[Tensor, ...], attrs: Attributes) -> tuple[Tensor, ...]:
    """(x, int64 index, source) -> x with source carried to the places named, as torch.scatter.

    combine: "replace", or "add", "mul", "max", "min", "mean" with what lies there already (`include_self`, else
        without).
    """
    x, index, source = inputs
    if attrs["combine"] == "replace":
        return (torch.scatter(x, attrs["axis"], index, source),)
    kind = {"add": "sum", "mul": "prod", "max": "amax", "min": "amin", "mean": "mean"}[attrs["combine"]]
    self_too = attrs.get("include_self", True)
    return (torch.scatter_reduce(x, attrs["axis"], index, source, kind, include_self=self_too),)


def _places(indices: tuple[Tensor, ...], axes: Sequence[int]) -> list[Any]:
    """Integer index tensors at their axes, None elsewhere, as aten.index wants them."""
    places: list[Any] = [None] * (max(axes) + 1)
    for axis, index in zip(axes, indices, strict=True):
        places[axis] = index
    return places


def _index(inputs: tuple[Tensor, ...], attrs: Attributes) -> tuple[Tensor, ...]:
    """(x, integer indices...) -> x[indices at `axes`], as advanced indexing. Rows of a table: axes (0,)."""
    return (torch.ops.aten.index.Tensor(inputs[0], _places(inputs[1:], attrs["axes"])),)


def _index_put(inputs: tuple[Tensor, ...], attrs: Attributes) -> tuple[Tensor, ...]:
    """(x, values, integer indices...) -> x with values at x[indices at `axes`]; added there with `accumulate`."""
    places = _places(inputs[2:], attrs["axes"])
    return (torch.ops.aten.index_put.default(inputs[0], places, inputs[1], attrs.get("accumulate", False)),)


def _strided(inputs: tuple[Tensor, ...], attrs: Attributes) -> tuple[Tensor, ...]:
    """Overlapping or skipping windows: element i of the result is offset + sum(i * strides) of the flat input."""
    flat = inputs[0].contiguous()
    return (torch.as_strided(flat, tuple(attrs["shape"]), tuple(attrs["strides"]), attrs.get("offset", 0)),)


def _fill(inputs: tuple[Tensor, ...], attrs: Attributes) -> tuple[Tensor, ...]:
    """A tensor of one number."""
    return (torch.full(tuple(attrs["shape"]), attrs["scalar"], dtype=getattr(torch, attrs["dtype"])),)


def _iota(inputs: tuple[Tensor, ...], attrs: Attributes) -> tuple[Tensor, ...]:
    """start, start + step, ... : `length` numbers."""
    dtype = getattr(torch, attrs["dtype"])
    counted = torch.arange(attrs["length"], dtype=torch.int64 if not dtype.is_floating_point else torch.float64)
    return ((counted * attrs.get("step", 1) + attrs.get("start", 0)).to(dtype),)


def _random(inputs: tuple[Tensor, ...], attrs: Attributes) -> tuple[Tensor, ...]:
    """Numbers of torch's generator: uniform in [0, 1), normal, or bernoulli: 1 with a `probability`, else 0."""
    if attrs["kind"] == "bernoulli":
        return (
            torch.empty(tuple(attrs["shape"]), dtype=getattr(torch, attrs["dtype"])).bernoulli_(attrs["probability"]),
        )
    draw = {"uniform": torch.rand, "normal": torch.randn}[attrs["kind"]]
    return (draw(tuple(attrs["shape"]), dtype=getattr(torch, attrs["dtype"])),)


def _random_work(inputs: Specs, outputs: Specs, attrs: Attributes) -> Work:
    """A counter-based generator of ten rounds (Philox 4x32-10), and Box and Muller's logarithm, root and cosine."""
    passes = 10 + (20 if attrs["kind"] == "normal" else 0)
    return Work(engine="vector", elements=outputs[0].numel, passes=passes, **traffic(inputs, outputs))


def _combine_work(inputs: Specs, outputs: Specs, attrs: Attributes) -> Work:
    """x is copied, and every source element is read, combined and written with its index."""
    moved = traffic(inputs, outputs)
    source = inputs[-1].nbytes
    return Work(
        engine="mover",
        elements=max(spec.numel for spec in inputs),
        dtype=moved["dtype"],
        reads_bytes=moved["reads_bytes"],
        writes_bytes=moved["writes_bytes"] + source,
    )


def _fill_work(inputs: Specs, outputs: Specs, attrs: Attributes) -> Work:
    spec = outputs[0]
    return Work(engine="vector", elements=math.prod(spec.shape), passes=1, writes_bytes=spec.nbytes, dtype=spec.dtype)


_MANY = 1_000_000

MOVEMENT = [
    Opcode("reshape", _reshape, no_work, (1, 1), {"shape"}),
    Opcode("transpose", _transpose, mover_work, (1, 1), {"permutation"}),
    Opcode("broadcast", _broadcast, mover_work, (1, 1), {"shape"}),
    Opcode("slice", _slice, mover_work, (1, 1), {"axis", "start", "stop"}, {"step"}),
    Opcode("slice_update", _slice_update, mover_work, (2, 2), {"axis", "start", "stop"}, {"step"}),
    Opcode("concat", _concat, mover_work, (1, _MANY), {"axis"}),
    Opcode("pad", _pad, mover_work, (1, 1), {"widths"}, {"fill"}),
    Opcode("reverse", _reverse, mover_work, (1, 1), {"axes"}),
    Opcode("gather", _gather, mover_work, (2, 2), {"axis"}),
    Opcode("scatter", _scatter, _combine_work, (3, 3), {"axis", "combine"}, {"include_self"}),
    Opcode("index", _index, mover_work, (2, _MANY), {"axes"}),
    Opcode("index_put", _index_put, _combine_work, (3, _MANY), {"axes"}, {"accumulate"}),
    Opcode("strided", _strided, mover_work, (1, 1), {"shape", "strides"}, {"offset"}),
    Opcode("fill", _fill, _fill_work, (0, 0), {"shape", "scalar", "dtype"}),
    Opcode("iota", _iota, _fill_work, (0, 0), {"length", "dtype"}, {"start", "step"}),
    Opcode("random", _random, _random_work, (0, 0), {"shape", "kind", "dtype"}, {"probability"}),
]
