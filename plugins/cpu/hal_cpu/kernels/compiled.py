"""The kernels of the optional package hal-cpu-native: forward attention in C++, its workspace from the session."""

from __future__ import annotations

import torch
from torch import Tensor

from hal_core.plugin_api import AttentionOutput, AttentionRequest

from ..memory import ScratchMemory, Workspace


def forward(
    request: AttentionRequest,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    memory: ScratchMemory,
    out: Tensor | None = None,
    lse: Tensor | None = None,
) -> AttentionOutput:
    """Attention of a dense batch, all sizes above 0. `out` and `lse` are written where they are given."""
    import hal_cpu_native as native

    batch, heads, len_q, dim = query.shape
    len_k, dim_v, threads = key.shape[2], value.shape[3], torch.get_num_threads()
    if out is None:
        out = torch.empty((batch, heads, len_q, dim_v), dtype=query.dtype)
    wanted = lse
    if request.lse and (lse is None or not lse.is_contiguous()):
        lse = torch.empty((batch, heads, len_q), dtype=torch.float32)
    shapes = (batch, heads, key.shape[1], len_q, len_k, dim, dim_v)
    needed = native.workspace_bytes(shapes, str(query.dtype).removeprefix("torch."), threads)
    with Workspace(memory) as workspace:
        native.attention(
            query,
            key,
            value,
            mask,
            scale=request.effective_scale,
            band=request.band(len_q, len_k),
            softcap=request.softcap,
            out=out,
            lse=lse if request.lse else None,
            workspace=workspace.take((needed,), torch.bool),
            threads=threads,
        )
    if wanted is not None and lse is not None and wanted is not lse:
        lse = wanted.copy_(lse)
    return AttentionOutput(out, lse if request.lse else None)
