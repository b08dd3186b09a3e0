"""From priorities of blocks to a block plan: how many key blocks each query block reads, and which."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from hal_core import AttentionRequest, BlockPlan, ContractError

MOST_SPARSITY = 0.95


class SparseTiling:
    """What the sparse tilings have in common; a subclass gives `plan`.

    Args:
        sparsity: share of the block pairs, of those that causal and window leave, that is not computed: 0 to 0.95.
            Every query block reads at least one key block, so that short sequences are denser.
        block_q, block_k: tokens in a block.

    Attributes:
        max_blocks: the most key blocks of a query block that strategies which read content declare beforehand.

    Raises:
        ContractError: a sparsity or a block size that cannot be.
    """

    needs_content = False

    def __init__(self, sparsity: float, block_q: int, block_k: int) -> None:
        if not isinstance(sparsity, int | float) or not 0 <= sparsity <= MOST_SPARSITY:
            raise ContractError(f"sparsity {sparsity!r} was given: use a number from 0 to {MOST_SPARSITY}")
        for name, size in (("block_q", block_q), ("block_k", block_k)):
            if type(size) is not int or size < 1:
                raise ContractError(f"{name} {size!r} was given: use a whole number of 1 or more")
        self.sparsity, self.block_q, self.block_k = float(sparsity), block_q, block_k
        self.name = ""

    def compute_optimal_tile_size(
        self, sequence_length: int, available_memory: int, backend_constraints: Mapping[str, int]
    ) -> int:
        """The pattern's own block of queries: a device does not change it."""
        return self.block_q

    def split_into_tiles(self, tensor: Tensor, tile_size: int) -> list[Tensor]:
        """Views of [batch, heads, length, dim] along its length; the last one may be shorter."""
        return list(tensor.split(tile_size, dim=2))

    def shape(self, request: AttentionRequest) -> tuple[int, int]:
        """(query blocks, key blocks)."""
        return -(-request.len_q // self.block_q), -(-request.len_k // self.block_k)


def block_range(request: AttentionRequest, block_q: int, block_k: int, device: Any = None) -> tuple[Tensor, Tensor]:
    """The key blocks [first, stop) that causal and window leave to each query block; first >= stop for none.

    Returns:
        (first, stop): int64 [query blocks].
    """
    low, high = request.band(request.len_q, request.len_k)
    start = torch.arange(0, max(request.len_q, 0), block_q, device=device)
    last = (start + block_q).clamp(max=request.len_q) - 1
    first = torch.zeros_like(start) if low is None else (start + low).clamp(min=0) // block_k
    end = torch.full_like(start, request.len_k)
    if high is not None:
        end = torch.minimum(end, last + high + 1).clamp(min=0)
    return first, (end + block_k - 1) // block_k


def row_budgets(counts: Tensor, sparsity: float) -> Tensor:
    """How many of its visible key blocks each query block reads.

    All rows get the same number, so far as they have as many, and the longest rows one more, until the share
    1 - sparsity of all visible blocks is reached. Every row with a visible block gets one.

    Args:
        counts: int64 [query blocks], visible key blocks of each.
    """
    total = int(counts.sum())
    keep = total if sparsity == 0 else round((1 - sparsity) * total)
    low, high = 1, max(int(counts.max()), 1) if len(counts) else 1
    while low < high:  # the largest number that all can have
        middle = (low + high + 1) // 2
        low, high = (middle, high) if int(counts.clamp(max=middle).sum()) <= keep else (low, middle - 1)
    budgets = counts.clamp(max=low)
    more = keep - int(budgets.sum())
    if more > 0:
        longer = (counts > low).nonzero().flatten()[-more:]
        budgets[longer] += 1
    return budgets


@lru_cache(64)
def most_blocks(length: int, block_q: int, block_k: int, sparsity: float, causal: bool) -> int:
    """The largest row budget of a square call."""
    rows, columns = -(-length // block_q), -(-length // block_k)
    counts = torch.full((rows,), columns)
    if causal:
        counts = ((torch.arange(1, rows + 1) * block_q + block_k - 1) // block_k).clamp(max=columns)
    return int(row_budgets(counts, sparsity).max()) if rows else 0


def select(
    priority: Tensor, first: Tensor, stop: Tensor, budgets: Tensor, block_q: int, block_k: int
) -> BlockPlan:
    """The plan of the blocks with the highest priority among those that are visible.

    Args:
        priority: float [batch or 1, heads or 1, query blocks, key blocks]; written over.
        first, stop, budgets: int64 [query blocks], of `block_range` and `row_budgets`; budgets may also have the
            leading dimensions of `priority`.
    """
    columns = torch.arange(priority.shape[-1], device=priority.device)
    hidden = (columns < first.unsqueeze(1)) | (columns >= stop.unsqueeze(1))
    priority.masked_fill_(hidden, -math.inf)
    most = max(int(budgets.max()) if budgets.numel() else 0, 1)
    chosen = priority.topk(min(most, priority.shape[-1]), dim=-1).indices
    counts = budgets.expand(priority.shape[:-1])
    listed = torch.arange(chosen.shape[-1], device=chosen.device) < counts.unsqueeze(-1)
    # Blocks in ascending order are read as long runs; what is not listed goes to the end.
    indices = torch.where(listed, chosen, priority.shape[-1]).sort(-1).values.clamp_(max=max(priority.shape[-1] - 1, 0))
    return BlockPlan(block_q, block_k, indices.int(), counts.int().contiguous())


def plan_density(plan: BlockPlan, request: AttentionRequest) -> float:
    """Share of the visible block pairs that a plan reads; of all its batch entries and heads on average."""
    first, stop = block_range(request, plan.block_q, plan.block_k)
    visible = int((stop - first).clamp(min=0).sum())
    return float(plan.counts.float().mean() * plan.counts.shape[-1]) / max(visible, 1)
