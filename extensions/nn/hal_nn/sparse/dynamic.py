"""The dynamic threshold: blocks are scored from the queries and keys of the call, and the best are read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from hal_core import AttentionRequest, BlockPlan, ContractError

from . import scores
from .selection import SparseTiling, block_range, row_budgets, select

Score = Literal["antidiagonal", "mean", "quest"]


class DynamicTiling(SparseTiling):
    """Block scores, then the best blocks of each row: as many as the sparsity leaves, or as reach a share of attention.

    Every query block reads the block on its own diagonal, and the first block where it has two: attention gathers at
    the first tokens (Xiao et al. 2024).

    Args:
        sparsity, block_q, block_k: see `SparseTiling`; with `p`, the sparsity is not fallen short of.
        score: "antidiagonal" or "mean". A call with one query row (decoding) is scored by "quest" whatever is given.
        p: share of the estimated attention; a row then stops at the blocks that reach it. None: the row's whole
            budget.
        stride: of the antidiagonal; it divides both block sizes.
    """

    needs_content = True

    def __init__(
        self,
        sparsity: float = 0.9,
        block_q: int = 64,
        block_k: int = 64,
        *,
        score: Score = "antidiagonal",
        p: float | None = None,
        stride: int = 16,
    ) -> None:
        super().__init__(sparsity, block_q, block_k)
        if score not in ("antidiagonal", "mean", "quest"):
            raise ContractError(f"score {score!r} was given: use 'antidiagonal', 'mean' or 'quest'")
        if p is not None and not 0 < p <= 1:
            raise ContractError(f"p {p!r} was given: use a share above 0, up to 1, or None")
        if score == "antidiagonal" and (stride < 1 or block_q % stride or block_k % stride):
            raise ContractError(f"stride {stride} was given for blocks of {block_q} x {block_k}: use a divisor of both")
        self.score, self.p, self.stride = score, p, stride
        self.name = f"dynamic_threshold({self.sparsity:g},{block_q}x{block_k},{score},p {p},stride {stride})"

    @property
    def max_blocks(self) -> int:
        """Declared beforehand without the lengths: the sparsity bounds it only together with them."""
        return 1 << 14

    def plan(
        self,
        request: AttentionRequest,
        limits: Mapping[str, int],
        *,
        query: Tensor | None = None,
        key: Tensor | None = None,
    ) -> BlockPlan:
        """The plan for a call's queries and keys, on their device."""
        if query is None or key is None:
            raise ContractError(f"tiling {self.name} plans from query and key: they were not given")
        with torch.no_grad():
            first, stop = block_range(request, self.block_q, self.block_k)
            visible = (stop - first).clamp(min=0)
            budgets = row_budgets(visible, self.sparsity).to(query.device)
            first, stop = first.to(query.device), stop.to(query.device)
            priority = self.priority(query, key, request)
            _always(priority, first, stop, budgets)
            if self.p is not None:
                budgets = self._enough(priority, first, stop, budgets)
            return select(priority, first, stop, budgets, self.block_q, self.block_k)

    def priority(self, query: Tensor, key: Tensor, request: AttentionRequest) -> Tensor:
        """Estimated share or score of each block, float32 [batch, heads_q, query blocks, key blocks]."""
        sizes = (self.block_q, self.block_k)
        if self.score == "quest" or query.shape[2] == 1:
            return scores.box_bound(query, key, request, *sizes)
        if self.score == "mean":
            return scores.mean_pooled(query, key, request, *sizes)
        return scores.antidiagonal(query, key, request, *sizes, self.stride)

    def _enough(self, priority: Tensor, first: Tensor, stop: Tensor, budgets: Tensor) -> Tensor:
        """Each row's number of best blocks that hold the share p of its estimated attention, within its budget."""
        columns = torch.arange(priority.shape[-1], device=priority.device)
        hidden = (columns < first.unsqueeze(1)) | (columns >= stop.unsqueeze(1))
        share = priority.masked_fill(hidden, -torch.inf)
        forced = share == torch.inf
        if self.score != "antidiagonal" or share.shape[2] == 1:
            share = share.masked_fill(forced, 0).softmax(-1)
        share = share.clamp(min=0).masked_fill(forced, 0)
        ordered = torch.cat([share.sort(-1, descending=True).values], -1)
        reached = ordered.cumsum(-1)
        total = reached[..., -1:]
        count = (reached < self.p * total).sum(-1) + 1 + forced.sum(-1)  # type: ignore[operator]
        return torch.minimum(count, budgets)


def _always(priority: Tensor, first: Tensor, stop: Tensor, budgets: Tensor) -> None:
    """Give the last visible block of each row, and the first where the budget is two or more, the highest priority."""
    if not priority.shape[-1]:
        return
    rows = torch.arange(len(stop), device=priority.device)
    priority[..., rows, (stop - 1).clamp(min=0)] = torch.inf
    sink = rows[budgets >= 2]
    priority[..., sink, first[sink].clamp(max=priority.shape[-1] - 1)] = torch.inf
