"""The choice of blocks under one budget: what is chosen, and that an accelerator is not waited for."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hal_nn.sparse import SparseGate, tiling_of
from hal_nn.sparse.attention import request_of
from hal_nn.sparse.selection import allocate, cut_of


def _sorted_choice(share: torch.Tensor, cut: Any) -> torch.Tensor:
    """Counts by sorting all shares: those above the first that is not taken."""
    ranked = share.masked_fill(cut.hidden, -math.inf).masked_fill(cut.forced, math.inf)
    total = int(cut.budgets.sum()) * share.shape[1]
    if total >= ranked[0].numel():
        return (ranked > -math.inf).sum(-1)
    least = ranked.flatten(1).sort(1, descending=True).values[:, total].view(-1, 1, 1, 1)
    return (ranked > least).sum(-1)


@pytest.mark.parametrize("causal", ["none", "top_left"])
@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.9])
def test_the_largest_shares_are_chosen(causal: str, sparsity: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    share = torch.rand((2, 3, 25, 25), generator=generator)
    q = torch.empty(2, 3, 400, 8)
    cut = cut_of(request_of(q, q, q, causal, None), 16, 16, sparsity, "cpu")
    plan = allocate(share.clone(), cut, 16, 16)
    assert torch.equal(plan.counts, _sorted_choice(share, cut).int())
    best = share.masked_fill(cut.hidden, -1).masked_fill(cut.forced, 2).argsort(-1, descending=True)
    for got, want, count in zip(
        plan.indices.flatten(0, 2).tolist(), best.flatten(0, 2).tolist(), plan.counts.flatten().tolist(), strict=True
    ):
        assert set(got[:count]) == set(want[:count])


def test_equal_shares_use_the_budget_but_for_one_block_a_row() -> None:
    q = torch.zeros(1, 2, 400, 8)
    request = request_of(q, q, q, "none", None)
    plan = tiling_of("dynamic_threshold", 0.5, 16).plan(request, {}, query=q, key=q)
    total = cut_of(request, 16, 16, 0.5, "cpu").total * 2
    assert total - 2 * 25 <= int(plan.counts.sum()) <= total


def test_a_row_that_is_no_number_takes_nothing_from_the_others() -> None:
    q, key = torch.randn(1, 1, 64, 8), torch.randn(1, 1, 64, 8)
    q[0, 0, 20] = math.nan
    plan = tiling_of("dynamic_threshold", 0.5, 16).plan(request_of(q, key, key, "none", None), {}, query=q, key=key)
    assert plan.counts[0, 0, 1] <= 1
    assert int(plan.counts.sum()) <= 8


@pytest.mark.parametrize(
    "options",
    [{}, {"score": "antidiagonal"}, {"budget": "row"}, {"p": 0.9}, {"score": "quest"}, {"gate": SparseGate(4, 32)}],
    ids=lambda given: " ".join(map(str, given)) or "default",
)
@pytest.mark.parametrize("causal", ["none", "top_left"])
def test_planning_on_an_accelerator_reads_nothing_back(options: dict[str, Any], causal: str) -> None:
    """Tensors on "meta" have no values: whatever asks for one raises, as do shapes that depend on values."""
    q = torch.empty((2, 4, 500, 32), device="meta")
    pattern = "learned" if "gate" in options else "dynamic_threshold"
    options = {name: given.to("meta") if name == "gate" else given for name, given in options.items()}
    plan = tiling_of(pattern, 0.8, 16, **options).plan(request_of(q, q, q, causal, None), {}, query=q, key=q)
    assert plan.indices.device.type == plan.counts.device.type == "meta"
    assert plan.counts.shape == (2, 4, 32)
    assert plan.indices.shape[:3] == (2, 4, 32)
