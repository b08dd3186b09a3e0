"""Attention on an engine: how a call becomes units, tiles and splits, forward and backward."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from hal_core import AttentionOutput, AttentionRequest, BlockPlan, Grads

from .engine import Engine, Lease, Operand
from .problem import Mask, Ranges, band, hidden_tiles, mask_of, ranges_of

_LOG2E = 1.4426950408889634
_TILE = 64  # keys in a tile of forward_rows.cl
_ROWS = 16  # query rows of one of its work items
#: Head sizes that programs are compiled for; others are padded with zeros, which change no score.
HEAD_DIMS = (32, 64, 96, 128, 192, 256)

_PROBLEM = np.dtype(
    [(name, np.int32) for name in (
        "len_q", "len_k", "unit_rows", "heads_per_unit", "units_per_batch", "group", "lower", "upper", "mask_batch",
        "mask_head", "mask_row", "plan_batch", "plan_head", "block_q", "chunk", "has_mask", "has_plan", "splits",
    )] + [("scale", np.float32), ("softcap", np.float32)]
)  # fmt: skip


class Call(NamedTuple):
    """The tensors of one call and what they mean."""

    query: Tensor
    key: Tensor
    value: Tensor
    request: AttentionRequest
    plan: BlockPlan | None
    mask: Tensor | None


class Shape(NamedTuple):
    """How a kernel cuts the work: rows of a work item or group, keys of a tile, work items in a group (0: one)."""

    rows: int
    tile: int
    threads: int


def padded_dim(request: AttentionRequest) -> int:
    """The head size that programs are compiled for, at least both sizes."""
    return next(dim for dim in HEAD_DIMS if dim >= max(request.dim_qk, request.dim_v))


_GPU_SHAPES = {64: Shape(64, 32, 128), 128: Shape(32, 32, 128), 256: Shape(16, 16, 64)}
_SMALL_SHAPE = Shape(8, 16, 32)  # fits 32 KiB, the least that OpenCL 1.1 promises a GPU, at any size


def local_bytes(shape: Shape, dim: int) -> int:
    """Local memory of a work group of forward_tiles.cl: queries, keys or values, weights, one number per row and thread."""
    return 4 * ((shape.rows + shape.tile) * (dim + 4) + shape.rows * (shape.tile + 4) + shape.threads * 4)


def shape_of(engine: Engine, dim: int) -> Shape:
    """Row blocks for a CPU's registers and caches; on a GPU the largest tiles that suit a head size and fit local memory."""
    if engine.shares_memory:
        return Shape(_ROWS, _TILE, 0)
    liked = [shape for most, shape in _GPU_SHAPES.items() if dim <= most]
    room = int(engine.handle.local_mem_size)
    return next((shape for shape in liked if local_bytes(shape, dim) <= room), _SMALL_SHAPE)


