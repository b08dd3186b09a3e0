"""Attention in float64, written to be read: what every device is compared with."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..contract import Options, describe
from ..errors import ContractError
from ..request import AttentionOutput, AttentionRequest, Causal, Grads, SequenceTables
from ..tiling import BlockPlan

NO_TABLES = SequenceTables()


def request_of(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, *, plan: BlockPlan | None = None,
    tables: SequenceTables | None = None, grads: frozenset[str] = frozenset(), **options: Any,
) -> AttentionRequest:  # fmt: skip
    """The request that `hal_core.attention` would make of this call.

    Args:
        query, key, value, mask, plan, tables: as for `reference`.
        grads: what gradients are wanted of, a subset of {"q", "k", "v", "mask"}.
        options: keyword arguments of `hal_core.attention`: is_causal, causal, window, softcap, scale ... Grouped heads
            need no `enable_gqa`, and packed sequences no longest length.

    Raises:
        ContractError: as `hal_core.attention`.
    """
    options = {"enable_gqa": True} | options
    if tables is not None and tables.cu_seqlens_q is not None and tables.cu_seqlens_k is not None:
        longest = [int(cumulative.diff().max()) for cumulative in tables[:2]]
        options = dict(zip(("max_seqlen_q", "max_seqlen_k"), longest, strict=True)) | options
    return describe(query, key, value, mask, plan, tables, Options(**options), grads)


def reference(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, *, request: AttentionRequest | None = None,
    plan: BlockPlan | None = None, tables: SequenceTables | None = None, keep: Tensor | None = None, **options: Any,
) -> AttentionOutput:  # fmt: skip
    """Attention in float64, dense, one plain step after the other.

    Args:
        query: [batch, heads_q, len_q, dim_qk]; packed: [1, heads_q, total_q, dim_qk].
        key, value: [batch, heads_kv, len_k, dim]; packed: [1, heads_kv, total_k, dim]; paged: [pages, heads_kv,
            page_size, dim].
        mask: boolean or additive, broadcastable to [batch, heads_q, len_q, len_k]; None for none.
        request: the call's options; None to take them from `options`, see `request_of`.
        plan, tables: of a block-sparse, packed or paged call.
        keep: boolean, broadcastable to [batch, heads_q, len_q, len_k]: the weights that dropout keeps.

    Returns:
        (out, lse), both float64: [batch, heads_q, len_q, dim_v] and [batch, heads_q, len_q], packed as the query is.
        A row that reads no key gives 0 and -inf.

    Raises:
        ContractError: dropout without the weights to keep.
    """
    request = request or request_of(query, key, value, mask, plan=plan, tables=tables, **options)
    if request.dropout > 0 and keep is None:
        raise ContractError(f"dropout {request.dropout:g} was given without `keep`: pass the weights that were kept")
    tables = tables or NO_TABLES
    parts = [_dense(part, request) for part in _sequences(query, key, value, mask, keep, plan, tables, request)]
    axis = 2 if tables.cu_seqlens_q is not None else 0
    return AttentionOutput(torch.cat([out for out, _ in parts], axis), torch.cat([lse for _, lse in parts], axis))


def reference_gradients(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, *, grad_out: Tensor,
    grad_lse: Tensor | None = None, request: AttentionRequest | None = None, plan: BlockPlan | None = None,
    tables: SequenceTables | None = None, keep: Tensor | None = None, **options: Any,
) -> Grads:  # fmt: skip
    """Gradients of `reference` in float64, by torch's autograd.

    Args:
        grad_out: gradient of the output, in its shape. grad_lse: of the log-sum-exp, in its shape; None for zero.
        request: as for `reference`; request.grads names what is wanted. Without a request: all there are.
        query, key, value, mask, plan, tables, keep, options: as for `reference`.

    Returns:
        Grads, each in its tensor's shape. Rows that read no key contribute 0, never NaN.
    """
    if request is None:
        wanted = {"q", "k", "v", "mask"} - ({"mask"} if mask is None or mask.dtype == torch.bool else set())
        request = request_of(query, key, value, mask, plan=plan, tables=tables, grads=frozenset(wanted), **options)
    leaves = {"q": query, "k": key, "v": value} | ({"mask": mask} if mask is not None else {})
    for name in request.grads:
        leaves[name] = leaves[name].detach().double().requires_grad_()
    out, lse = reference(
        leaves["q"], leaves["k"], leaves["v"], leaves.get("mask"), request=request, plan=plan, tables=tables, keep=keep
    )
    total = (out * grad_out.double()).sum()
    if grad_lse is not None:
        total = total + (lse.masked_fill(lse == -math.inf, 0) * grad_lse.double()).sum()
    names = sorted(request.grads)
    found = torch.autograd.grad(total, [leaves[n] for n in names], allow_unused=True, materialize_grads=True)
    by_name = dict(zip(names, found, strict=True))
    return Grads(*(by_name.get(name) for name in ("q", "k", "v", "mask")))


def relative_error(x: Tensor, want: Tensor) -> float:
    """||x - want|| / ||want|| in float64; 0 where both are 0.

    Infinite entries (the log-sum-exp of a row that reads no key) must stand at the same places with the same sign,
    otherwise the result is inf; the norms are over the others. A NaN on either side gives inf: it never passes a bound.

    Raises:
        ContractError: the shapes differ.
    """
    if x.shape != want.shape:
        raise ContractError(f"shape {tuple(x.shape)} was compared with {tuple(want.shape)}: they must be equal")
    x, want = x.detach().double().cpu(), want.detach().double().cpu()
    infinite = x.isinf() | want.isinf()
    if bool(x.isnan().any() | want.isnan().any()) or not torch.equal(x[infinite], want[infinite]):
        return math.inf
    error, size = float((x - want)[~infinite].norm()), float(want[~infinite].norm())
    return 0.0 if error == 0 else error / size if size else math.inf


class _Part(NamedTuple):
    """One sequence, or a whole batch of equal lengths: dense tensors, and what its scores are masked with."""

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    keep: Tensor | None
    planned: Tensor | None


def _sequences(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, keep: Tensor | None, plan: BlockPlan | None,
    tables: SequenceTables, request: AttentionRequest,
) -> Iterator[_Part]:  # fmt: skip
    """The call as plain attention problems: one for a dense batch, one for each packed or paged sequence."""
    cu_q, cu_k, pages, held, key_scale, value_scale = tables
    planned = None if plan is None else _planned_pairs(plan, request.len_q, request.len_k)
    if cu_q is None and pages is None:
        key, value = _scaled(key, key_scale), _scaled(value, value_scale)
        yield _Part(query, key, value, mask, keep, planned)
        return
    for s in range(request.batch):
        q = query[s : s + 1] if cu_q is None else query[:, :, int(cu_q[s]) : int(cu_q[s + 1])]
        if pages is not None:
            count = int(held[s])
            listed = pages[s, : -(-count // key.shape[2])].long()
            k, v = (t[listed].transpose(0, 1).flatten(1, 2)[None, :, :count] for t in (key, value))
        else:
            k, v = (t[:, :, int(cu_k[s]) : int(cu_k[s + 1])] for t in (key, value))
        k, v = _scaled(k, _of_sequence(key_scale, s)), _scaled(v, _of_sequence(value_scale, s))
        masks = (_cut(_of_sequence(each, s), q.shape[2], k.shape[2]) for each in (mask, keep, planned))
        yield _Part(q, k, v, *masks)


def _dense(part: _Part, request: AttentionRequest) -> AttentionOutput:
    query, key, value = (t.double() for t in part[:3])
    group = request.heads_q // request.heads_kv
    key, value = key.repeat_interleave(group, dim=1), value.repeat_interleave(group, dim=1)
    scores = query @ key.transpose(-1, -2) * request.effective_scale
    if request.softcap is not None:
        scores = request.softcap * torch.tanh(scores / request.softcap)
    visible = _visible_pairs(request, query.shape[2], key.shape[2], query.device)
    if part.planned is not None:
        visible = visible & part.planned
    if part.mask is not None and part.mask.dtype == torch.bool:
        visible = visible & part.mask
    elif part.mask is not None:
        hidden = part.mask == -math.inf
        visible = visible & ~hidden
        scores = scores + part.mask.double().masked_fill(hidden, 0)
    visible = visible.expand(scores.shape)
    scores = scores.masked_fill(~visible, -math.inf)
    dead = ~visible.any(-1, keepdim=True)
    # amax has no identity: an empty row of scores gets one column of -inf for it.
    peak = torch.nn.functional.pad(scores.detach(), (0, 1), value=-math.inf).amax(-1, keepdim=True).masked_fill(dead, 0)
    weights = torch.exp(scores - peak)
    total = weights.sum(-1, keepdim=True).masked_fill(dead, 1)
    weights = weights / total
    if request.dropout > 0 and part.keep is not None:
        weights = weights * part.keep / (1 - request.dropout)
    return AttentionOutput(weights @ value, (peak + total.log()).masked_fill(dead, -math.inf).squeeze(-1))


def _visible_pairs(request: AttentionRequest, len_q: int, len_k: int, device: torch.device) -> Tensor:
    """[len_q, len_k]: what causal and window leave visible. Written apart from `dense_mask`, which devices use."""
    shift = len_k - len_q if request.causal is Causal.BOTTOM_RIGHT else 0
    row = torch.arange(len_q, device=device)[:, None] + shift + request.diagonal
    column = torch.arange(len_k, device=device)[None, :]
    left, right = request.window or (None, None)
    visible = torch.ones(len_q, len_k, dtype=torch.bool, device=device)
    if request.causal is not Causal.NONE:
        visible &= column <= row
    if left is not None:
        visible &= column >= row - left
    if right is not None:
        visible &= column <= row + right
    return visible


def _planned_pairs(plan: BlockPlan, len_q: int, len_k: int) -> Tensor:
    """[batch or 1, heads or 1, len_q, len_k]: what a block plan leaves visible, block by block."""
    *lead, rows = plan.counts.shape
    visible = torch.zeros(*lead, len_q, len_k, dtype=torch.bool, device=plan.counts.device)
    for b in range(lead[0]):
        for h in range(lead[1]):
            for row in range(rows):
                for column in plan.indices[b, h, row, : int(plan.counts[b, h, row])].tolist():
                    q_start, k_start = row * plan.block_q, column * plan.block_k
                    visible[b, h, q_start : q_start + plan.block_q, k_start : k_start + plan.block_k] = True
    return visible


def _scaled(cache: Tensor, scale: Tensor | None) -> Tensor:
    return cache if scale is None else cache.double() * scale.double()


def _of_sequence(tensor: Tensor | None, sequence: int) -> Tensor | None:
    """A tensor's part for one sequence; a first dimension of 1, or fewer than four dimensions, is for all."""
    if tensor is None or tensor.dim() < 4 or tensor.shape[0] == 1:
        return tensor
    return tensor[sequence : sequence + 1]


def _cut(mask: Tensor | None, len_q: int, len_k: int) -> Tensor | None:
    """A mask made for the longest sequence, cut to one sequence's lengths."""
    if mask is None:
        return None
    mask = mask if mask.shape[-2] == 1 else mask[..., :len_q, :]
    return mask if mask.shape[-1] == 1 else mask[..., :len_k]
