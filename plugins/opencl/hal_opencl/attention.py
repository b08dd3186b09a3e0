"""Attention on an engine: how a call becomes units, tiles and splits, forward and backward."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from hal_compute.problem import Call, Problem
from torch import Tensor

from hal_core.plugin_api import AttentionOutput, Grads

from .engine import Engine
from .lease import Lease, Operand

_TILE = 64  # keys in a tile of forward_rows.cl
_ROWS = 16  # query rows of one of its work items, in groups of 8
_FEW = 8  # rows up to which it reads the keys where they lie


class Shape(NamedTuple):
    """How a kernel cuts the work.

    Attributes:
        rows: query rows of a work item (forward_rows.cl) or group (forward_tiles.cl). tile: keys of a tile.
        threads: work items in a group; 0 for forward_rows.cl, and what follows is for forward_tiles.cl alone.
        height: query rows that a work item holds. slice: head elements of the keys in local memory at once, at most.
    """

    rows: int
    tile: int
    threads: int = 0
    height: int = 0
    slice: int = 0

    def width(self, dim: int) -> int:
        """Head elements of a slice: a divisor of `dim`."""
        return self.slice if dim % self.slice == 0 else 32

    def run(self, dim: int) -> int:
        """Keys whose values fit where a slice of the keys lay: a power of 2."""
        return 1 << (max(self.tile * self.width(dim) // dim, 4).bit_length() - 1)

    def local_bytes(self, dim: int) -> int:
        """Local memory of a work group: (a slice of) the queries, keys or values, and weights."""
        width = self.width(dim)
        return 4 * (self.rows * width + max(self.tile * width, self.run(dim) * dim) + self.rows * self.tile)

    def options(self, dim: int) -> list[str]:
        """Build options of forward_rows.cl or forward_tiles.cl."""
        if not self.threads:
            direct = self.rows <= _FEW
            values = {"tile": self.tile, "rows": self.rows, "group": min(self.rows, 8), "direct": int(direct)}
            return [f"-D{name.upper()}={value}" for name, value in values.items()]
        width = self.width(dim)
        values = self._asdict() | {"slice": width, "run": self.run(dim), "sliced": int(width < dim)}
        return [f"-D{name.upper()}={value}" for name, value in values.items()]


_GPU_SHAPES = {128: Shape(64, 64, 64, 8, 64), 256: Shape(32, 64, 64, 4, 64)}  # by the largest head size
_GPU_FEW_SHAPES = {8: Shape(8, 64, 64, 2, 64), 16: Shape(16, 64, 64, 4, 64)}  # by the largest number of rows
_SMALL_SHAPE = Shape(16, 32, 32, 4, 32)  # fits 16 KiB, the least that OpenCL 1.1 lets a GPU have, at any size


def shape_of(engine: Engine, dim: int, rows: int, keys: int) -> Shape:
    """The shape for units of so many query rows, against so many keys.

    Row blocks for a CPU's registers and caches; on a GPU the largest tiles that suit a head size and fit local memory.
    """
    if engine.shares_memory:
        return Shape(
            1 << (rows - 1).bit_length() if rows <= _FEW else _ROWS, _TILE if keys > _TILE // 2 else _TILE // 2
        )
    few = (shape for most, shape in _GPU_FEW_SHAPES.items() if rows <= most)
    liked = next(few, None) or next(shape for most, shape in _GPU_SHAPES.items() if dim <= most)
    return liked if liked.local_bytes(dim) <= int(engine.handle.local_mem_size) else _SMALL_SHAPE


class _Setting(Problem):
    """What all programs of one call share: build options, and the mask and ranges on the device."""

    def __init__(self, engine: Engine, lease: Lease, call: Call, *, pack: bool) -> None:
        super().__init__(call, pack=pack)
        self.engine, self.lease = engine, lease
        self.options = [f"-DHEAD_DIM={self.dim}", f"-DHALF={int(self.dtype == 'float16')}"]
        nothing = lease.space(64)
        staged = [self.mask and self.mask.values, self.ranges and self.ranges.index, self.ranges and self.ranges.bounds]
        self.tables = tuple((nothing if tensor is None else lease.stage(tensor)).buffer for tensor in staged)


def forward(engine: Engine, call: Call, out: Tensor | None = None) -> AttentionOutput:
    """(out, log-sum-exp) of a call; the log-sum-exp always, since the programs have it."""
    query, value = call.query, call.value
    direct = out is not None and out.is_contiguous() and out.dtype == query.dtype
    result = out if direct and out is not None else torch.empty((*query.shape[:3], value.shape[-1]), dtype=query.dtype)
    lse = torch.empty(query.shape[:3], dtype=torch.float32)
    if not result.numel() or not call.key.shape[2]:
        return AttentionOutput(result.zero_() if out is None else out.zero_(), lse.fill_(-torch.inf))
    with engine.lease(f"compute attention ({call.request.describe()})") as lease:
        setting = _Setting(engine, lease, call, pack=True)
        shape = shape_of(engine, setting.dim, setting.unit_rows, setting.len_k)
        wanted = engine.handle.max_compute_units * (2 if engine.shares_memory else 4)
        dim, splits = setting.dim, setting.split(shape.rows, shape.tile, wanted=wanted, least=4 * shape.tile)
        setting.score_in_bits()
        rows = setting.units * setting.unit_rows
        queries = lease.stage(query, dim)
        keys, values = lease.stage(call.key, dim), lease.stage(value, dim)
        to, to_lse = lease.result(result, dim), lease.result(lse)
        part = lease.space(splits * rows * dim * 4 if splits > 1 else 64)
        part_lse = lease.space(splits * rows * 4) if splits > 1 else to_lse
        options = [*setting.options, *shape.options(dim)]
        if not shape.threads and shape.rows > _FEW:
            keys, values = _packed(setting, shape, keys, values)
        kernel = engine.kernel("forward_tiles" if shape.threads else "forward_rows", "forward", options)
        items = -(-setting.unit_rows // shape.rows)
        threads = shape.threads or 1
        engine.launch(
            kernel,
            (items * threads, setting.units, splits),
            (threads, 1, 1),
            queries.buffer,
            keys.buffer,
            values.buffer,
            *setting.tables,
            to.buffer,
            part_lse.buffer,
            part.buffer,
            setting.packed(),
        )
        if splits > 1:
            merge = engine.kernel("merge", "merge", setting.options)
            arguments = (part.buffer, part_lse.buffer, to.buffer, to_lse.buffer, np.int32(splits))
            engine.launch(merge, (rows,), (1,) if engine.shares_memory else None, *arguments)
        lease.finish()
    if out is not None and not direct:
        result = out.copy_(result)
    return AttentionOutput(result, lse)


def _packed(setting: _Setting, shape: Shape, keys: Operand, values: Operand) -> tuple[Operand, Operand]:
    """Keys as transposed float32 tiles, values as float32."""
    engine, units, len_k, dim = setting.engine, setting.batch * setting.heads_kv, setting.len_k, setting.dim
    tiles = -(-len_k // shape.tile)
    packed = setting.lease.space(units * tiles * shape.tile * dim * 4)
    half = setting.dtype == "float16"
    wide = setting.lease.space(units * len_k * dim * 4) if half else values
    kernel = engine.kernel("forward_rows", "pack_keys", [*setting.options, *shape.options(dim)])
    arguments = (keys.buffer, values.buffer, packed.buffer, wide.buffer, np.int32(len_k))
    engine.launch(kernel, (tiles, units), (1, 1), *arguments)
    return packed, wide


def backward(engine: Engine, call: Call, out: Tensor, lse: Tensor, grad_out: Tensor, grad_lse: Tensor | None) -> Grads:
    """Gradients of query, key and value from a given (out, lse); those that the request does not name are None."""
    query, key, value = call.query, call.key, call.value
    wanted = call.request.grads or frozenset("qkv")
    grads = [torch.empty(t.shape, dtype=t.dtype) for t in (query, key, value)]
    if query.numel() and key.numel():
        with engine.lease(f"compute gradients ({call.request.describe()})") as lease:
            _launch_backward(engine, lease, call, (out, lse, grad_out, grad_lse), grads)
    else:
        for grad in grads:
            grad.zero_()
    return Grads(*(grad if name in wanted else None for name, grad in zip("qkv", grads, strict=True)))


def _launch_backward(engine: Engine, lease: Lease, call: Call, given: tuple[Any, ...], grads: list[Tensor]) -> None:
    out, lse, grad_out, grad_lse = given
    setting = _Setting(engine, lease, call, pack=False)
    dim, problem = setting.dim, setting.packed()
    query, key, value, result, flowing = (
        lease.stage(t.to(call.query.dtype), dim).buffer for t in (*call[:3], out, grad_out)
    )
    whole = lease.stage(lse.float()).buffer
    flowing_lse = lease.stage(torch.zeros_like(lse) if grad_lse is None else grad_lse.float()).buffer
    delta = lease.space(lse.numel() * 4).buffer
    to_query, to_key, to_value = (lease.result(grad, dim).buffer for grad in grads)
    by_query = engine.kernel("backward", "backward_query", setting.options)
    by_key = engine.kernel("backward", "backward_key", setting.options)
    group = (1, 1) if engine.shares_memory else None
    engine.launch(
        by_query,
        (setting.len_q, setting.units),
        group,
        query,
        key,
        value,
        *setting.tables,
        result,
        whole,
        flowing,
        flowing_lse,
        to_query,
        delta,
        problem,
    )
    engine.launch(
        by_key,
        (setting.len_k, setting.batch * setting.heads_kv),
        group,
        query,
        key,
        value,
        *setting.tables,
        whole,
        flowing,
        delta,
        to_key,
        to_value,
        problem,
    )
    lease.finish()
