"""Attention on a device: how a call becomes units, tiles and splits, forward and backward."""

from __future__ import annotations

import struct
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hal_core import AttentionOutput, AttentionRequest, BlockPlan, Grads

from .problem import OPEN, Mask, Ranges, band, hidden_tiles, mask_of, ranges_of
from .recorder import Operand, Recorder, VulkanCommandBuffer

_LOG2E = 1.4426950408889634
_FIELDS = (
    "len_q", "len_k", "unit_rows", "heads_per_unit", "units_per_batch", "group", "lower", "upper", "mask_batch", "mask_head",
    "mask_row", "plan_batch", "plan_head", "block_q", "chunk", "has_mask", "has_plan", "splits", "scale", "softcap",
)  # fmt: skip
_LAYOUT = "18i2f"
#: Head sizes that pipelines are made for; others are padded with zeros, which change no score.
HEAD_DIMS = (32, 64, 96, 128, 192, 256)


class Call(NamedTuple):
    """The tensors of one call and what they mean."""

    query: Tensor
    key: Tensor
    value: Tensor
    request: AttentionRequest
    plan: BlockPlan | None
    mask: Tensor | None


class Shape(NamedTuple):
    """How forward_tiles.comp cuts the work: invocations of a group, its query rows, keys of a tile, rows per invocation."""

    threads: int
    rows: int
    tile: int
    height: int


    def shared_bytes(self, dim: int) -> int:
        """Shared memory of a work group: queries, keys or values, weights, and one number per row and invocation."""
        pitch = dim // 4 + 1
        return 16 * (self.rows * pitch + self.tile * pitch + self.rows * (self.tile // 4 + 1)) + 4 * self.threads * self.height


_CPU_SHAPES = (Shape(8, 8, 32, 8), Shape(8, 8, 16, 8))
_GPU_SHAPES = {64: Shape(128, 64, 32, 4), 128: Shape(128, 32, 32, 4), 256: Shape(64, 16, 16, 4)}
_SMALL_SHAPE = Shape(32, 8, 16, 4)  # fits 32 KiB, which every device has that this package has been seen on, at any size


def shape_of(is_cpu: bool, dim: int, shared: int) -> Shape:
    """The largest tiles that suit a head size and fit `shared` bytes of shared memory."""
    liked = _CPU_SHAPES if is_cpu else [shape for most, shape in _GPU_SHAPES.items() if dim <= most]
    return next((shape for shape in liked if shape.shared_bytes(dim) <= shared), _SMALL_SHAPE)


def padded_dim(request: AttentionRequest) -> int:
    """The head size of the pipeline, at least both sizes."""
    return next(dim for dim in HEAD_DIMS if dim >= max(request.dim_qk, request.dim_v))


class _Setting:
    """What all shaders of one call share: unit geometry, staged mask and ranges, push constants."""

    def __init__(self, recorder: Recorder, commands: VulkanCommandBuffer, call: Call, *, pack: bool) -> None:
        request, query, key = call.request, call.query, call.key
        self.commands, self.is_cpu = commands, recorder.adapter.is_cpu
        self.batch, self.heads_q, self.len_q = query.shape[:3]
        self.heads_kv, self.len_k = key.shape[1:3]
        self.dim = padded_dim(request)
        self.dtype = "float16" if query.dtype == torch.float16 else "float32"
        mask = None if call.mask is None else mask_of(call.mask, self.len_k)
        ranges = None
        if call.plan is not None:
            ranges = ranges_of(call.plan, self.len_k)
        elif mask is not None:
            ranges = hidden_tiles(mask, self.len_q)
        group = self.heads_q // self.heads_kv
        together = ranges is None or (ranges.head_stride == 0 and ranges.block_q >= self.len_q)
        self.heads_per_unit = group if pack and group > 1 and self.len_q < 32 and together else 1
        self.unit_rows = self.heads_per_unit * self.len_q
        self.units = self.batch * self.heads_q // self.heads_per_unit
        self._stage(mask, ranges)
        lower, upper = band(request, self.len_q, self.len_k)
        strides = (0, 0, 0) if mask is None else mask.strides
        self.numbers: dict[str, Any] = dict.fromkeys(_FIELDS, 0) | {
            "len_q": self.len_q, "len_k": self.len_k, "unit_rows": self.unit_rows, "heads_per_unit": self.heads_per_unit,
            "units_per_batch": self.heads_q // self.heads_per_unit, "group": group, "lower": lower, "upper": upper,
            "mask_batch": strides[0], "mask_head": strides[1], "mask_row": strides[2], "has_mask": int(mask is not None),
            "chunk": 1 << 30, "splits": 1, "scale": request.effective_scale, "softcap": request.softcap or 0.0,
        }  # fmt: skip
        if ranges is not None:
            self.numbers |= {"has_plan": 1, "block_q": ranges.block_q}
            self.numbers |= {"plan_batch": ranges.batch_stride, "plan_head": ranges.head_stride}

    def _stage(self, mask: Mask | None, ranges: Ranges | None) -> None:
        nothing = self.commands.space(256)
        stage = self.commands.stage
        self.mask = nothing if mask is None else stage(mask.values)
        self.index = nothing if ranges is None else stage(ranges.index)
        self.bounds = nothing if ranges is None else stage(ranges.bounds)

    def split(self, shape: Shape) -> None:
        """Cut the keys where the rows alone would leave the device idle."""
        wanted, least = (4, 256) if self.is_cpu else (512, 128)
        groups = -(-self.unit_rows // shape.rows) * self.units
        if groups < wanted and self.len_k > least:
            parts = min(-(-wanted // groups), -(-self.len_k // least), 64)
            each = -(-self.len_k // parts)
            chunk = -(-each // shape.tile) * shape.tile
            self.numbers |= {"chunk": chunk, "splits": -(-self.len_k // chunk)}

    def push(self, **changes: Any) -> list[Any]:
        values = self.numbers | changes
        return [values[name] for name in _FIELDS]


def forward(recorder: Recorder, call: Call, out: Tensor | None = None) -> AttentionOutput:
    """(out, log-sum-exp) of a call; the log-sum-exp always, since the shaders have it."""
    query, value = call.query, call.value
    result = torch.empty((*query.shape[:3], value.shape[-1]), dtype=query.dtype)
    lse = torch.empty(query.shape[:3], dtype=torch.float32)
    if not result.numel() or not call.key.shape[2]:
        return AttentionOutput(result.zero_() if out is None else out.zero_(), lse.fill_(-torch.inf))
    with recorder.call(f"compute attention ({call.request.describe()})") as commands:
        dim = padded_dim(call.request)
        to, to_lse = commands.result(result, dim), commands.result(lse)
        record = _record_stream if _streams(recorder, call, dim) else _record_tiles
        record(recorder, commands, call, to, to_lse)
        commands.finish()
    return AttentionOutput(result if out is None else out.copy_(result), lse)


def _record_tiles(recorder: Recorder, commands: VulkanCommandBuffer, call: Call, to: Operand, to_lse: Operand) -> None:
    """forward_tiles.comp, and the merge where the keys are split."""
    setting = _Setting(recorder, commands, call, pack=True)
    shared = recorder.adapter.limits["maxComputeSharedMemorySize"]
    dim, shape = setting.dim, shape_of(recorder.adapter.is_cpu, setting.dim, shared)
    setting.split(shape)
    splits, rows = setting.numbers["splits"], setting.units * setting.unit_rows
    setting.numbers["scale"] *= 1.0 if call.request.softcap else _LOG2E
    operands = [commands.stage(tensor, dim) for tensor in call[:3]]
    part = commands.space(splits * rows * dim * 4 if splits > 1 else 256)
    part_lse = commands.space(splits * rows * 4) if splits > 1 else to_lse
    commands.dispatch(
        f"forward_tiles.{setting.dtype}", (dim, shape.threads, shape.rows, shape.tile, shape.height),
        [*operands, setting.mask, setting.index, setting.bounds, to, part_lse, part], setting.push(), _LAYOUT,
        (-(-setting.unit_rows // shape.rows), setting.units, splits),
    )  # fmt: skip
    if splits > 1:
        groups = (-(-rows * dim // 4 // 64), 1, 1)
        commands.dispatch(
            f"merge.{setting.dtype}", (dim, 64), [part, part_lse, to, to_lse], setting.push(unit_rows=rows), _LAYOUT, groups
        )


_STREAM_BYTES = 1 << 16  # of keys, and of values, that a uniform buffer holds
_STREAM_FROM = 1 << 28  # multiply-accumulates from which its larger pipelines pay


def _streams(recorder: Recorder, call: Call, dim: int) -> bool:
    """Whether forward_stream.comp is the better kernel: long calls without masks on a processor's driver."""
    request, limits = call.request, recorder.adapter.limits
    plain = call.mask is None and call.plan is None and not request.softcap
    large = call.query.numel() * call.key.shape[2] >= _STREAM_FROM // 2 and call.query.shape[2] >= 64
    can = recorder.adapter.is_cpu and limits["maxUniformBufferRange"] >= _STREAM_BYTES and limits["subgroupSize"] == 8
    return plain and large and can and dim <= 128


def _record_stream(recorder: Recorder, commands: VulkanCommandBuffer, call: Call, to: Operand, to_lse: Operand) -> None:
    """One dispatch per key head and chunk of keys that fits a uniform buffer, then the merge that writes the result."""
    setting = _Setting(recorder, commands, call, pack=True)
    dim, len_k, threads = setting.dim, setting.len_k, 8
    rows_each = 8 if dim <= 64 else 4
    tall, chunk = threads * rows_each, _STREAM_BYTES // (4 * dim)
    chunks, units = -(-len_k // chunk), setting.units
    rows = units * setting.unit_rows
    query = commands.stage(call.query, dim)
    keys, values = (commands.stage(tensor, dim, rows=chunks * chunk, wide=True) for tensor in (call.key, call.value))
    part, part_lse = commands.space(rows * dim * 4), commands.space(rows * 4)
    assert part_lse.host is not None
    part_lse.host.view(torch.float32).fill_(-torch.inf)
    group = setting.numbers["group"] // setting.heads_per_unit  # units that read the same keys
    scale = setting.numbers["scale"] * _LOG2E
    for number in range(chunks):
        start = number * chunk
        count = min(chunk, len_k - start)
        pieces = [(0, setting.unit_rows, 1)]
        if setting.heads_per_unit == 1:
            pieces = _pieces(setting.len_q, (start, count), (setting.numbers["lower"], setting.numbers["upper"]), tall)
        elif setting.numbers["lower"] == -OPEN and setting.numbers["upper"] == OPEN and count % 4 == 0:
            pieces = [(0, setting.unit_rows, 0)]
        fresh = True  # no barrier between units: they touch nothing of each other
        for unit in range(units):
            place = (unit // group * chunks + number) * _STREAM_BYTES
            tiles = [operand.part(place, _STREAM_BYTES) for operand in (keys, values)]
            for begin, end, banded in pieces:
                pushed = setting.push(mask_batch=unit, mask_head=begin, mask_row=start, plan_batch=count, scale=scale)
                commands.dispatch(
                    f"forward_stream.{setting.dtype}", (dim, threads, rows_each, banded), [query, *tiles, part, part_lse],
                    pushed, _LAYOUT, (-(-(end - begin) // tall), 1, 1), kinds="suuss", after=fresh,
                )  # fmt: skip
                fresh = False
    groups = (-(-rows * dim // 4 // 64), 1, 1)
    pushed = setting.push(unit_rows=rows)
    commands.dispatch(f"merge.{setting.dtype}", (dim, 64), [part, part_lse, to, to_lse], pushed, _LAYOUT, groups)


def _pieces(len_q: int, chunk: tuple[int, int], band: tuple[int, int], tall: int) -> list[tuple[int, int, int]]:
    """Rows (begin, end, banded) that read something of a chunk (start, count) of the keys: some or (banded 0) all of it.

    Begins are multiples of `tall`. A chunk whose keys are not a multiple of 4 is banded: its end is inside a step.
    """
    (start, count), (lower, upper) = chunk, band
    begin, end = max(start - upper, 0) // tall * tall, min(start + count - lower, len_q)
    inner = min(max(-(-(start + count - 1 - upper) // tall) * tall, begin), max(begin, end))
    outer = min(max(start - lower + 1, inner), end)
    outer = outer if outer == end else outer // tall * tall
    if count % 4 or outer <= inner:
        inner = outer = begin
    found = [(begin, inner, 1), (inner, outer, 0), (outer, end, 1)]
    return [piece for piece in found if piece[0] < piece[1]]


def backward(
    recorder: Recorder, call: Call, out: Tensor, lse: Tensor, grad_out: Tensor, grad_lse: Tensor | None
) -> Grads:
    """Gradients of query, key and value from a given (out, lse); those that the request does not name are None."""
    query, key, value = call.query, call.key, call.value
    wanted = call.request.grads or frozenset("qkv")
    grads = [torch.empty(t.shape, dtype=t.dtype) for t in (query, key, value)]
    if query.numel() and key.numel():
        with recorder.call(f"compute gradients ({call.request.describe()})") as commands:
            _record_backward(recorder, commands, call, (out, lse, grad_out, grad_lse), grads)
            commands.finish()
    else:
        for grad in grads:
            grad.zero_()
    return Grads(*(grad if name in wanted else None for name, grad in zip("qkv", grads, strict=True)))


def _record_backward(
    recorder: Recorder, commands: VulkanCommandBuffer, call: Call, given: tuple[Any, ...], grads: list[Tensor]
) -> None:
    out, lse, grad_out, grad_lse = given
    setting = _Setting(recorder, commands, call, pack=False)
    dim, stage = setting.dim, commands.stage
    query, key, value = (stage(tensor, dim) for tensor in call[:3])
    result, flowing = stage(out, dim), stage(grad_out.to(call.query.dtype), dim)
    whole, flowing_lse = stage(lse.float()), stage(torch.zeros_like(lse) if grad_lse is None else grad_lse.float())
    delta = commands.space(lse.numel() * 4)
    to_query, to_key, to_value = (commands.result(grad, dim) for grad in grads)
    constants = (dim, 8 if setting.is_cpu else 32)
    shared = [query, key, value, setting.mask, setting.index, setting.bounds, flowing, whole]
    commands.dispatch(
        f"backward_query.{setting.dtype}", constants, [*shared, result, flowing_lse, to_query, delta], setting.push(),
        _LAYOUT, (setting.len_q, setting.units, 1),
    )  # fmt: skip
    commands.dispatch(
        f"backward_key.{setting.dtype}", constants, [*shared, delta, to_key, to_value], setting.push(), _LAYOUT,
        (setting.len_k, setting.batch * setting.heads_kv, 1),
    )  # fmt: skip


assert struct.calcsize(_LAYOUT) == 4 * len(_FIELDS)
