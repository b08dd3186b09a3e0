"""The lost mass is exact, its bound holds for certain, the quality gate keeps to it, and the module reports it."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
from hal_nn.sparse import (
    DynamicSparseAttention,
    SparsePattern,
    create_sparse_attention,
    lost_mass,
    lost_mass_bound,
    sparse_attention,
    tiling_of,
)
from hal_nn.sparse.attention import MaskWarning, request_of
from torch import Tensor

import hal_core as hal
from hal_core import BlockPlan, ContractError
from hal_core.testing import relative_error


def random_plans(batch: int, heads: int, rows: int, columns: int) -> BlockPlan:
    """A plan of its own for every head: each block with a chance of its own, some rows without any."""
    chosen = torch.rand(batch, heads, rows, columns) < torch.rand(batch, heads, 1, 1)
    order = torch.argsort(~chosen, dim=-1, stable=True)
    return BlockPlan(16, 16, order.int(), chosen.sum(-1).int())


def keys_of(kind: str, shape: tuple[int, ...]) -> Tensor:
    """Keys as they come: alike, in clusters of blocks, with outliers, with one large dimension."""
    key = torch.randn(shape)
    if kind == "clusters":
        blocks = -(-shape[2] // 16)
        return 0.2 * key + 2 * torch.randn(*shape[:2], blocks, shape[3]).repeat_interleave(16, 2)[:, :, : shape[2]]
    if kind == "outliers":
        return key * (1 + 20 * (torch.rand(*shape[:3], 1) < 0.02))
    if kind == "one dimension":
        key[..., 0] *= 12
    return key


@pytest.mark.parametrize("kind", ["alike", "clusters", "outliers", "one dimension"])
@pytest.mark.parametrize("causal", ["none", "top_left"])
def test_the_bound_on_lost_mass_holds_in_every_row_of_random_plans(kind: str, causal: str, seed: int) -> None:
    """1,250 plans here, 10,000 in all: float64 sums of the weights outside the plan are not above the bound."""
    torch.manual_seed(seed)
    batch, heads, len_q, len_k, dim = 125, 10, 48, 91, 16
    query = torch.randn(batch, heads, len_q, dim) * torch.rand(batch, heads, 1, 1) * 4
    key = keys_of(kind, (batch, heads, len_k, dim))
    plan = random_plans(batch, heads, 3, 6)
    request, read = request_of(query, key, key, causal, None), hal.expand_block_plan(plan, len_q, len_k)
    scores = query.double() @ key.double().mT / dim**0.5
    band = hal.dense_mask(request, len_q, len_k)
    scores = scores if band is None else scores.masked_fill(~band, -torch.inf)
    lse = scores.masked_fill(~read, -torch.inf).logsumexp(-1).float()
    bound = lost_mass_bound(query, key, plan, lse, request)
    lost = scores.softmax(-1).masked_fill(read, 0).sum(-1).clamp(max=1)
    assert bool((bound.double() >= lost).all())
    assert bool((bound <= 1).all())
    assert bool((bound[lost == 0] == 0).all()), "nothing is left out of these rows"
    if kind == "clusters":
        assert float((bound[lost < 0.01] < 0.5).float().mean()) > 0.5, "the bound tells good plans from bad ones"


def test_the_bound_allows_for_rounding_at_large_scores(seed: int) -> None:
    torch.manual_seed(seed)
    query, key = 300 * torch.randn(8, 4, 32, 64), 300 * torch.randn(8, 4, 1, 64).expand(8, 4, 64, 64).contiguous()
    plan = BlockPlan(16, 16, torch.zeros(1, 1, 2, 1, dtype=torch.int32), torch.ones(1, 1, 2, dtype=torch.int32))
    request = request_of(query, key, key, "none", None)
    _, lse = hal.attention(query, key, key, block_plan=plan, return_lse=True)
    assert bool((lost_mass_bound(query, key, plan, lse, request) >= 0.75).all()), "three of four equal blocks are lost"


def test_the_lost_mass_is_the_weight_outside_the_plan(seed: int) -> None:
    torch.manual_seed(seed)
    query, key, value = (torch.randn(1, 2, 128, 16) for _ in range(3))
    result = sparse_attention(query, key, value, tiling_of("random", 0.7, 16), causal="top_left", judge="exact")
    scores = (query.double() @ key.double().mT / 4).masked_fill(~torch.ones(128, 128).tril().bool(), -torch.inf)
    want = scores.softmax(-1).masked_fill(hal.expand_block_plan(result.plan, 128, 128), 0).sum(-1)
    assert result.lost is not None
    assert float((result.lost - want).abs().max()) < 1e-6
    some = sparse_attention(query, key, value, tiling_of("random", 0.7, 16), causal="top_left", judge="rows")
    rows = torch.linspace(0, 127, 64).long().unique()
    assert float((some.lost - want[:, :, rows]).abs().max()) < 1e-6  # type: ignore[operator]


def test_lost_mass_of_rows_without_keys() -> None:
    none = -torch.inf
    lost = lost_mass(torch.tensor([[[none, none, 0.0]]]), torch.tensor([[[none, 1.0, 0.0]]]))
    assert lost.tolist() == [[[0.0, 1.0, 0.0]]]
    with pytest.raises(ContractError, match="use one shape"):
        lost_mass(torch.zeros(1, 1, 2), torch.zeros(1, 1, 3))


@pytest.mark.parametrize("judge", ["bound", "rows", "exact"])
def test_the_quality_gate_computes_densely_what_would_lose_too_much(judge: str, seed: int) -> None:
    torch.manual_seed(seed)
    x = torch.randn(1, 256, 32)
    strict = create_sparse_attention(32, 2, 0.8, block_size=16, judge=judge, max_lost_mass=0.01)
    loose = create_sparse_attention(32, 2, 0.8, block_size=16, judge=judge, max_lost_mass=1.0)
    loose.load_state_dict(strict.state_dict())
    dense = create_sparse_attention(32, 2, 0.0, block_size=16)
    dense.load_state_dict(strict.state_dict())
    assert relative_error(strict(x), dense(x)) < 1e-5
    assert relative_error(loose(x), dense(x)) > 0.01
    assert strict.get_sparsity_statistics()["dense_calls"] == 1
    assert strict.get_sparsity_statistics()["actual_sparsity"] == 0
    found = loose.get_sparsity_statistics()
    assert (found["dense_calls"], found["lost_mass_basis"]) == (0, judge)
    assert 0.01 < found["lost_mass_mean"] <= found["lost_mass_max"] <= 1


def test_a_device_that_cannot_skip_gets_a_mask_and_says_so(device: Callable[..., str], seed: int) -> None:
    torch.manual_seed(seed)
    name = device("unskipping", features={"lse", "backward", "grouped_heads"})
    module = create_sparse_attention(32, 2, 0.8, "local_global", block_size=16, causal=True, backend=name)
    x = torch.randn(1, 160, 32)
    with pytest.warns(MaskWarning, match="cannot skip blocks was given local_global.*nothing is saved"):
        out = module(x)
    assert module.get_sparsity_statistics()["masked_calls"] == 1
    module.backend = "cpu:0"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert relative_error(out, module(x)) < 1e-5
    assert module.get_sparsity_statistics()["masked_calls"] == 1


@pytest.mark.parametrize("pattern", list(SparsePattern))
def test_a_module_trains_and_reports(pattern: SparsePattern, seed: int) -> None:
    torch.manual_seed(seed)
    module = create_sparse_attention(d_model=32, num_heads=2, sparsity_ratio=0.75, pattern=pattern, block_size=16)
    assert isinstance(module, DynamicSparseAttention)
    assert module.get_sparsity_statistics()["actual_sparsity"] is None
    x = torch.randn(2, 256, 32)
    if pattern is SparsePattern.LEARNED:
        assert len(module.distill([x, x])) == 2
    out = module(x)
    assert out.shape == x.shape
    out.square().mean().backward()
    assert all(
        p.grad is not None and bool(p.grad.abs().sum() > 0) for n, p in module.named_parameters() if "proj.w" in n
    )
    found = module.get_sparsity_statistics()
    assert found["pattern"] == pattern.value
    assert abs(found["actual_sparsity"] - 0.75) < 0.01


def test_a_module_refuses_what_it_cannot_be() -> None:
    with pytest.raises(ContractError, match="use heads that divide d_model"):
        create_sparse_attention(32, 5)
    with pytest.raises(ContractError, match="has no gate to train"):
        create_sparse_attention(32, 2).distill([])
