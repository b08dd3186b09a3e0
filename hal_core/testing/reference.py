"""Attention in float64, written to be read: what every device is compared with."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .. import AttentionOutput, AttentionRequest, BlockPlan, Causal, ContractError, Grads, SequenceMetadata
from ..frontend.operands import Operands
from ..frontend.validation import CallOptions, build_request
from ..toolkit.caches import dequantized


def request_of(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    *,
    plan: BlockPlan | None = None,
    tables: SequenceMetadata | None = None,
    grads: frozenset[str] = frozenset(),
    **options: Any,
) -> AttentionRequest:
    """The request that `hal_core.attention` would make of this call.

    Args:
        query, key, value, mask, plan, tables: as for `reference`.
        grads: what gradients are wanted of, a subset of {"q", "k", "v", "mask"}.
        options: keyword arguments of `hal_core.attention`: is_causal, causal, window, softcap, scale ... Grouped heads
            need no `enable_gqa`, and packed sequences no longest length.

    Raises:
        ContractError: as `hal_core.attention`.
    """
    if tables is not None and tables.cu_seqlens_q is not None:
        longest = (int(cumulative.diff().max()) for cumulative in tables[:2])
        options = dict(zip(("max_seqlen_q", "max_seqlen_k"), longest, strict=True)) | options
    operands = Operands(query, key, value, mask, plan, tables)
    return build_request(operands, CallOptions(**{"enable_gqa": True, **options}), grads)


def reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    *,
    request: AttentionRequest | None = None,
    plan: BlockPlan | None = None,
    tables: SequenceMetadata | None = None,
    keep: Tensor | None = None,
    **options: Any,
) -> AttentionOutput:
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
        ContractError: dropout without the weights to keep; malformed input.
    """
    request = request or request_of(query, key, value, mask, plan=plan, tables=tables, **options)
    if request.dropout > 0 and keep is None:
        raise ContractError(f"dropout {request.dropout:g} was given without `keep`: pass the weights that were kept")
    planned = None if plan is None else _planned_pairs(plan, request.len_q, request.len_k)
    tables = tables or SequenceMetadata()
    parts = [_dense(request, *part) for part in _sequences(request, tables, query, key, value, mask, keep, planned)]
    axis = 2 if request.packed else 0
    return AttentionOutput(torch.cat([out for out, _ in parts], axis), torch.cat([lse for _, lse in parts], axis))


def reference_gradients(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    *,
    grad_out: Tensor,
    grad_lse: Tensor | None = None,
    request: AttentionRequest | None = None,
    **options: Any,
) -> Grads:
    """Gradients of `reference` in float64, by torch's autograd.

    Args:
        grad_out: gradient of the output, in its shape. grad_lse: of the log-sum-exp, in its shape; None for zero.
        request: as for `reference`; request.grads names what is wanted. Without a request: all there are.
        query, key, value, mask, options: as for `reference`, with its plan, tables and keep.

    Returns:
        Grads, each in its tensor's shape. Rows that read no key contribute 0, never NaN.
    """
    if request is None:
        wanted = {"q", "k", "v", "mask"} - ({"mask"} if mask is None or mask.dtype == torch.bool else set())
        described = {name: value for name, value in options.items() if name != "keep"}
        request = request_of(query, key, value, mask, grads=frozenset(wanted), **described)
    given: dict[str, Any] = {name: options.get(name) for name in ("plan", "tables", "keep")}
    leaves: dict[str, Any] = dict(zip(("q", "k", "v", "mask"), (query, key, value, mask), strict=True))
    names = sorted(request.grads)
    leaves |= {name: leaves[name].detach().double().requires_grad_() for name in names}
    out, lse = reference(*leaves.values(), request=request, **given)
    total = (out * grad_out.double()).sum()
    if grad_lse is not None:
        total = total + (lse.masked_fill(lse == -math.inf, 0) * grad_lse.double()).sum()
    found = torch.autograd.grad(total, [leaves[name] for name in names], allow_unused=True, materialize_grads=True)
    by_name = dict(zip(names, found, strict=True))
    return Grads(*(by_name.get(name) for name in leaves))


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


