"""Masks of causal, window and block plans, and merging of partial results."""

from __future__ import annotations

import math
from typing import Any

from ..errors import refuse
from ..plans import BlockPlan, Tile
from ..request import AttentionRequest, Tensor


def merge_partials(out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    """Combine attention over disjoint key ranges into attention over their union.

    Args:
        out: partial results, [parts, batch, heads, len_q, dim_v], any float dtype.
        lse: natural log-sum-exp of the scaled scores, [parts, batch, heads, len_q], float32 or float64.
            -inf marks a part in which a row has no key.

    Returns:
        (out, lse) without the parts axis. A row with no key in any part gives 0 and -inf. Where a mask is so low for
        all keys of a row that its lse holds the mask's value alone (finfo.min, say), the parts have equal shares.

    Raises:
        ContractError: shapes disagree, or lse is neither float32 nor float64.

    Source: Milakov & Gimelshein 2018 (online softmax), equation 3; Rabe & Staats 2021, section 3.
    """
    import torch

    refuse(
        (
            out.shape[:-1] != lse.shape or lse.dtype not in (torch.float32, torch.float64),
            f"out {tuple(out.shape)} and lse {tuple(lse.shape)} {lse.dtype} were given: lse wants out's shape without "
            "the last dimension, in float32 or float64",
        )
    )
    fully_masked = lse == -math.inf  # its out may hold anything, NaN included, and must not leak, nor may its gradient
    none = fully_masked.all(dim=0)
    total = torch.logsumexp(lse.masked_fill(none, 0), dim=0)  # of finite rows: the gradient of log(0) is NaN
    # Shares that sum to 1 also where `total` has lost the logarithm of the number of parts.
    parts = out.to(lse.dtype).masked_fill(fully_masked.unsqueeze(-1), 0) * lse.masked_fill(none, 0).softmax(
        0
    ).unsqueeze(-1)
    return parts.sum(dim=0).to(out.dtype), total.masked_fill(none, -math.inf)


def slice_mask(mask: Tensor, tile: Tile) -> Tensor:
    """The part of a mask that a tile needs; dimensions of size 1 broadcast and stay."""
    if mask.shape[-2] != 1:
        mask = mask[..., tile.q_start : tile.q_stop, :]
    return mask if mask.shape[-1] == 1 else mask[..., tile.k_start : tile.k_stop]


def expand_block_plan(plan: BlockPlan, len_q: int, len_k: int) -> Tensor:
    """The boolean mask [batch or 1, heads or 1, len_q, len_k] of a block plan."""
    import torch

    blocks_k = -(-len_k // plan.block_k)
    listed = torch.arange(plan.indices.shape[-1], device=plan.indices.device) < plan.counts.unsqueeze(-1)
    # Entries past the count go to one block beyond the last, which is cut off again.
    columns = torch.where(listed, plan.indices, blocks_k).long()
    blocks = torch.zeros((*plan.indices.shape[:-1], blocks_k + 1), dtype=torch.bool, device=plan.indices.device)
    blocks.scatter_(-1, columns, True)
    dense = blocks[..., :blocks_k].repeat_interleave(plan.block_q, dim=-2).repeat_interleave(plan.block_k, dim=-1)
    return dense[..., :len_q, :len_k]


def dense_mask(request: AttentionRequest, len_q: int, len_k: int, *, device: Any = None) -> Tensor | None:
    """The boolean mask [len_q, len_k] of causal and window together; None where everything is visible."""
    low, high = request.band(len_q, len_k)
    if low is None and high is None:
        return None
    import torch

    distance = torch.arange(len_k, device=device) - torch.arange(len_q, device=device).unsqueeze(1)
    visible = torch.ones_like(distance, dtype=torch.bool) if high is None else distance <= high
    return visible if low is None else visible & (distance >= low)
