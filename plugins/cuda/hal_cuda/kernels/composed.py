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

from ..memory import Borrowed, borrowing
from ..runtime.context import Context
from .portable.dropout import dropout_pattern


def attend(
    request: AttentionRequest,
    context: Context,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    plan: BlockPlan | None = None,
    tables: SequenceMetadata | None = None,
    rng: tuple[int, int] | None = None,
) -> AttentionOutput:
    """Attention, differentiable where gradients are asked for; else its scores lie in memory of the session.

    Packed sequences are computed one after another (their lengths are read on the host).

    Raises:
        ContractError: packed lengths do not tile the tensors, also in a bound call, which did not look at them.
    """
    differentiable = torch.is_grad_enabled() and bool(request.grads)
    if differentiable and not request.packed:
        return _differentiable(request, context, query, key, value, mask, plan, rng, 0)
    out, lse = _empty_result(request, query, value)
    if not request.packed:
        _in_place(request, context, query, key, value, mask, plan, rng, 0, out, lse)
        return AttentionOutput(out, lse)
    assert tables is not None
    assert tables.cu_seqlens_q is not None
    assert tables.cu_seqlens_k is not None
    on_host = SequenceMetadata(*torch.stack((tables.cu_seqlens_q, tables.cu_seqlens_k)).cpu())  # waits once
    check_tables(on_host, request, query, key)
    ends_q, ends_k = (ends.tolist() for ends in on_host[:2] if ends is not None)
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
        given = (query[:, :, rows], key[:, :, keys], value[:, :, keys])
        if differentiable:
            parts.append(_differentiable(one, context, *given, None, cut, rng, number))
        else:
            of_rows = None if lse is None else lse[:, :, rows]
            _in_place(one, context, *given, None, cut, rng, number, out[:, :, rows], of_rows)
    if not differentiable:
        return AttentionOutput(out, lse)
    out = torch.cat([part.out for part in parts], dim=2)
    return AttentionOutput(out, torch.cat([part.lse for part in parts], dim=2) if request.lse else None)


def _differentiable(
    request: AttentionRequest,
    context: Context,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    plan: BlockPlan | None,
    rng: tuple[int, int] | None,
    first_batch: int,
) -> AttentionOutput:
    """Attention whose operations torch differentiates; it keeps their results for the backward."""
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
    fully_masked = (scores == -math.inf).all(dim=-1)  # 0 and -inf, and no gradient
    scores = scores.masked_fill(fully_masked.unsqueeze(-1), 0.0)
    weights = torch.softmax(scores, dim=-1)
    if request.dropout:
        assert rng is not None
        shape = (batch, heads, len_q, len_k)
        keep = dropout_pattern(context.chip, shape, request.dropout, rng, query.device, first_batch)
        weights = weights * keep / (1 - request.dropout)
    grouped = weights.view(batch, heads_kv, group, len_q, len_k) @ value.to(kind).unsqueeze(2)
    out = grouped.reshape(batch, heads, len_q, value.shape[3]).masked_fill(fully_masked.unsqueeze(-1), 0.0)
    lse = None
    if request.lse:
        lse = torch.logsumexp(scores, dim=-1).masked_fill(fully_masked, -math.inf)
        lse = lse if query.dtype == torch.float64 else lse.float()
    return AttentionOutput(out.to(query.dtype), lse)


