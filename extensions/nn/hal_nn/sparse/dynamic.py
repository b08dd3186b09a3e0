"""The dynamic threshold: blocks are scored from the queries and keys of the call, and the best are read."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from hal_core import AttentionRequest, BlockPlan, ContractError

from ..arguments import is_number
from . import scores
from .selection import SparseTiling, allocate, cut_of, select

Score = Literal["mean", "antidiagonal", "quest"]
Budget = Literal["call", "row"]


class DynamicTiling(SparseTiling):
    """Block scores, then the best blocks: as many as the sparsity leaves, or as reach a share of the attention.

    Every query block reads the last block that it sees, which holds its own tokens where attention is causal, and the
    first block where that is an eighth of its budget or less.

    Args:
        sparsity, block_q, block_k: see `SparseTiling`; with `p`, fewer blocks may be read.
        score: "mean" or "antidiagonal", see `estimated_share`. A call with one query row (decoding) is scored by
            "quest", the bound of each block's scores, whatever is given.
        p: share of the estimated attention; a row then stops at the blocks that reach it. None: the whole budget.
        stride: side of the squares that are scored; it divides both block sizes. None: an eighth of the smaller
            block, or 16 for "antidiagonal".
        budget: "call": heads and rows of a batch entry share one, and a threshold on the estimated share divides it.
            "row": every row has the same, which needs no wait for an accelerator.
    """

    needs_content = True

    def __init__(
        self,
        sparsity: float = 0.9,
        block_q: int = 64,
        block_k: int = 64,
        *,
        score: Score = "mean",
        p: float | None = None,
        stride: int | None = None,
        budget: Budget = "call",
    ) -> None:
        super().__init__(sparsity, block_q, block_k)
        if score not in ("mean", "antidiagonal", "quest"):
            raise ContractError(f"score {score!r} was given: use 'mean', 'antidiagonal' or 'quest'")
        if budget not in ("call", "row"):
            raise ContractError(f"budget {budget!r} was given: use 'call' or 'row'")
        if p is not None and not (is_number(p) and 0 < p <= 1):
            raise ContractError(f"p {p!r} was given: use a share above 0, up to 1, or None")
        common = math.gcd(block_q, block_k)
        if stride is None:
            stride = math.gcd(common, 16 if score == "antidiagonal" else max(common // 8, 1))
        if type(stride) is not int or stride < 1 or common % stride:
            raise ContractError(f"stride {stride} was given for blocks of {block_q} x {block_k}: use a divisor of both")
        self.score, self.p, self.stride, self.budget = score, p, stride, budget
        how = f"{score} of {stride},p {p},budget of a {budget}"
        self.name = f"dynamic_threshold({self.sparsity:g},{block_q}x{block_k},{how})"

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
            if self.score == "quest" or query.shape[2] == 1:
                share = scores.box_bound(query, key, request, self.block_q, self.block_k)
                if self.budget == "call" or self.p is not None:
                    share = share.masked_fill_(cut.hidden, -math.inf).softmax(-1).nan_to_num_(0.0)
            else:
                share = scores.estimated_share(query, key, request, self.block_q, self.block_k, self.score, self.stride)
            if self.budget == "row" and self.p is None:
                return select(share.masked_fill_(cut.forced, math.inf), cut, self.block_q, self.block_k)
            return allocate(share, cut, self.block_q, self.block_k, self.p)
