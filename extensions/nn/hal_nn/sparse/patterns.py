"""Patterns that do not read queries and keys, and the names of all patterns."""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from typing import Any

import torch
from torch import Tensor

from hal_core import AttentionRequest, BlockPlan, ContractError

from ..arguments import need_whole
from .selection import Cut, SparseTiling, cut_of, select


class SparsePattern(Enum):
    """Which blocks a sparse attention reads.

    RANDOM: each query block's own block, and others at random, other ones in every head. Random blocks, because of
        random tokens no block could be skipped.
    BLOCK_SPARSE: near blocks, the first blocks and random blocks, a third of each (Zaheer et al. 2020, BigBird).
    STRIDED: near blocks, and every n-th block before them (Child et al. 2019, Sparse Transformers).
    LOCAL_GLOBAL: near blocks, and the first blocks (Beltagy et al. 2020, Longformer; Xiao et al. 2024, sinks).
    DYNAMIC_THRESHOLD: by block scores of the queries and keys of the call.
    LEARNED: by a gate that was trained to tell which blocks dense attention reads.
    """

    RANDOM = "random"
    BLOCK_SPARSE = "block_sparse"
    STRIDED = "strided"
    LOCAL_GLOBAL = "local_global"
    DYNAMIC_THRESHOLD = "dynamic_threshold"
    LEARNED = "learned"

    @classmethod
    def of(cls, pattern: SparsePattern | str) -> SparsePattern:
        """A pattern by itself or by its value; an unknown one is a ContractError that lists them."""
        try:
            return cls(pattern)
        except ValueError:
            names = ", ".join(repr(each.value) for each in cls)
            raise ContractError(f"pattern {pattern!r} was given: use one of {names}") from None


STATIC = (
    SparsePattern.RANDOM,
    SparsePattern.BLOCK_SPARSE,
    SparsePattern.STRIDED,
    SparsePattern.LOCAL_GLOBAL,
)


class StaticTiling(SparseTiling):
    """A pattern of positions alone: planned once for each shape.

    Args:
        pattern: RANDOM, BLOCK_SPARSE, STRIDED or LOCAL_GLOBAL. sparsity, block_q, block_k: see `SparseTiling`.
        seed: of the random blocks.
    """

    def __init__(
        self, pattern: SparsePattern | str, sparsity: float, block_q: int = 64, block_k: int = 64, *, seed: int = 0
    ) -> None:
        super().__init__(sparsity, block_q, block_k)
        self.pattern, self.seed = SparsePattern.of(pattern), seed
        need_whole("seed", seed, 0)
        if self.pattern not in STATIC:
            raise ContractError(f"pattern {self.pattern.value!r} reads queries and keys: use tiling_of")
        self.name = f"{self.pattern.value}({self.sparsity:g},{block_q}x{block_k},seed {seed})"

    def plan(
        self,
        request: AttentionRequest,
        limits: Mapping[str, int],
        *,
        query: Tensor | None = None,
        key: Tensor | None = None,
    ) -> BlockPlan:
        """The plan for the request's lengths, on the request's device."""
        device = request.device if query is None else query.device
        cut = cut_of(request, self.block_q, self.block_k, self.sparsity, "cpu")
        plan = select(self._priority(request, cut), cut, self.block_q, self.block_k)
        return plan._replace(indices=plan.indices.to(device), counts=plan.counts.to(device))

    def _priority(self, request: AttentionRequest, cut: Cut) -> Tensor:
        rows, columns = self.shape(request)
        column = torch.arange(columns)
        own = _own_block(request, self.block_q, self.block_k).clamp(max=max(columns - 1, 0))
        distance = (own.unsqueeze(1) - column).abs().double()
        many = cut.budgets.unsqueeze(1)
        if self.pattern is SparsePattern.LOCAL_GLOBAL:  # three near blocks to one of the first
            return -torch.minimum(distance / 0.75, (column + 0.5) / 0.25)[None, None]
        if self.pattern is SparsePattern.STRIDED:
            near = (many + 1) // 2
            stride = (((cut.stop - cut.first).unsqueeze(1) - near) / (many - near).clamp(min=1)).ceil().clamp(min=1)
            kept = torch.where(distance % stride == 0, near + distance / stride, 2 * columns + distance)
            return -torch.where(distance < near, distance, kept)[None, None]
        generator = torch.Generator().manual_seed(self.seed)
        drawn = torch.rand((request.heads_q, rows, columns), generator=generator, dtype=torch.float64)
        if self.pattern is SparsePattern.RANDOM:
            return torch.where(distance == 0, 2.0, drawn)[None]
        third = many // 3
        certain = (distance <= third / 2) | (column < third)
        return torch.where(certain, 2.0 + 1 / (1 + distance), drawn)[None]


def _own_block(request: AttentionRequest, block_q: int, block_k: int) -> Tensor:
    """The key block where each query block's last row stands on the diagonal; int64 [query blocks]."""
    offset = request.diagonal + (request.len_k - request.len_q if str(request.causal) == "bottom_right" else 0)
    last = (torch.arange(0, max(request.len_q, 0), block_q) + block_q).clamp(max=request.len_q) - 1
    return ((last + offset).clamp(min=0)) // block_k


#: What the patterns take beside sparsity and block sizes; the fixed ones take a seed.
_OPTIONS = {
    SparsePattern.DYNAMIC_THRESHOLD: {"score", "p", "stride", "budget"},
    SparsePattern.LEARNED: {"gate"},
}


def tiling_of(
    pattern: SparsePattern | str, sparsity: float = 0.9, block_size: int = 64, **options: Any
) -> SparseTiling:
    """The tiling of a pattern.

    Args:
        pattern: or its value. sparsity: 0 to 0.95. block_size: tokens in a block of queries and of keys.
        options: of the pattern: seed; `DynamicTiling`'s score, p and others; `LearnedTiling`'s gate.

    Raises:
        ContractError: unknown pattern, a sparsity that cannot be, LEARNED without a gate, an option of another pattern.
    """
    pattern = SparsePattern.of(pattern)
    if unknown := sorted(options.keys() - (taken := _OPTIONS.get(pattern, {"seed"}))):
        raise ContractError(
            f"{', '.join(unknown)} was given to pattern {pattern.value!r}: it takes {', '.join(sorted(taken))}"
        )
    if pattern in STATIC:
        return StaticTiling(pattern, sparsity, block_size, block_size, **options)
    if pattern is SparsePattern.DYNAMIC_THRESHOLD:
        from .dynamic import DynamicTiling

        return DynamicTiling(sparsity, block_size, block_size, **options)
    from .learned import LearnedTiling

    if options.get("gate") is None:
        raise ContractError("pattern 'learned' was given without a gate: train one with hal_nn.sparse.train_gate")
    return LearnedTiling(options.pop("gate"), sparsity, block_size, block_size, **options)
