"""Attention on an OpenCL device: how a call becomes launches, forward and backward."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from hal_compute.problem import Call, Problem
from torch import Tensor

from hal_core.plugin_api import AttentionOutput, Grads, TilePlan

from ..runtime.lease import Lease, Operand
from ..tiling import OpenClTiling, Shape


class _DeviceProblem(Problem):
    """What all programs of one call share: parameters, build options, and the mask and key ranges on the device."""

    def __init__(self, lease: Lease, call: Call, *, pack: bool) -> None:
        super().__init__(call, pack=pack, scratch=lease.scratch)
        self.lease = lease
        self.options = [f"-DHEAD_DIM={self.sizes.dim}", f"-DHALF={int(self.sizes.dtype == 'float16')}"]
        unused = lease.space(64)
        staged = [
            self.mask and self.mask.values,
            self.ranges and self.ranges.offsets,
            self.ranges and self.ranges.bounds,
        ]
        self.tables = tuple((unused if tensor is None else lease.stage(tensor)).buffer for tensor in staged)


def forward(lease: Lease, tiling: OpenClTiling, call: Call, out: Tensor | None = None) -> AttentionOutput:
    """(out, log-sum-exp) of a call; the log-sum-exp is None where the request does not ask for it."""
    query = call.query
    shape, rows = (*query.shape[:3], call.value.shape[-1]), query.shape[:3]
    in_place = out is not None and out.is_contiguous() and out.dtype == query.dtype
    result = torch.empty(shape, dtype=query.dtype, device="cpu") if out is None else out
    lse = torch.empty(rows, dtype=torch.float32, device="cpu") if call.request.lse else None
    if not result.numel() or not call.key.shape[2]:
        return AttentionOutput(result.zero_(), None if lse is None else lse.fill_(-torch.inf))
    with lease:
        to = result if out is None or in_place else lease.scratch(shape, str(query.dtype).removeprefix("torch."))
        to_lse = lease.scratch(rows, "float32") if lse is None else lse
        _launch_forward(lease, tiling, call, to, to_lse)
        if to is not result:
            result.copy_(to)
    return AttentionOutput(result, lse)


def _launch_forward(lease: Lease, tiling: OpenClTiling, call: Call, result: Tensor, lse: Tensor) -> None:
    plan = call.plan if isinstance(call.plan, TilePlan) else None  # of the caller's tiling
    engine, problem = lease.engine, _DeviceProblem(lease, call, pack=plan is None)
    sizes, dim = problem.sizes, problem.sizes.dim
    shape = tiling.shape(sizes, plan)
    blocks, rows = -(-sizes.unit_rows // shape.rows), sizes.units * sizes.unit_rows
    chunk, splits = tiling.splits(shape, sizes)
    problem.split(chunk, splits)
    queries, keys, values = (lease.stage(tensor, dim) for tensor in call[:3])
    to, to_lse = lease.result(result, dim), lease.result(lse)
    part = lease.space(splits * rows * dim * 4 if splits > 1 else 64)
    part_sums = lease.space(splits * rows * 8) if splits > 1 else to_lse
    if shape.packs_keys:
        keys, values = _packed(problem, shape, keys, values)
    program, options = "forward_tiles" if shape.threads else "forward_rows", [*problem.options, *shape.options(dim)]
    threads = shape.threads or 1
    engine.launch(
        engine.kernel(program, "forward", options),
        (blocks * threads, sizes.units, splits),
        (threads, 1, 1),
        *(operand.buffer for operand in (queries, keys, values)),
        *problem.tables,
        *(operand.buffer for operand in (to, part_sums, part)),
        problem.packed(),
    )
    if splits > 1:
        arguments = (part.buffer, part_sums.buffer, to.buffer, to_lse.buffer, np.int32(splits))
        group = (1,) if engine.shares_memory else None
        engine.launch(engine.kernel("merge", "merge", problem.options), (rows,), group, *arguments)
    lease.finish()


def _packed(problem: _DeviceProblem, shape: Shape, keys: Operand, values: Operand) -> tuple[Operand, Operand]:
    """Keys as transposed float32 tiles, and values as float32."""
    lease, engine, sizes = problem.lease, problem.lease.engine, problem.sizes
    dim, len_k = sizes.dim, sizes.len_k
    units, tiles = sizes.batch * sizes.heads_kv, -(-len_k // shape.tile)
    packed = lease.space(units * tiles * shape.tile * dim * 4)
    wide = lease.space(units * len_k * dim * 4) if sizes.dtype == "float16" else values
    kernel = engine.kernel("forward_rows", "pack_keys", [*problem.options, *shape.options(dim)])
    arguments = (keys.buffer, values.buffer, packed.buffer, wide.buffer, np.int32(len_k))
    engine.launch(kernel, (tiles, units), (1, 1), *arguments)
    return packed, wide


def backward(lease: Lease, call: Call, out: Tensor, lse: Tensor, grad_out: Tensor, grad_lse: Tensor | None) -> Grads:
    """Gradients of query, key and value from a given (out, lse); None for those that the request does not name."""
    wanted = call.request.grads or frozenset("qkv")
    grads = [
        torch.empty(t.shape, dtype=t.dtype, device="cpu") if name in wanted else None
        for name, t in zip("qkv", call[:3], strict=True)
    ]
    if call.query.numel() and call.key.numel():
        with lease:
            dtype = str(call.query.dtype).removeprefix("torch.")
            to = [
                lease.scratch(t.shape, dtype) if grad is None else grad for t, grad in zip(call[:3], grads, strict=True)
            ]
            _launch_backward(lease, call, (out, lse, grad_out, grad_lse), to)
    else:
        for grad in grads:
            if grad is not None:
                grad.zero_()
    return Grads(*grads)


def _converted(lease: Lease, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor in a dtype."""
    if tensor.dtype == dtype:
        return tensor
    return lease.scratch(tensor.shape, str(dtype).removeprefix("torch.")).copy_(tensor)


def _launch_backward(lease: Lease, call: Call, given: tuple[Any, ...], grads: list[Tensor]) -> None:
    out, lse, grad_out, grad_lse = given
    engine, problem = lease.engine, _DeviceProblem(lease, call, pack=False)
    sizes, dim, parameters = problem.sizes, problem.sizes.dim, problem.packed()
    dtype = call.query.dtype  # the given tensors may be wider
    operands = (lease.stage(_converted(lease, t, dtype), dim).buffer for t in (*call[:3], out, grad_out))
    query, key, value, result, grad_result = operands
    row_lse = lease.stage(_converted(lease, lse, torch.float32)).buffer
    no_gradient = grad_lse is None
    given_lse = (
        lease.scratch(lse.shape, "float32").zero_() if no_gradient else _converted(lease, grad_lse, torch.float32)
    )
    grad_row_lse = lease.stage(given_lse).buffer
    rows = lease.space(3 * lse.numel() * 4).buffer  # what the keys' gradients need of each row, see backward.cl
    to_query, to_key, to_value = (lease.result(grad, dim).buffer for grad in grads)
    group = (1, 1) if engine.shares_memory else None
    engine.launch(
        engine.kernel("backward", "backward_query", problem.options),
        (sizes.len_q, sizes.units),
        group,
        *(query, key, value, *problem.tables, result, row_lse, grad_result, grad_row_lse, to_query, rows, parameters),
    )
    engine.launch(
        engine.kernel("backward", "backward_key", problem.options),
        (sizes.len_k, sizes.batch * sizes.heads_kv),
        group,
        *(query, key, value, *problem.tables, grad_result, rows, to_key, to_value, parameters),
    )
    lease.finish()
