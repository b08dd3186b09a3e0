"""How much attention a block plan leaves out: exactly, or as a bound that holds for certain without dense attention."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

import hal_core as hal
from hal_core import AttentionRequest, BlockPlan, ContractError

from ..arguments import need_tensor
from .scores import row_bounds
from .selection import block_range

#: Relative rounding error of a bound and of a log-sum-exp, per unit of |query| * |key| * scale; float32's is 2^-24 for
#: each of the head_dim additions, and head sizes are below 2^9.
_ROUNDING = 2.0**-14


def lost_mass(lse_plan: Tensor, lse_full: Tensor) -> Tensor:
    """Share of each row's attention weights that lies outside a plan: 1 - exp(lse_plan - lse_full).

    Args:
        lse_plan, lse_full: natural log-sum-exp, [batch, heads, len_q], of attention by the plan and of dense attention.

    Returns:
        float [batch, heads, len_q], 0 to 1. A row that reads no key at all loses nothing; one that reads none of its
        keys loses 1.
    """
    for name, given in (("lse_plan", lse_plan), ("lse_full", lse_full)):
        need_tensor(name, given, "[batch, heads, len_q]")
    if lse_plan.shape != lse_full.shape:
        raise ContractError(f"log-sum-exps {list(lse_plan.shape)} and {list(lse_full.shape)} were given: use one shape")
    none = lse_full == -math.inf
    difference = (lse_plan.double() - lse_full.double()).masked_fill(none, 0).clamp(max=0)
    return -torch.expm1(difference).to(lse_plan.dtype)


def lost_mass_bound(query: Tensor, key: Tensor, plan: BlockPlan, lse_plan: Tensor, request: AttentionRequest) -> Tensor:
    """A number for each row that its lost mass certainly does not exceed, for 3 / block_k of the cost of dense scores.

    The scores of a block that was left out are bounded in two ways, and the lower bound counts: by the least and the
    largest value of its keys in each dimension, and by the mean of its keys and the largest distance from it. With n
    keys in such a block and a bound b, at most S = sum n exp(b) was left out, and the lost mass is at most
    S / (S + exp(lse_plan)).

    Args:
        query: [batch, heads_q, len_q, dim]. key: [batch, heads_kv, len_k, dim].
        lse_plan: natural log-sum-exp [batch, heads_q, len_q] of attention by the plan.
        request: of the call; causal, window and scale count. A softcap is refused.

    Returns:
        float32 or float64, [batch, heads_q, len_q], 0 to 1. Rounding is allowed for.
    """
    if request.softcap is not None:
        raise ContractError(f"softcap {request.softcap} was given: bounds are of scores without one")
    with torch.no_grad():
        return _bound(query, key, plan, lse_plan, request)


def _bound(query: Tensor, key: Tensor, plan: BlockPlan, lse_plan: Tensor, request: AttentionRequest) -> Tensor:
    heads, len_q, len_k, block_k = query.shape[1], query.shape[2], key.shape[2], plan.block_k
    blocks = -(-len_k // block_k)
    box = row_bounds(query, key, request, block_k)
    dtype = box.dtype
    rows, wide = query.to(dtype) * request.effective_scale, key.to(dtype)
    short = -len_k % block_k
    parts = torch.nn.functional.pad(wide, (0, 0, 0, short)).unflatten(2, (blocks, block_k))
    sizes = torch.full((blocks,), block_k, device=key.device)
    sizes[-1:] -= short
    centre = parts.sum(3) / sizes.unsqueeze(1)
    distance = (parts - centre.unsqueeze(3)).norm(dim=-1)
    if short:
        distance[:, :, -1, block_k - short :] = 0
    radius, largest = distance.amax(-1), wide.norm(dim=-1).amax(-1)
    group = heads // key.shape[1]
    centre, radius, largest = (t.repeat_interleave(group, 1) for t in (centre, radius, largest))
    norm = rows.norm(dim=-1, keepdim=True)
    ball = rows @ centre.mT + norm * radius.unsqueeze(2)
    slack = _ROUNDING * norm * largest[..., None, None]
    bound = torch.minimum(box, ball) + slack
    left_out = _left_out(plan, request, len_q, blocks, bound.device)
    terms = bound + sizes.to(dtype).log()
    level = torch.logsumexp(terms.masked_fill(~left_out, -math.inf), -1)
    # The share S / (S + L) as a logistic function; rows with nothing left out give 0, rows that read nothing give 1.
    difference = level - lse_plan.to(dtype) + slack.squeeze(-1)
    share = torch.sigmoid(difference) * (1 + 4 * torch.finfo(dtype).eps)
    share = share.nan_to_num(1.0).clamp(torch.finfo(dtype).tiny, 1.0)  # less is not 0
    return torch.where(level == -math.inf, 0.0, share).to(dtype)


def _left_out(plan: BlockPlan, request: AttentionRequest, len_q: int, blocks: int, device: Any) -> Tensor:
    """bool [batch or 1, heads or 1, len_q, blocks]: blocks of which a row may see a key, and which the plan omits."""
    listed = torch.arange(plan.indices.shape[-1], device=device) < plan.counts.unsqueeze(-1)
    columns = torch.where(listed, plan.indices, blocks).long()
    read = torch.zeros((*plan.indices.shape[:-1], blocks + 1), dtype=torch.bool, device=device)
    read.scatter_(-1, columns, True)
    read = read[..., :blocks].repeat_interleave(plan.block_q, -2)[..., :len_q, :]
    first, stop = block_range(replace(request, len_q=len_q), 1, plan.block_k, device)
    column = torch.arange(blocks, device=device)
    visible = (column >= first.unsqueeze(1)) & (column < stop.unsqueeze(1))
    return visible & ~read


def dense_lse(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
    """The natural log-sum-exp of dense attention; `options` are `hal.attention`'s."""
    with torch.no_grad():
        _, lse = hal.attention(query, key, value, return_lse=True, **options)
    return lse  # type: ignore[no-any-return]
