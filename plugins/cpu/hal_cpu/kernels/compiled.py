"""The kernels of the optional package hal-cpu-native: attention in C++, its workspace from the session."""

from __future__ import annotations

import torch
from torch import Tensor

from hal_core.plugin_api import AttentionOutput, AttentionRequest, BlockPlan, Grads

from ..memory import ScratchMemory, Workspace
from .problem import visible_blocks
from .tiled_backward import Given


def forward(
    request: AttentionRequest,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    memory: ScratchMemory,
    out: Tensor | None = None,
    lse: Tensor | None = None,
    plan: BlockPlan | None = None,
) -> AttentionOutput:
    """Attention of a dense batch, all sizes above 0; blocks that `plan` leaves out are not read. `out` and `lse` are
    written where they are given.
    """
    import hal_cpu_native as native

    batch, heads, len_q, dim = query.shape
    len_k, dim_v, threads = key.shape[2], value.shape[3], torch.get_num_threads()
    if out is None:
        out = torch.empty((batch, heads, len_q, dim_v), dtype=query.dtype)
    wanted = lse
    if request.lse and (lse is None or not lse.is_contiguous()):
        lse = torch.empty((batch, heads, len_q), dtype=torch.float32)
    # Heads with patterns of their own are worked on one by one, as if each had a key head of its own.
    heads_kv = heads if plan is not None and plan.indices.shape[1] > 1 else key.shape[1]
    kernel = native.Kernel.AUTO if plan is None else native.Kernel.PREFILL
    shapes = (batch, heads, heads_kv, len_q, len_k, dim, dim_v)
    needed = native.workspace_bytes(shapes, str(query.dtype).removeprefix("torch."), threads, kernel=kernel)
    with Workspace(memory) as workspace:
        if mask is not None and mask.dtype not in (torch.bool, torch.float32, query.dtype):
            mask = workspace.copy(mask, torch.float32)
        native.attention(
            query,
            key,
            value,
            mask,
            blocks=None if plan is None else visible_blocks(plan, len_k, workspace),
            block_size=(0, 0) if plan is None else (plan.block_q, plan.block_k),
            scale=request.effective_scale,
            band=request.band(len_q, len_k),
            softcap=request.softcap,
            out=out,
            lse=lse if request.lse else None,
            workspace=workspace.take((needed,), torch.bool),
            threads=threads,
            kernel=kernel,
        )
    if wanted is not None and lse is not None and wanted is not lse:
        lse = wanted.copy_(lse)
    return AttentionOutput(out, lse if request.lse else None)


def backward(
    request: AttentionRequest,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    given: Given,
    memory: ScratchMemory,
) -> Grads:
    """Gradients of query, key and value of a dense batch, all sizes above 0, without a block plan."""
    import hal_cpu_native as native

    batch, heads, len_q, dim = query.shape
    len_k, dim_v, threads = key.shape[2], value.shape[3], torch.get_num_threads()
    shapes = (batch, heads, key.shape[1], len_q, len_k, dim, dim_v)
    needed = native.workspace_bytes(shapes, str(query.dtype).removeprefix("torch."), threads, backward=True)
    with Workspace(memory) as workspace:
        # Autograd's own gradients may be broadcast, and torch's log-sum-exp lies with its heads last.
        out, grad_out = (t if t.stride(3) == 1 else workspace.copy(t) for t in (given.out, given.grad_out))
        lse = given.lse if given.lse.is_contiguous() else workspace.copy(given.lse)
        grad_lse = given.grad_lse
        if grad_lse is not None and not (grad_lse.is_contiguous() and grad_lse.dtype == torch.float32):
            grad_lse = workspace.copy(grad_lse, torch.float32)
        found = native.attention_backward(
            query,
            key,
            value,
            out,
            lse,
            grad_out,
            mask,
            grad_lse=grad_lse,
            scale=request.effective_scale,
            band=request.band(len_q, len_k),
            softcap=request.softcap,
            workspace=workspace.take((needed,), torch.bool),
            threads=threads,
        )
        del out, grad_out, lse, grad_lse
    return Grads(*found)
