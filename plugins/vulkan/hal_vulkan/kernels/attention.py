"""Attention on a Vulkan device: how a call becomes a recording, forward and backward."""

from __future__ import annotations

import torch
from hal_compute.problem import LAYOUT, Call, padded_dim
from torch import Tensor

from hal_core.plugin_api import AttentionOutput, Grads

from ..runtime.command_buffer import Given, Operand, VulkanCommandBuffer
from ..runtime.recorder import Recorder, number
from ..tiling import MatrixCut, RowCut, StreamCut, best_cut
from .device_problem import DeviceProblem
from .forward import record_matrices, record_rows, record_tiles
from .stream import record_stream


def forward(recorder: Recorder, call: Call, out: Tensor | None = None) -> AttentionOutput:
    """(out, log-sum-exp) of a call; the log-sum-exp is None where the request does not ask for it."""
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
        _record(recorder, commands, call, to, to_lse)
        commands.finish()
    return _output([result, lse] if call.request.lse else [result], out)


def _most_entries(recorder: Recorder, call: Call) -> int:
    """At most, batch entries of a dispatch: all their query heads may have a work group along one dimension."""
    return max(min(recorder.most_groups[:2]) // max(call.query.shape[1], 1), 1)


def _entries(call: Call, start: int, stop: int) -> Call:
    """The call of some batch entries."""

    def some(tensor: Tensor) -> Tensor:
        return tensor[start:stop] if len(tensor) > 1 else tensor  # one for the whole batch

    mask, plan = call.mask, call.plan
    if mask is not None and mask.dim() == 4:
        mask = some(mask)
    if plan is not None:
        plan = plan._replace(indices=some(plan.indices), counts=some(plan.counts))
    return Call(*(tensor[start:stop] for tensor in call[:3]), call.request, plan, mask)


def _forward_by_entries(recorder: Recorder, call: Call, out: Tensor | None, most: int) -> AttentionOutput:
    """`forward` of at most `most` batch entries at a time; all but the last run the same recording."""
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


def _record(recorder: Recorder, commands: VulkanCommandBuffer, call: Call, to: Operand, to_lse: Operand) -> None:
    """The kernel that serves the call best, see `best_cut`."""
    adapter = recorder.adapter
    problem = DeviceProblem(commands, call, pack=True, is_cpu=adapter.is_cpu)
    cut = best_cut(adapter, problem.sizes, recorder.pool.limit, planned=call.plan is not None)
    if isinstance(cut, RowCut):
        record_rows(cut, problem, call, to, to_lse)
    elif isinstance(cut, MatrixCut):
        record_matrices(cut, problem, call, to, to_lse)
    elif isinstance(cut, StreamCut):
        record_stream(cut, problem, call, to, to_lse)
    else:
        record_tiles(cut, problem, call, to, to_lse)


def backward(
    recorder: Recorder, call: Call, out: Tensor, lse: Tensor, grad_out: Tensor, grad_lse: Tensor | None
) -> Grads:
    """Gradients of query, key and value from a given (out, lse); None for those that the request does not name."""
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
    dtype = call.query.dtype  # the given tensors may be wider
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
    problem = DeviceProblem(commands, call, pack=False, is_cpu=recorder.adapter.is_cpu)
    sizes, dim, stage = problem.sizes, problem.sizes.dim, commands.stage
    query, key, value = (stage(tensor, dim) for tensor in call[:3])
    out, lse, grad_out, grad_lse = given[4:]
    assert out is not None and lse is not None and grad_out is not None  # noqa: PT018
    result, grad_result, row_lse = stage(out, dim), stage(grad_out, dim), stage(lse)
    grad_row_lse = commands.filled(lse.numel() * 4, 0.0) if grad_lse is None else stage(grad_lse)
    rows = commands.space(3 * lse.numel() * 4)  # what the keys' gradients need of each row, see backward_query.comp
    to_query, to_key, to_value = (commands.result(grad, dim) for grad in grads)
    constants, most = (dim, 8 if problem.is_cpu else 32), commands.most_groups[0]
    shared = [query, key, value, *problem.tables, grad_result, row_lse]
    commands.dispatch(
        f"backward_query.{sizes.dtype}",
        constants,
        [*shared, result, grad_row_lse, to_query, rows],
        problem.values(),
        LAYOUT,
        (min(sizes.len_q, most), sizes.units, 1),
    )
    commands.dispatch(
        f"backward_key.{sizes.dtype}",
        constants,
        [*shared, rows, to_key, to_value],
        problem.values(),
        LAYOUT,
        (min(sizes.len_k, most), sizes.batch * sizes.heads_kv, 1),
    )
