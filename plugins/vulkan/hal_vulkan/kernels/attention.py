"""Attention on a Vulkan device: how a call becomes a recording, forward and backward."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from hal_compute.problem import LAYOUT, Call
from hal_compute.sizes import padded_dim
from torch import Tensor

from hal_core.plugin_api import AttentionOutput, BlockPlan, Grads, TilePlan

from ..runtime.command_buffer import Given, Operand, VulkanCommandBuffer
from ..runtime.recorder import Recorder, number
from ..tiling import MatrixCut, RowCut, StreamCut, VulkanTiling
from .device_problem import DeviceProblem
from .forward import record_matrices, record_rows, record_tiles
from .stream import record_stream


def forward(recorder: Recorder, tiling: VulkanTiling, call: Call, out: Tensor | None = None) -> AttentionOutput:
    """(out, log-sum-exp) of a call; the log-sum-exp is None where the request does not ask for it."""
    query, key, value, asked = call.query, call.key, call.value, call.request
    if (most := _most_entries(recorder, call)) < len(query):
        return _forward_by_entries(recorder, tiling, call, out, most)
    same_dtype = out is None or out.dtype == query.dtype
    in_place = out is not None and same_dtype and recorder.lies(out)
    given = (query, key, value, call.mask, out if in_place else None)
    name = None if call.plan is not None else recorder.key("forward", number(asked), given)
    if same_dtype and (kept := recorder.find(name)) is not None:
        return AttentionOutput(*kept.run(given, (out,)))
    recorder.check_alive()
    shape = (*query.shape[:3], value.shape[-1])
    result = query.new_empty(shape) if out is None else out
    lse = torch.empty(query.shape[:3], dtype=torch.float32, device=query.device) if asked.lse else None
    if not result.numel() or not key.shape[2]:
        return AttentionOutput(result.zero_(), None if lse is None else lse.fill_(-torch.inf))
    with recorder.call(f"compute attention ({asked.describe()})", given, name if same_dtype else None) as commands:
        dim = padded_dim(asked)
        target = result if same_dtype else _temporary(commands, shape, query)
        to = commands.result(target, dim)
        to_lse = commands.space(query[..., 0].numel() * 4) if lse is None else commands.result(lse)
        _record(recorder, tiling, commands, call, to, to_lse)
        commands.finish()
        if target is not result:
            result.copy_(target)
    return AttentionOutput(result, lse)


def _temporary(commands: VulkanCommandBuffer, shape: Sequence[int], like: Tensor) -> Tensor:
    """A tensor for the length of the call, with the dtype and device of another."""
    if like.device.type != "cpu":
        return like.new_empty(shape)
    return commands.scratch(shape, str(like.dtype).removeprefix("torch."))


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
    if isinstance(plan, BlockPlan):
        plan = plan._replace(indices=some(plan.indices), counts=some(plan.counts))
    query, key, value = (tensor[start:stop] for tensor in call[:3])
    return Call(query, key, value, call.request, plan, mask)


def _forward_by_entries(
    recorder: Recorder, tiling: VulkanTiling, call: Call, out: Tensor | None, most: int
) -> AttentionOutput:
    """`forward` of at most `most` batch entries at a time; all but the last run the same recording."""
    query = call.query
    if out is None:
        out = query.new_empty((*query.shape[:3], call.value.shape[-1]))
    parts = [
        forward(recorder, tiling, _entries(call, start, start + most), out[start : start + most]).lse
        for start in range(0, len(query), most)
    ]
    return AttentionOutput(out, torch.cat(parts) if call.request.lse else None)


def _record(
    recorder: Recorder, tiling: VulkanTiling, commands: VulkanCommandBuffer, call: Call, to: Operand, to_lse: Operand
) -> None:
    """The kernel that the tiling cuts the call for."""
    plan = call.plan if isinstance(call.plan, TilePlan) else None  # of the caller's tiling
    problem = DeviceProblem(commands, call, pack=plan is None, is_cpu=recorder.adapter.is_cpu)
    cut = tiling.cut(problem.sizes, planned=isinstance(call.plan, BlockPlan), plan=plan)
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
        parts = []
        for at in range(0, len(call.query), most):
            some = slice(at, at + most)
            part_lse = None if grad_lse is None else grad_lse[some]
            given_part = _entries(call, at, at + most), out[some], lse[some], grad_out[some], part_lse
            parts.append(backward(recorder, *given_part))
        return Grads(*(None if each[0] is None else torch.cat(each) for each in zip(*parts, strict=True)))
    inputs = dict(zip("qkv", call[:3], strict=True))
    wanted = [name for name in inputs if name in (call.request.grads or "qkv")]
    to_lse = None if grad_lse is None else grad_lse.float()
    dtype = call.query.dtype  # the given tensors may be wider
    given: Given = (*call[:3], call.mask, out.to(dtype), lse.float(), grad_out.to(dtype), to_lse)
    name = None if call.plan is not None else recorder.key("backward", number(call.request), given)
    if (kept := recorder.find(name)) is not None:
        grads = kept.run(given)
    elif call.query.numel() and call.key.numel():
        grads = [inputs[name].new_empty(inputs[name].shape) for name in wanted]
        with recorder.call(f"compute gradients ({call.request.describe()})", given, name) as commands:
            _record_backward(recorder, commands, call, given, dict(zip(wanted, grads, strict=True)))
            commands.finish()
    else:
        grads = [inputs[name].new_zeros(inputs[name].shape) for name in wanted]
    found = dict(zip(wanted, grads, strict=True))
    return Grads(*map(found.get, "qkv"))


def _record_backward(
    recorder: Recorder, commands: VulkanCommandBuffer, call: Call, given: Given, grads: dict[str, Tensor]
) -> None:
    problem = DeviceProblem(commands, call, pack=False, is_cpu=recorder.adapter.is_cpu)
    sizes, dim, stage = problem.sizes, problem.sizes.dim, commands.stage
    query, key, value = (stage(tensor, dim) for tensor in call[:3])
    out, lse, grad_out, grad_lse = given[4:]
    assert out is not None and lse is not None and grad_out is not None  # noqa: PT018
    result, grad_result, row_lse = stage(out, dim), stage(grad_out, dim), stage(lse)
    grad_row_lse = commands.filled(lse.numel() * 4, 0.0) if grad_lse is None else stage(grad_lse)
    rows = commands.space(3 * lse.numel() * 4)  # what the keys' gradients need of each row, see backward_query.comp
    to_query, to_key, to_value = (
        commands.result(grads[name], dim)
        if name in grads
        else commands.space(tensor[..., 0].numel() * dim * tensor.element_size())
        for name, tensor in zip("qkv", call[:3], strict=True)
    )
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