class _Setting:
    """What all programs of one call share: options, unit geometry, staged mask and ranges."""

    def __init__(self, engine: Engine, lease: Lease, call: Call, *, pack: bool) -> None:
        request, query, key = call.request, call.query, call.key
        self.engine, self.lease, self.call = engine, lease, call
        self.batch, self.heads_q, self.len_q = query.shape[:3]
        self.heads_kv, self.len_k = key.shape[1:3]
        self.dim = padded_dim(request)
        self.options = [f"-DHEAD_DIM={self.dim}", f"-DHALF={int(query.dtype == torch.float16)}"]
        mask = None if call.mask is None else mask_of(call.mask, self.len_k)
        ranges = None
        if call.plan is not None:
            ranges = ranges_of(call.plan, self.len_k)
        elif mask is not None:
            ranges = hidden_tiles(mask, self.len_q)
        group = self.heads_q // self.heads_kv
        together = ranges is None or (ranges.head_stride == 0 and ranges.block_q >= self.len_q)
        packs = pack and group > 1 and self.len_q < 2 * _ROWS and together
        self.heads_per_unit = group if packs else 1
        self.unit_rows = self.heads_per_unit * self.len_q
        self.units = self.batch * self.heads_q // self.heads_per_unit
        self._stage(mask, ranges)
        lower, upper = band(request, self.len_q, self.len_k)
        problem = np.zeros((), _PROBLEM)
        problem["len_q"], problem["len_k"], problem["unit_rows"] = self.len_q, self.len_k, self.unit_rows
        problem["heads_per_unit"], problem["units_per_batch"] = self.heads_per_unit, self.heads_q // self.heads_per_unit
        problem["group"], problem["lower"], problem["upper"] = group, lower, upper
        if mask is not None:
            problem["has_mask"] = 1
            problem["mask_batch"], problem["mask_head"], problem["mask_row"] = mask.strides
        if ranges is not None:
            problem["has_plan"], problem["block_q"] = 1, ranges.block_q
            problem["plan_batch"], problem["plan_head"] = ranges.batch_stride, ranges.head_stride
        problem["softcap"] = request.softcap or 0.0
        problem["scale"] = request.effective_scale
        problem["splits"], problem["chunk"] = 1, 1 << 30
        self.problem = problem

    def _stage(self, mask: Mask | None, ranges: Ranges | None) -> None:
        nothing = self.lease.space(64)
        stage = self.lease.stage
        self.mask = nothing if mask is None else stage(mask.values)
        self.index = nothing if ranges is None else stage(ranges.index)
        self.bounds = nothing if ranges is None else stage(ranges.bounds)

    def split(self, shape: Shape) -> None:
        """Cut the keys where the rows alone would leave compute units idle."""
        units = self.engine.handle.max_compute_units
        wanted = units * (2 if self.engine.shares_memory else 4)
        items = -(-self.unit_rows // shape.rows) * self.units
        least = 4 * shape.tile
        if items < wanted and self.len_k > least:
            parts = min(-(-wanted // items), -(-self.len_k // least))
            each = -(-self.len_k // parts)
            chunk = -(-each // shape.tile) * shape.tile
            self.problem["chunk"], self.problem["splits"] = chunk, -(-self.len_k // chunk)


def forward(engine: Engine, call: Call, out: Tensor | None = None) -> AttentionOutput:
    """(out, log-sum-exp) of a call; the log-sum-exp always, since the programs have it."""
    query, value = call.query, call.value
    direct = out is not None and out.is_contiguous() and out.dtype == query.dtype
    result = out if direct and out is not None else torch.empty((*query.shape[:3], value.shape[-1]), dtype=query.dtype)
    lse = torch.empty(query.shape[:3], dtype=torch.float32)
    if not result.numel() or not call.key.shape[2]:
        return AttentionOutput(result.zero_() if out is None else out.zero_(), lse.fill_(-torch.inf))
    with engine.lease() as lease:
        setting = _Setting(engine, lease, call, pack=True)
        shape = shape_of(engine, setting.dim)
        setting.split(shape)
        problem, dim, splits = setting.problem, setting.dim, int(setting.problem["splits"])
        problem["scale"] *= 1.0 if call.request.softcap else _LOG2E
        rows = setting.units * setting.unit_rows
        queries = lease.stage(query, dim)
        keys, values = lease.stage(call.key, dim), lease.stage(value, dim)
        to, to_lse = lease.result(result, dim), lease.result(lse)
        part = lease.space(splits * rows * dim * 4 if splits > 1 else 64)
        part_lse = lease.space(splits * rows * 4) if splits > 1 else to_lse
        if shape.threads:
            tiling = [f"-DROWS={shape.rows}", f"-DTILE={shape.tile}", f"-DTHREADS={shape.threads}"]
            kernel = engine.kernel("forward_tiles", "forward", [*setting.options, *tiling])
        else:
            keys, values = _packed(setting, keys, values)
            kernel = engine.kernel("forward_rows", "forward", setting.options)
        items = -(-setting.unit_rows // shape.rows)
        threads = shape.threads or 1
        engine.launch(
            kernel, (items * threads, setting.units, splits), (threads, 1, 1), queries.buffer, keys.buffer, values.buffer,
            setting.mask.buffer, setting.index.buffer, setting.bounds.buffer, to.buffer, part_lse.buffer, part.buffer, problem,
        )  # fmt: skip
        if splits > 1:
            merge = engine.kernel("merge", "merge", setting.options)
            arguments = (part.buffer, part_lse.buffer, to.buffer, to_lse.buffer, np.int32(splits))
            engine.launch(merge, (rows,), (1,) if engine.shares_memory else None, *arguments)
        lease.finish(f"compute attention ({call.request.describe()})")
    if out is not None and not direct:
        result = out.copy_(result)
    return AttentionOutput(result, lse)


def _packed(setting: _Setting, keys: Operand, values: Operand) -> tuple[Operand, Operand]:
    """Keys as transposed float32 tiles, values as float32."""
    engine, units, len_k, dim = setting.engine, setting.batch * setting.heads_kv, setting.len_k, setting.dim
    tiles = -(-len_k // _TILE)
    packed = setting.lease.space(units * tiles * _TILE * dim * 4)
    half = setting.call.query.dtype == torch.float16
    wide = setting.lease.space(units * len_k * dim * 4) if half else values
    kernel = engine.kernel("forward_rows", "pack_keys", setting.options)
    arguments = (keys.buffer, values.buffer, packed.buffer, wide.buffer, np.int32(len_k))
    engine.launch(kernel, (tiles, units), (1, 1), *arguments)
    return packed, wide


def backward(
    engine: Engine, call: Call, out: Tensor, lse: Tensor, grad_out: Tensor, grad_lse: Tensor | None
) -> Grads:
    """Gradients of query, key and value from a given (out, lse); those that the request does not name are None."""
    query, key, value = call.query, call.key, call.value
    wanted = call.request.grads or frozenset("qkv")
    grads = [torch.empty(t.shape, dtype=t.dtype) for t in (query, key, value)]
    if query.numel() and key.numel():
        with engine.lease() as lease:
            _launch_backward(engine, lease, call, (out, lse, grad_out, grad_lse), grads)
    else:
        for grad in grads:
            grad.zero_()
    return Grads(*(grad if name in wanted else None for name, grad in zip("qkv", grads, strict=True)))


def _launch_backward(engine: Engine, lease: Lease, call: Call, given: tuple[Any, ...], grads: list[Tensor]) -> None:
    out, lse, grad_out, grad_lse = given
    setting = _Setting(engine, lease, call, pack=False)
    dim, problem = setting.dim, setting.problem
    query, key, value, result, flowing = (lease.stage(t, dim).buffer for t in (*call[:3], out, grad_out.to(call.query.dtype)))
    whole = lease.stage(lse.float()).buffer
    flowing_lse = lease.stage(torch.zeros_like(lse) if grad_lse is None else grad_lse.float()).buffer
    delta = lease.space(lse.numel() * 4).buffer
    to_query, to_key, to_value = (lease.result(grad, dim).buffer for grad in grads)
    shared = (setting.mask.buffer, setting.index.buffer, setting.bounds.buffer)
    by_query = engine.kernel("backward", "backward_query", setting.options)
    by_key = engine.kernel("backward", "backward_key", setting.options)
    group = (1, 1) if engine.shares_memory else None
    engine.launch(
        by_query, (setting.len_q, setting.units), group, query, key, value, *shared, result, whole, flowing, flowing_lse,
        to_query, delta, problem,
    )  # fmt: skip
    engine.launch(
        by_key, (setting.len_k, setting.batch * setting.heads_kv), group, query, key, value, *shared, whole, flowing, delta,
        to_key, to_value, problem,
    )  # fmt: skip
    lease.finish(f"compute gradients ({call.request.describe()})")
