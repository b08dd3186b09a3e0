"""A self-attention module that reads a part of its blocks, and says which part and what it lost."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import hal_core as hal
from hal_core import ContractError

from ..arguments import need_rows, need_share, need_whole
from .attention import Judge, SparseResult, need_judge, sparse_attention
from .learned import SparseGate, train_gate
from .patterns import SparsePattern, tiling_of
from .selection import SparseTiling


class DynamicSparseAttention(nn.Module):
    """Multi-head self-attention on [batch, length, d_model] by a sparse pattern.

    Args:
        d_model: model size. num_heads: heads, which divide it.
        sparsity_ratio: share of the block pairs that is not computed, 0 to 0.95. Short sequences are denser.
        pattern: a `SparsePattern` or its value. LEARNED has a gate, a part of the module: see `distill`.
        block_size: tokens in a block. causal: each token reads itself and what is before it.
        bias: of the four projections.
        judge, max_lost_mass: see `sparse_attention`: how the lost mass is found, and from which on the call is computed
            densely.
        backend: a device or a backend; None: as `hal.use` and the other settings say.
        options: of the pattern's tiling.

    Raises:
        ContractError: heads that do not divide d_model, an unknown pattern, a sparsity that cannot be, another judge.
        UnknownBackendError, DeviceUnavailableError: no such backend.
    """

    def __init__(
        self,
        d_model: int,
        num_heads: int,
        sparsity_ratio: float = 0.9,
        pattern: SparsePattern | str = SparsePattern.DYNAMIC_THRESHOLD,
        *,
        block_size: int = 64,
        causal: bool = False,
        bias: bool = True,
        judge: Judge | None = None,
        max_lost_mass: float | None = None,
        backend: str | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        need_whole("d_model", d_model)
        need_whole("num_heads", num_heads)
        if d_model % num_heads:
            raise ContractError(
                f"d_model {d_model} and num_heads {num_heads} were given: use heads that divide d_model"
            )
        if max_lost_mass is not None:
            need_share("max_lost_mass", max_lost_mass)
            judge = "bound" if judge is None else judge
        need_judge(judge)
        if backend is not None:
            hal.session(backend)
        self.d_model, self.num_heads, self.head_dim = d_model, num_heads, d_model // num_heads
        self.sparsity_ratio, self.pattern, self.block_size = sparsity_ratio, SparsePattern.of(pattern), block_size
        self.causal, self.judge, self.max_lost_mass, self.backend = causal, judge, max_lost_mass, backend
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (
            nn.Linear(d_model, d_model, bias=bias) for _ in range(4)
        )
        self.gate: SparseGate | None = None
        if self.pattern is SparsePattern.LEARNED:
            options["gate"] = self.gate = SparseGate(num_heads, self.head_dim)
        self.tiling: SparseTiling = tiling_of(self.pattern, sparsity_ratio, block_size, **options)
        self._calls = self._dense_calls = self._masked_calls = 0
        self._last: SparseResult | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Attention over [batch, length, d_model]."""
        need_rows("x", x, self.d_model)
        query, key, value = self._projected(x)
        result = sparse_attention(
            query,
            key,
            value,
            self.tiling,
            causal="top_left" if self.causal else "none",
            judge=self.judge,
            max_lost=self.max_lost_mass,
            backend=self.backend,
        )
        self._calls += 1
        self._dense_calls += result.dense
        self._masked_calls += not result.skipped and not result.dense
        self._last = result._replace(out=result.out.new_empty(0))
        projected: Tensor = self.out_proj(result.out.transpose(1, 2).reshape(x.shape))
        return projected

    def _projected(self, x: Tensor) -> list[Tensor]:
        """Query, key and value, [batch, heads, length, head_dim]."""
        projections = (self.q_proj, self.k_proj, self.v_proj)
        return [each(x).unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2) for each in projections]

    def distill(self, samples: Any, learning_rate: float = 3e-3) -> list[float]:
        """Train the gate of a LEARNED module to tell which blocks dense attention reads; the projections stay.

        Args:
            samples: a list of inputs [batch, length, d_model]; one step for each.

        Returns:
            The loss of each step, see `train_gate`.

        Raises:
            ContractError: the pattern is not LEARNED, or a sample has another shape.
        """
        if self.gate is None:
            raise ContractError(f"pattern {self.pattern.value!r} has no gate to train: use pattern='learned'")
        samples = list(samples)
        for x in samples:
            need_rows("each sample", x, self.d_model)
        with torch.no_grad():
            projected = [self._projected(x) for x in samples]
            pairs = [(query, key) for query, key, _ in projected]
        return train_gate(self.gate, pairs, block_size=self.block_size, causal=self.causal, learning_rate=learning_rate)

    def get_sparsity_statistics(self) -> dict[str, Any]:
        """What was asked for, and what the last call did.

        Returns:
            "pattern"; "requested_sparsity"; "actual_sparsity": 1 - density of the last call, None before one; "calls",
            "dense_calls" (the quality gate had them computed densely), "masked_calls" (on a device that cannot skip);
            "lost_mass_mean" and "lost_mass_max" over rows, None where it was not judged; "lost_mass_basis": the judge.
        """
        last = self._last
        lost = last.lost if last is not None and last.lost is not None and last.lost.numel() else None
        return {
            "pattern": self.pattern.value,
            "requested_sparsity": self.sparsity_ratio,
            "actual_sparsity": None if last is None else 1 - last.density,
            "calls": self._calls,
            "dense_calls": self._dense_calls,
            "masked_calls": self._masked_calls,
            "lost_mass_mean": None if lost is None else float(lost.mean()),
            "lost_mass_max": None if lost is None else float(lost.max()),
            "lost_mass_basis": None if lost is None else self.judge,
        }


def create_sparse_attention(
    d_model: int,
    num_heads: int,
    sparsity_ratio: float = 0.9,
    pattern: SparsePattern | str = SparsePattern.DYNAMIC_THRESHOLD,
    **options: Any,
) -> DynamicSparseAttention:
    """A `DynamicSparseAttention`; `options` are its other arguments.

    `sparsity_ratio` counts whole blocks that are not computed, of those that causal leaves.
    """
    return DynamicSparseAttention(d_model, num_heads, sparsity_ratio, pattern, **options)
