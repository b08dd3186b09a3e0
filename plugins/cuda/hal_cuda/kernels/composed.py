"""Attention composed of torch's own operations: every feature with gradients, and float64; all scores lie in memory."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from hal_core.plugin_api import (
    AttentionOutput,
    AttentionRequest,
    BlockPlan,
    MaskKind,
    SequenceMetadata,
    check_tables,
    dense_mask,
    expand_block_plan,
)

from ..discovery import Chip
from .portable.dropout import dropout_pattern


def attend(
    request: AttentionRequest,
    chip: Chip,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    plan: BlockPlan | None = None,
    tables: SequenceMetadata | None = None,
    rng: tuple[int, int] | None = None,
) -> AttentionOutput:
    """Differentiable attention; packed sequences one after another (their lengths are read on the host).

    Raises ContractError where packed lengths do not tile the tensors, also in a bound call, which did not look at them.
    """
    if not request.packed:
        return _dense(request, chip, query, key, value, mask, plan, rng, 0)
    assert tables is not None
    check_tables(tables, request, query, key)
    ends_q, ends_k = tables.cu_seqlens_q.tolist(), tables.cu_seqlens_k.tolist()
    parts = []
    for number in range(len(ends_q) - 1):
        rows, keys = slice(ends_q[number], ends_q[number + 1]), slice(ends_k[number], ends_k[number + 1])
        one = replace(request, batch=1, len_q=rows.stop - rows.start, len_k=keys.stop - keys.start, packed=False)
        cut = None
        if plan is not None:
            blocks_q, entry = -(-one.len_q // plan.block_q), number if plan.indices.shape[0] > 1 else 0
            cut = plan._replace(
                indices=plan.indices[entry : entry + 1, :, :blocks_q],
                counts=plan.counts[entry : entry + 1, :, :blocks_q],
            )
        parts.append(_dense(one, chip, query[:, :, rows], key[:, :, keys], value[:, :, keys], None, cut, rng, number))
    out = torch.cat([part.out for part in parts], dim=2)
    return AttentionOutput(out, torch.cat([part.lse for part in parts], dim=2) if request.lse else None)


def _dense(
    request: AttentionRequest,
    chip: Chip,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    plan: BlockPlan | None,
    rng: tuple[int, int] | None,
    first_batch: int,
) -> AttentionOutput:
    batch, heads, len_q, _ = query.shape
    heads_kv, len_k = key.shape[1:3]
    kind = _sum_dtype(query)
    group = heads // max(heads_kv, 1)
    rows = query.to(kind).reshape(batch, heads_kv, group, len_q, query.shape[3])
    scores = (rows @ key.to(kind).unsqueeze(2).mT * request.effective_scale).view(batch, heads, len_q, len_k)
    if request.softcap is not None:
        scores = request.softcap * torch.tanh(scores / request.softcap)
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf) if request.mask is MaskKind.BOOLEAN else scores + mask.to(kind)
    band = dense_mask(request, len_q, len_k, device=query.device)
    if band is not None:
        scores = scores.masked_fill(~band, -math.inf)
    if plan is not None:
        scores = scores.masked_fill(~expand_block_plan(plan, len_q, len_k), -math.inf)
    dead = (scores == -math.inf).all(dim=-1)  # rows without a key: 0 and -inf, and no gradient
    scores = scores.masked_fill(dead.unsqueeze(-1), 0.0)
    weights = torch.softmax(scores, dim=-1)
    if request.dropout:
        assert rng is not None
        keep = dropout_pattern(chip, (batch, heads, len_q, len_k), request.dropout, rng, query.device, first_batch)
        weights = weights * keep / (1 - request.dropout)
    grouped = weights.view(batch, heads_kv, group, len_q, len_k) @ value.to(kind).unsqueeze(2)
    out = grouped.reshape(batch, heads, len_q, value.shape[3]).masked_fill(dead.unsqueeze(-1), 0.0)
    lse = None
    if request.lse:
        lse = torch.logsumexp(scores, dim=-1).masked_fill(dead, -math.inf)
        lse = lse if query.dtype == torch.float64 else lse.float()
    return AttentionOutput(out.to(query.dtype), lse)


def _sum_dtype(query: Tensor) -> torch.dtype:
    """float32 for 16-bit tensors; float64 for float64, and for float32 where torch was told to round its products to
    TF32.
    """
    rounds = query.is_cuda and torch.backends.cuda.matmul.allow_tf32
    return torch.float64 if query.dtype == torch.float64 or (query.dtype == torch.float32 and rounds) else torch.float32
