"""Attention by an `AdaptiveTiling` whole: ordered by content, planned, skipped or in two precisions, and judged."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

import hal_core as hal
from hal_core import BlockPlan, Causal, ContractError, merge_partials

from .orders import ContentOrder, topic_orders
from .tiling import AdaptiveTiling

#: A plan that reads a larger share of the blocks is not worth a sparse kernel: the call is dense.
DENSE_FROM = 0.9


class AdaptiveResult(NamedTuple):
    """What `adaptive_attention` gives.

    Attributes:
        out: [B, H, len_q, dim_v]. plan: the blocks that were read, or that were in full precision.
        density: share of the visible blocks in the plan.
        dense: whether dense attention ran instead, because the plan would have read more than 0.9 of the blocks.
        lost: share of each row's attention outside the plan, [B, H, len_q]: measured in the mode "estimate", bounded
            by tau in "certified" and "exact", where it is None; 0 in "precision".
    """

    out: Tensor
    plan: BlockPlan
    density: float
    dense: bool
    lost: Tensor | None


def adaptive_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    tiling: AdaptiveTiling | None = None,
    *,
    order: bool = False,
    causal: str = "none",
    scale: float | None = None,
    backend: str | None = None,
) -> AdaptiveResult:
    """Attention that reads the blocks its tiling chooses, in any of its modes; forward alone in "precision".

    Args:
        query: [B, H, len_q, d]. key, value: [B, Hk, len_k, d], Hk a divisor of H. tiling: None: AdaptiveTiling().
        order: put keys and queries in the order of `topic_orders` first.

    Raises:
        ContractError: order=True with causal attention, whose rows depend on places.
    """
    tiling = tiling or AdaptiveTiling()
    if order and causal != "none":
        raise ContractError(f"order=True and causal {causal!r} were given: an order is exact without causal alone")
    turned: ContentOrder | None = None
    if order:
        turned, keys = topic_orders(query, key)
        query, key, value = turned.apply(query), keys.apply(key), keys.apply(value)
    options: dict[str, Any] = {"causal": causal, "scale": scale, "backend": backend}
    options["enable_gqa"] = query.shape[1] != key.shape[1]
    request = request_for(query, key, value, causal, scale)
    plan = tiling.choose(request, query, key)
    density = plan_density(plan, query, key, request)
    lost, dense = None, False
    if tiling.mode == "precision":
        out = _two_precisions(query, key, value, plan, options)
        lost = torch.zeros(query.shape[:3])
    elif tiling.mode == "estimate":
        out, lse = hal.attention(query, key, value, block_plan=plan, return_lse=True, **options)
        whole = hal.attention(query, key, value, return_lse=True, **options).lse
        lost = (1 - (lse - whole).exp()).clamp(0, 1)
    else:
        dense = density > DENSE_FROM
        out = hal.attention(query, key, value, block_plan=None if dense else plan, **options)
    if turned is not None:
        out = turned.undo(out)
        lost = None if lost is None else turned.undo(lost.unsqueeze(-1))[..., 0]
    return AdaptiveResult(out, plan, density, dense, lost)


def request_for(query: Tensor, key: Tensor, value: Tensor, causal: str, scale: float | None) -> hal.AttentionRequest:
    """What is asked of hal.attention, and of the tiling."""
    return hal.AttentionRequest(
        batch=query.shape[0],
        heads_q=query.shape[1],
        heads_kv=key.shape[1],
        len_q=query.shape[2],
        len_k=key.shape[2],
        dim_qk=query.shape[3],
        dim_v=value.shape[3],
        dtype=str(query.dtype).removeprefix("torch."),
        causal=Causal(causal),
        scale=scale,
    )


def plan_density(plan: BlockPlan, query: Tensor, key: Tensor, request: hal.AttentionRequest) -> float:
    """Share of the visible blocks that a plan reads, of all its heads on average."""
    low, high = request.band(query.shape[2], key.shape[2])
    start = torch.arange(0, query.shape[2], plan.block_q)
    last = (start + plan.block_q).clamp(max=query.shape[2]) - 1
    first = torch.zeros_like(start) if low is None else (start + low).clamp(min=0) // plan.block_k
    stop = torch.full_like(start, key.shape[2])
    if high is not None:
        stop = torch.minimum(stop, last + high + 1).clamp(min=0)
    visible = int(((stop + plan.block_k - 1) // plan.block_k - first).clamp(min=0).sum())
    return float(plan.counts.float().mean()) * int(plan.counts.shape[-1]) / max(visible, 1)


def complement(plan: BlockPlan, blocks: int) -> BlockPlan:
    """The key blocks, out of `blocks`, that a plan leaves out."""
    place = torch.arange(plan.indices.shape[-1], device=plan.indices.device)
    used = place < plan.counts.unsqueeze(-1)
    taken = torch.zeros(*plan.counts.shape, blocks + 1, dtype=torch.bool, device=used.device)
    index = torch.where(used, plan.indices.long(), blocks)
    taken = taken.scatter_(-1, index, True)[..., :blocks]
    counts = (~taken).sum(-1)
    order = taken.long().argsort(dim=-1, stable=True)
    return BlockPlan(
        plan.block_q, plan.block_k, order[..., : max(int(counts.max()), 1)].int().contiguous(), counts.int()
    )


def _two_precisions(query: Tensor, key: Tensor, value: Tensor, plan: BlockPlan, options: dict[str, Any]) -> Tensor:
    """The plan's blocks in the tensors' precision, the others in 16 bits, merged by their log-sum-exps."""
    rest = complement(plan, -(-key.shape[2] // plan.block_k))
    whole = hal.attention(query, key, value, block_plan=plan, return_lse=True, **options)
    if not int(rest.counts.max()):
        return whole.out  # type: ignore[no-any-return]
    narrow = _narrow(query, options["backend"])
    query, key, value = query.to(narrow), key.to(narrow), value.to(narrow)
    part = hal.attention(query, key, value, block_plan=rest, return_lse=True, **options)
    outs = torch.stack([whole.out, part.out.to(whole.out.dtype)])
    found, _ = merge_partials(outs, torch.stack([whole.lse, part.lse.to(whole.lse.dtype)]))
    return found


def _narrow(query: Tensor, backend: str | None) -> torch.dtype:
    """bfloat16, whose range is that of float32; float16 on a device that has no bfloat16."""
    if backend is None:
        return torch.bfloat16
    device = backend if ":" in backend else f"{backend}:0"
    return torch.bfloat16 if "bfloat16" in hal.capabilities(device).dtypes else torch.float16
