"""The dynamic threshold: blocks are scored from the queries and keys of the call, and the best are read."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from hal_core import AttentionRequest, BlockPlan, ContractError

from . import scores
from .selection import Cut, SparseTiling, cut_of, select

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
            cut = cut_of(request, self.block_q, self.block_k, self.sparsity, query.device)
            priority = self.priority(query, key, request)
            counts = None if self.p is None else self._enough(priority, cut)
            return select(priority.masked_fill_(cut.forced, math.inf), cut, self.block_q, self.block_k, counts)

    def priority(self, query: Tensor, key: Tensor, request: AttentionRequest) -> Tensor:
        """Estimated share or score of each block, float32 [batch, heads_q, query blocks, key blocks]."""
        sizes = (self.block_q, self.block_k)
        if self.score == "quest" or query.shape[2] == 1:
            return scores.box_bound(query, key, request, *sizes)
        if self.score == "mean":
            return scores.mean_pooled(query, key, request, *sizes)
        return scores.antidiagonal(query, key, request, *sizes, self.stride)

    def _enough(self, priority: Tensor, cut: Cut) -> Tensor:
        """Each row's number of blocks that hold the share p of its estimated attention, within its budget: those that
        every row reads, then the best of the others.
        """
        assert self.p is not None
        share = priority.masked_fill(cut.hidden, -math.inf)
        if self.score != "antidiagonal" or share.shape[2] == 1:
            share = share.softmax(-1).nan_to_num_(0.0)
        share = share.clamp_(min=0)
        certain = (share * cut.forced).sum(-1, keepdim=True)
        ordered = share.masked_fill(cut.forced, 0).sort(-1, descending=True).values
        enough = self.p * (certain + ordered.sum(-1, keepdim=True))
        before = certain + ordered.cumsum(-1) - ordered  # what a row has before it takes a further block
        counts = cut.forced.sum(-1) + ((before < enough) & (ordered > 0)).sum(-1)
        return torch.minimum(counts, cut.budgets)
