"""Attention on a device: how a call becomes units, tiles and splits, forward and backward."""

from __future__ import annotations

from typing import NamedTuple

import torch
from hal_compute.problem import LAYOUT, Call, padded_dim
from torch import Tensor

from hal_core.plugin_api import AttentionOutput, Grads

from . import ladder, matrix, rows, stream
from .commands import Given, Operand, VulkanCommandBuffer
from .recorder import Recorder, number
from .setting import Parts, Setting


class Shape(NamedTuple):
    """How forward_tiles.comp cuts the work: invocations of a group, its query rows, keys of a tile, rows per
    invocation.
    """

    threads: int
    rows: int
    tile: int
    height: int

    def shared_bytes(self, dim: int) -> int:
        """Shared memory of a work group: queries, keys or values, weights, and one number per row and invocation."""
        pitch = dim // 4 + 1
        return (
            16 * (self.rows * pitch + self.tile * pitch + self.rows * (self.tile // 4 + 1))
            + 4 * self.threads * self.height
        )


_CPU_SHAPES = (Shape(8, 8, 32, 8), Shape(8, 8, 16, 8))
_GPU_SHAPES = {64: Shape(128, 64, 32, 4), 128: Shape(128, 32, 32, 4), 256: Shape(64, 16, 16, 4)}
#: Fits 32 KiB, which every device has that this package has been seen on, at any size.
_SMALL_SHAPE = Shape(32, 8, 16, 4)


def shape_of(is_cpu: bool, dim: int, shared: int) -> Shape:
    """The largest tiles that suit a head size and fit `shared` bytes of shared memory."""
    liked = _CPU_SHAPES if is_cpu else [shape for most, shape in _GPU_SHAPES.items() if dim <= most]
    return next((shape for shape in liked if shape.shared_bytes(dim) <= shared), _SMALL_SHAPE)


def forward(recorder: Recorder, call: Call, out: Tensor | None = None) -> AttentionOutput:
    """(out, log-sum-exp) of a call; None for a log-sum-exp that the request does not ask for."""
    query, key, value = call[:3]
    if (most := _most_entries(recorder, call)) < len(query):
        return _forward_by_entries(recorder, call, out, most)
    in_place = out is not None and out.dtype == query.dtype and recorder.lies(out)
    given = (query, key, value, call.mask, out if in_place else None)
    name = None if call.plan is not None else recorder.key("forward", number(call.request), given)
    if (kept := recorder.find(name)) is not None:
        return _output(kept.run(given, (out if out is not None and out.dtype == query.dtype else None,)), out)
    result = given[4]
    if result is None:
        result = query.new_empty((*query.shape[:3], value.shape[-1]))
    lse = torch.empty(query.shape[:3], dtype=torch.float32, device=query.device)
    if not result.numel() or not key.shape[2]:
        return _output([result.zero_(), lse.fill_(-torch.inf)], out)
    with recorder.call(f"compute attention ({call.request.describe()})", given, name) as commands:
        dim = padded_dim(call.request)
        to = commands.result(result, dim)
        to_lse = commands.result(lse) if call.request.lse else commands.space(lse.numel() * 4)
        _record(recorder, commands, Setting(recorder, commands, call, pack=True), call, to, to_lse)
        commands.finish()
    return _output([result, lse] if call.request.lse else [result], out)


def _most_entries(recorder: Recorder, call: Call) -> int:
    """Batch entries that one dispatch takes: every query head of them may have a work group along one dimension."""
    return max(min(recorder.most_groups[:2]) // max(call.query.shape[1], 1), 1)


def _entries(call: Call, start: int, stop: int) -> Call:
    """The call of some batch entries."""

    def some(tensor: Tensor) -> Tensor:
        return tensor[start:stop] if len(tensor) > 1 else tensor  # one for all of the batch

    mask, plan = call.mask, call.plan
    if mask is not None and mask.dim() == 4:
        mask = some(mask)
    if plan is not None:
        plan = plan._replace(indices=some(plan.indices), counts=some(plan.counts))
    return Call(*(tensor[start:stop] for tensor in call[:3]), call.request, plan, mask)


def _forward_by_entries(recorder: Recorder, call: Call, out: Tensor | None, most: int) -> AttentionOutput:
    """`forward` of at most `most` batch entries at a time; all but the last run one recording."""
    query = call.query
    if out is None:
        out = query.new_empty((*query.shape[:3], call.value.shape[-1]))
    parts = [
        forward(recorder, _entries(call, start, start + most), out[start : start + most]).lse
        for start in range(0, len(query), most)
    ]
    return AttentionOutput(out, torch.cat(parts) if call.request.lse else None)


def _output(found: list[Tensor], out: Tensor | None) -> AttentionOutput:
    result = found[0] if out is None or out is found[0] else out.copy_(found[0])
    return AttentionOutput(result, found[1] if len(found) > 1 else None)


def _record(
    recorder: Recorder, commands: VulkanCommandBuffer, setting: Setting, call: Call, to: Operand, to_lse: Operand
) -> None:
    """The best kernel that the device and the call allow, see `ladder`."""
    step, few = ladder.matrix_step(recorder.adapter, setting.dtype), ladder.row_step(recorder.adapter)
    short = None if few is None else rows.cut(few, setting, least=step is not None)
    if short is not None:
        rows.record(commands, short, setting, call, to, to_lse)
    elif step is not None and (cut := matrix.cut(step, setting)) is not None:
        matrix.record(commands, cut, setting, call, to, to_lse)
    elif stream.suits(recorder, call, setting.dim):
        stream.record(commands, setting, call, to, to_lse)
    else:
        _record_tiles(recorder, commands, setting, call, to, to_lse)


def _record_tiles(
    recorder: Recorder, commands: VulkanCommandBuffer, setting: Setting, call: Call, to: Operand, to_lse: Operand
) -> None:
    """forward_tiles.comp, and the merge where the keys are split."""
    shared = recorder.adapter.limits["maxComputeSharedMemorySize"]
    dim, shape = setting.dim, shape_of(recorder.adapter.is_cpu, setting.dim, shared)
    wanted, least = (4, 256) if setting.is_cpu else (512, 128)
    setting.split(shape.rows, shape.tile, wanted=wanted, least=least)
    setting.score_in_bits()
    operands = [commands.stage(tensor, dim) for tensor in call[:3]]
    parts = Parts(commands, setting, to, to_lse)
    commands.dispatch(
        f"forward_tiles.{setting.dtype}",
        (dim, shape.threads, shape.rows, shape.tile, shape.height),
        [*operands, *setting.tables, to, parts.lse, parts.sums],
        setting.values(),
        LAYOUT,
        (-(-setting.unit_rows // shape.rows), setting.units, setting.numbers["splits"]),
    )
    parts.merge()


def backward(
    recorder: Recorder, call: Call, out: Tensor, lse: Tensor, grad_out: Tensor, grad_lse: Tensor | None
) -> Grads:
    """Gradients of query, key and value from a given (out, lse); those that the request does not name are None."""
    if (most := _most_entries(recorder, call)) < len(call.query):
        given = (out, lse, grad_out, grad_lse)
        parts = [
            backward(
                recorder, _entries(call, at, at + most), *(None if t is None else t[at : at + most] for t in given)
            )
            for at in range(0, len(call.query), most)
        ]
        return Grads(*(None if each[0] is None else torch.cat(each) for each in zip(*parts, strict=True)))
    inputs, wanted = call[:3], call.request.grads or frozenset("qkv")
    to_lse = None if grad_lse is None else grad_lse.float()
    dtype = call.query.dtype  # what was given may be wider
    given = (*inputs, call.mask, out.to(dtype), lse.float(), grad_out.to(dtype), to_lse)
    name = None if call.plan is not None else recorder.key("backward", number(call.request), given)
    if (kept := recorder.find(name)) is not None:
        grads = kept.run(given)
    elif call.query.numel() and call.key.numel():
        grads = [t.new_empty(t.shape) for t in inputs]
        with recorder.call(f"compute gradients ({call.request.describe()})", given, name) as commands:
            _record_backward(recorder, commands, call, given, grads)
            commands.finish()
    else:
        grads = [t.new_zeros(t.shape) for t in inputs]
    return Grads(*(grad if name in wanted else None for name, grad in zip("qkv", grads, strict=True)))


def _record_backward(
    recorder: Recorder, commands: VulkanCommandBuffer, call: Call, given: Given, grads: list[Tensor]
) -> None:
    setting = Setting(recorder, commands, call, pack=False)
    dim, stage = setting.dim, commands.stage
    query, key, value = (stage(tensor, dim) for tensor in call[:3])
    out, lse, grad_out, grad_lse = given[4:]
    assert out is not None and lse is not None and grad_out is not None  # noqa: PT018
    result, flowing, whole = stage(out, dim), stage(grad_out, dim), stage(lse)
    flowing_lse = commands.filled(lse.numel() * 4, 0.0) if grad_lse is None else stage(grad_lse)
    delta = commands.space(lse.numel() * 4)
    to_query, to_key, to_value = (commands.result(grad, dim) for grad in grads)
    constants, most = (dim, 8 if setting.is_cpu else 32), commands.most_groups[0]
    shared = [query, key, value, *setting.tables, flowing, whole]
    commands.dispatch(
        f"backward_query.{setting.dtype}",
        constants,
        [*shared, result, flowing_lse, to_query, delta],
        setting.values(),
        LAYOUT,
        (min(setting.len_q, most), setting.units, 1),
    )
    commands.dispatch(
        f"backward_key.{setting.dtype}",
        constants,
        [*shared, delta, to_key, to_value],
        setting.values(),
        LAYOUT,
        (min(setting.len_k, most), setting.batch * setting.heads_kv, 1),
    )