def _in_place(
    request: AttentionRequest,
    context: Context,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    plan: BlockPlan | None,
    rng: tuple[int, int] | None,
    first_batch: int,
    out: Tensor,
    lse: Tensor | None,
) -> None:
    """The same without gradients, into out and lse. Scores become weights in one tensor of the session's memory."""
    batch, heads, len_q, dim_v = out.shape
    heads_kv, len_k = key.shape[1:3]
    if not len_q:
        return
    if not len_k:
        out.zero_()
        if lse is not None:
            lse.fill_(-math.inf)
        return
    kind, shape = _sum_dtype(query), (batch, heads, len_q, len_k)
    folded = (batch * heads_kv, heads // max(heads_kv, 1) * len_q)  # the query heads of a key head, as rows
    with borrowing(context.memory) as borrow, torch.no_grad():
        scores = borrow(shape, kind)
        by_key_head = scores.view(*folded, len_k)
        rows = _operand(query, kind, borrow).view(*folded, query.shape[3])
        keys, values = (_operand(t, kind, borrow).flatten(0, 1) for t in (key, value))
        torch.baddbmm(by_key_head, rows, keys.mT, beta=0, alpha=request.effective_scale, out=by_key_head)
        if request.softcap is not None:
            scores.div_(request.softcap).tanh_().mul_(request.softcap)
        hidden = scores.new_full((), -math.inf)
        if mask is not None and request.mask is MaskKind.BOOLEAN:
            torch.where(mask, scores, hidden, out=scores)
        elif mask is not None:
            scores.add_(mask)
        _hide_band(scores, request, borrow)
        if plan is not None:
            _hide_blocks(scores, plan, borrow)
        largest = torch.amax(scores, -1, keepdim=True, out=borrow((*shape[:3], 1), kind))
        largest.clamp_(min=torch.finfo(kind).min)  # a fully masked row: its weights are exp(-inf) = 0
        scores.sub_(largest).exp_()
        total = torch.sum(scores, -1, keepdim=True, out=borrow((*shape[:3], 1), kind))
        if lse is not None:
            logarithm = torch.log(total, out=borrow(total.shape, kind))
            torch.add(largest[..., 0], logarithm[..., 0], out=lse)
        if request.dropout:
            assert rng is not None
            keep = borrow(shape, torch.bool)
            dropout_pattern(context.chip, shape, request.dropout, rng, query.device, first_batch, out=keep)
            torch.where(keep, scores, scores.new_zeros(()), out=scores)
        total.clamp_(min=0.5).mul_(1 - request.dropout)  # 1 or more, but for fully masked rows
        sums = out if out.dtype == kind and out.is_contiguous() else borrow(out.shape, kind)
        torch.bmm(by_key_head, values, out=sums.view(*folded, dim_v))
        sums.div_(total)
        if sums is not out:
            out.copy_(sums)


def _empty_result(request: AttentionRequest, query: Tensor, value: Tensor) -> tuple[Tensor, Tensor | None]:
    shape, kind = query.shape[:3], torch.float64 if query.dtype == torch.float64 else torch.float32
    out = torch.empty((*shape, value.shape[3]), dtype=query.dtype, device=query.device)
    return out, torch.empty(shape, dtype=kind, device=query.device) if request.lse else None


def _operand(tensor: Tensor, kind: torch.dtype, borrow: Borrowed) -> Tensor:
    """The tensor in a dtype, contiguous: itself, or a copy in borrowed memory."""
    if tensor.dtype == kind and tensor.is_contiguous():
        return tensor
    return borrow(tensor.shape, kind).copy_(tensor)


def _hide_band(scores: Tensor, request: AttentionRequest, borrow: Borrowed) -> None:
    """Hide what causal and window hide; `dense_mask` of the core in borrowed memory."""
    len_q, len_k = scores.shape[2:]
    low, high = request.band(len_q, len_k)
    if low is None and high is None:
        return
    hidden, visible = scores.new_full((), -math.inf), borrow((len_q, len_k), torch.bool)
    columns = torch.arange(len_k, out=borrow((len_k,), torch.int64))
    for offset, compare in ((low, torch.ge), (high, torch.le)):
        if offset is not None:
            bound = torch.arange(offset, offset + len_q, out=borrow((len_q,), torch.int64)).unsqueeze(1)
            torch.where(compare(columns, bound, out=visible), scores, hidden, out=scores)


def _hide_blocks(scores: Tensor, plan: BlockPlan, borrow: Borrowed) -> None:
    """Hide what a block plan leaves out, one row of blocks after the other."""
    len_k = scores.shape[3]
    blocks_k = -(-len_k // plan.block_k)
    hidden, (batch, heads, rows, most) = scores.new_full((), -math.inf), plan.indices.shape
    # One block beyond the last stands for entries past the count.
    listed, block_of_key = borrow((batch, heads, blocks_k + 1), torch.bool), borrow((len_k,), torch.int64)
    torch.arange(len_k, out=block_of_key).div_(plan.block_k, rounding_mode="floor")
    visible = borrow((batch, heads, len_k), torch.bool)
    index, place = borrow((batch, heads, most), torch.int64), torch.arange(most, device=scores.device)
    for row in range(rows):
        index.copy_(plan.indices[:, :, row])
        index.masked_fill_(place >= plan.counts[:, :, row, None], blocks_k)
        listed.zero_().scatter_(-1, index, True)
        torch.index_select(listed, -1, block_of_key, out=visible)
        part = scores[:, :, row * plan.block_q : (row + 1) * plan.block_q]
        torch.where(visible.unsqueeze(2), part, hidden, out=part)


def _sum_dtype(query: Tensor) -> torch.dtype:
    """float32 for 16-bit tensors; float64 for float64, and for float32 where torch was told to round its products to
    TF32.
    """
    rounds = query.is_cuda and torch.backends.cuda.matmul.allow_tf32
    return torch.float64 if query.dtype == torch.float64 or (query.dtype == torch.float32 and rounds) else torch.float32