def _sequences(
    request: AttentionRequest,
    tables: SequenceMetadata,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *masks: Tensor | None,
) -> Iterator[tuple[Any, ...]]:
    """The call as plain attention problems (query, key, value, *masks): a dense batch, or each packed or paged
    sequence.
    """
    cu_q, cu_k, pages, held, key_scale, value_scale = tables
    if cu_q is None and held is None:
        yield query, _scaled(key, key_scale), _scaled(value, value_scale), *masks
        return
    for s in range(request.batch):
        if pages is not None:
            q, count = query[s : s + 1], int(held[s])
            listed = pages[s, : -(-count // key.shape[2])].long()
            k, v = (_listed(t, listed, count) for t in (key, value))
        elif cu_q is None:
            q, k, v = query[s : s + 1], *(t[s : s + 1, :, : int(held[s])] for t in (key, value))
        else:
            end = int(cu_k[s + 1] if held is None else cu_k[s] + held[s])
            q, *others = query[:, :, int(cu_q[s]) : int(cu_q[s + 1])], key, value
            k, v = (t[:, :, int(cu_k[s]) : end] for t in others)
        of_values = _of_sequence(value_scale, s)
        if value_scale is not None and value_scale.dim() > 1 and value_scale.shape[-2] > 1:  # where the keys lie
            wide = value_scale.expand(*value.shape[:3], 1)
            of_values = (
                _listed(wide, listed, count) if pages is not None else wide[:, :, int(cu_k[s]) : int(cu_k[s + 1])]
            )
        k, v = _scaled(k, _of_sequence(key_scale, s)), _scaled(v, of_values)
        yield q, k, v, *(_of_sequence(mask, s, q.shape[2], k.shape[2]) for mask in masks)


def _dense(
    request: AttentionRequest,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    keep: Tensor | None,
    planned: Tensor | None,
) -> tuple[Tensor, Tensor]:
    key, value = (t.double().repeat_interleave(request.heads_q // request.heads_kv, dim=1) for t in (key, value))
    scores = query.double() @ key.transpose(-1, -2) * request.effective_scale
    if request.softcap is not None:
        scores = request.softcap * torch.tanh(scores / request.softcap)
    visible = _visible_pairs(request, query.shape[2], key.shape[2], query.device)
    if planned is not None:
        visible = visible & planned
    if mask is not None and mask.dtype == torch.bool:
        visible = visible & mask
    elif mask is not None:
        hidden = mask == -math.inf
        visible = visible & ~hidden
        scores = scores + mask.double().masked_fill(hidden, 0)
    visible = visible.expand(scores.shape)
    scores = scores.masked_fill(~visible, -math.inf)
    fully_masked = ~visible.any(-1, keepdim=True)
    # amax has no identity: an empty row of scores gets one column of -inf for it.
    peak = (
        torch.nn.functional.pad(scores.detach(), (0, 1), value=-math.inf)
        .amax(-1, keepdim=True)
        .masked_fill(fully_masked, 0)
    )
    weights = torch.exp(scores - peak)
    total = weights.sum(-1, keepdim=True).masked_fill(fully_masked, 1)
    lse = (peak + total.log()).masked_fill(fully_masked, -math.inf).squeeze(-1)
    kept = keep.double() / (1 - request.dropout) if request.dropout > 0 and keep is not None else 1
    return weights / total * kept @ value, lse


def _visible_pairs(request: AttentionRequest, len_q: int, len_k: int, device: torch.device) -> Tensor:
    """[len_q, len_k]: what causal and window leave visible. Written apart from `dense_mask`, which devices use."""
    shift = len_k - len_q if request.causal is Causal.BOTTOM_RIGHT else 0
    row = torch.arange(len_q, device=device)[:, None] + shift + request.diagonal
    column = torch.arange(len_k, device=device)[None, :]
    left, right = request.window or (None, None)
    visible = column <= (torch.full_like(row, len_k) if request.causal is Causal.NONE else row)
    if left is not None:
        visible = visible & (column >= row - left)
    return visible if right is None else visible & (column <= row + right)


def _planned_pairs(plan: BlockPlan, len_q: int, len_k: int) -> Tensor:
    """[batch or 1, heads or 1, len_q, len_k]: what a block plan leaves visible. Apart from `expand_block_plan`."""
    numbers = torch.arange(max(len_k, plan.indices.shape[-1], 1), device=plan.indices.device)
    listed = numbers[: plan.indices.shape[-1]] < plan.counts.unsqueeze(-1)
    blocks = ((plan.indices.unsqueeze(-1) == numbers) & listed.unsqueeze(-1)).any(-2)
    pairs: Tensor = blocks.repeat_interleave(plan.block_q, -2)[..., :len_q, :].repeat_interleave(plan.block_k, -1)
    return pairs[..., :len_k]


def _listed(cache: Tensor, pages: Tensor, count: int) -> Tensor:
    """The first `count` tokens of the listed pages, [1, heads, count, dim]."""
    return cache[pages].transpose(0, 1).flatten(1, 2)[None, :, :count]


def _scaled(cache: Tensor, scale: Tensor | None) -> Tensor:
    return cache if scale is None else dequantized(cache, scale, torch.float64)


def _of_sequence(tensor: Tensor | None, sequence: int, *lengths: int) -> Tensor | None:
    """A tensor's part for one sequence, cut to its (len_q, len_k); dimensions of 1 or missing ones are for all."""
    if tensor is None:
        return None
    if tensor.dim() == 4 and tensor.shape[0] > 1:
        tensor = tensor[sequence : sequence + 1]
    for axis, length in zip((-2, -1), lengths, strict=False):
        tensor = tensor if tensor.shape[axis] == 1 else tensor.narrow(axis, 0, length)
    return tensor
