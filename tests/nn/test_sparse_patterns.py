"""Every sparse pattern computes what a mask of its plan does, plans what it promises, and refuses what it cannot."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hal_nn.sparse import (
    DynamicTiling,
    LearnedTiling,
    SparseGate,
    SparsePattern,
    StaticTiling,
    plan_density,
    scores,
    sparse_attention,
    tiling_of,
    train_gate,
)
from hal_nn.sparse.attention import request_of
from hal_nn.sparse.learned import block_mass
from torch import Tensor

import hal_core as hal
from hal_core import ContractError
from hal_core.testing import relative_error

PATTERNS = [each.value for each in SparsePattern]


def make(pattern: str, sparsity: float, block: int = 16, heads: int = 4, dim: int = 16, **more: Any) -> Any:
    gate = {"gate": SparseGate(heads, dim, 2)} if pattern == "learned" else {}
    return tiling_of(pattern, sparsity, block, **gate, **more)


def draw(len_q: int, len_k: int, heads: tuple[int, int] = (4, 2), dim: int = 16) -> list[Tensor]:
    return [
        torch.randn(2, many, length, dim) for many, length in ((heads[0], len_q), (heads[1], len_k), (heads[1], len_k))
    ]


def masked_dense(tensors: list[Tensor], plan: hal.BlockPlan, causal: str) -> tuple[Tensor, list[Tensor]]:
    """Float64 leaves and attention by an explicit mask."""
    leaves = [t.detach().double().requires_grad_() for t in tensors]
    query, key, value = leaves
    group = query.shape[1] // key.shape[1]
    scores = query @ key.repeat_interleave(group, 1).mT / query.shape[-1] ** 0.5
    seen = hal.expand_block_plan(plan, query.shape[2], key.shape[2])
    band = hal.dense_mask(request_of(*tensors, causal, None), query.shape[2], key.shape[2])
    seen = seen if band is None else seen & band
    weights = scores.masked_fill(~seen, -torch.inf).softmax(-1).nan_to_num(0.0)
    return weights @ value.repeat_interleave(group, 1), leaves


@pytest.mark.parametrize("lengths", [(128, 128, "top_left"), (70, 150, "bottom_right"), (150, 70, "none")], ids=str)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_pattern_is_masked_dense_attention_in_results_and_gradients(
    pattern: str, lengths: tuple[int, int, str], seed: int
) -> None:
    torch.manual_seed(seed)
    len_q, len_k, causal = lengths
    tensors = [t.requires_grad_() for t in draw(len_q, len_k)]
    result = sparse_attention(*tensors, make(pattern, 0.6), causal=causal)
    assert result.skipped
    assert not result.dense
    want, leaves = masked_dense(tensors, result.plan, causal)
    assert relative_error(result.out, want) <= 1e-5
    flowing = torch.randn_like(result.out)
    got = torch.autograd.grad(result.out, tensors, flowing)
    for mine, theirs in zip(got, torch.autograd.grad(want, leaves, flowing.double()), strict=True):
        assert relative_error(mine, theirs) <= 1e-5


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("causal", ["none", "top_left"])
def test_a_plan_has_the_density_that_the_sparsity_leaves(pattern: str, causal: str, seed: int) -> None:
    torch.manual_seed(seed)
    tensors = draw(640, 640)
    request = request_of(*tensors, causal, None)
    for sparsity in (0.5, 0.8, 0.9):
        plan = make(pattern, sparsity).plan(request, {}, query=tensors[0], key=tensors[1])
        assert abs(plan_density(plan, request) - (1 - sparsity)) < 0.01
        listed = plan.indices[..., :1] if plan.indices.shape[-1] == 1 else plan.indices
        for row in (0, 17, 39):
            blocks = listed[0, 0, row, : plan.counts[0, 0, row]].tolist()
            assert len(set(blocks)) == len(blocks)
            assert causal == "none" or row in blocks, "a row reads its own block"


def test_random_blocks_differ_between_heads_and_seeds_and_repeat() -> None:
    request = request_of(*draw(512, 512), "none", None)
    first, again, other = (StaticTiling("random", 0.8, 16, 16, seed=s).plan(request, {}).indices for s in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert not torch.equal(first[:, 0].sort(-1).values, first[:, 1].sort(-1).values)


def reads(plan: hal.BlockPlan, row: int) -> set[int]:
    return set(plan.indices[0, 0, row, : plan.counts[0, 0, row]].tolist())


def test_local_global_reads_near_and_first_blocks_and_strided_every_nth() -> None:
    request = request_of(*draw(640, 640), "top_left", None)
    near = reads(StaticTiling("local_global", 0.8, 16, 16).plan(request, {}), 39)
    assert {0, 37, 38, 39} <= near
    assert near.isdisjoint(range(10, 30))
    apart = sorted(39 - block for block in reads(StaticTiling("strided", 0.7, 16, 16).plan(request, {}), 39))
    assert apart[:4] == [0, 1, 2, 3]
    far = apart[4:]
    assert len(far) > 1
    assert {b - a for a, b in itertools.pairwise(far)} == {far[0]}, "equal strides from the row's own block"


def planted(length: int = 512, block: int = 16, own: float = 4.0) -> tuple[Tensor, Tensor, Tensor]:
    """Queries of block b look for the keys of one block that a permutation gives."""
    blocks, dim = length // block, 64
    directions = torch.linalg.qr(torch.randn(dim, dim)).Q[:blocks]
    target = torch.randperm(blocks)
    query = directions.repeat_interleave(block, 0) * own + 0.1 * torch.randn(length, dim)
    key = torch.empty(length, dim)
    key.view(blocks, block, dim)[target] = (directions * own).unsqueeze(1) + 0.1 * torch.randn(blocks, block, dim)
    return query[None, None], key[None, None], target


@pytest.mark.parametrize(
    "options", [{"score": "mean"}, {"score": "antidiagonal"}, {"stride": 16, "budget": "row"}], ids=str
)
def test_the_dynamic_threshold_finds_the_blocks_that_are_attended(options: Any, seed: int) -> None:
    torch.manual_seed(seed)
    query, key, target = planted()
    request = request_of(query, key, key, "none", None)
    plan = DynamicTiling(0.85, 16, 16, **options).plan(request, {}, query=query, key=key)
    assert all(int(target[row]) in reads(plan, row) for row in range(32))


@pytest.mark.parametrize("score", ["mean", "antidiagonal"])
def test_top_p_reads_fewer_blocks_where_attention_is_concentrated(score: Any, seed: int) -> None:
    torch.manual_seed(seed)
    query, key, target = planted(own=8.0)
    flat = torch.randn_like(query)
    tiling = DynamicTiling(0.2, 16, 16, score=score, p=0.9)
    request = request_of(query, key, key, "none", None)
    few, many = (tiling.plan(request, {}, query=q, key=key) for q in (query, flat))
    assert plan_density(few, request) < 0.15
    assert plan_density(many, request) > 2 * plan_density(few, request)
    assert all(int(target[row]) in reads(few, row) for row in range(32))
    assert plan_density(many, request) <= 0.8


def test_decoding_reads_the_block_of_the_key_with_the_largest_score(seed: int) -> None:
    torch.manual_seed(seed)
    query, key = torch.randn(1, 1, 1, 32), 0.1 * torch.randn(1, 1, 640, 32)
    key[0, 0, 333] = query[0, 0, 0]
    request = request_of(query, key, key, "bottom_right", None)
    plan = DynamicTiling(0.9, 16, 16).plan(request, {}, query=query, key=key)
    assert 333 // 16 in reads(plan, 0)
    assert int(plan.counts) == 4
    result = sparse_attention(query, key, key, DynamicTiling(0.9, 16, 16), causal="bottom_right", judge="exact")
    assert float(result.lost) < 0.9


def test_use_runs_every_call_by_a_tiling(seed: int) -> None:
    torch.manual_seed(seed)
    tensors, tiling = draw(256, 256), DynamicTiling(0.8, 16, 16)
    with hal.use("cpu:0", tiling=tiling):
        out = hal.attention(*tensors, is_causal=True, enable_gqa=True)
    assert torch.equal(out, sparse_attention(*tensors, tiling, causal="top_left").out)
    assert relative_error(out, hal.attention(*tensors, is_causal=True, enable_gqa=True)) > 0.1


def test_a_gate_learns_which_blocks_dense_attention_reads(seed: int) -> None:
    """From random matrices, on data whose blocks look for others in new directions each time."""
    torch.manual_seed(seed)
    gate = SparseGate(1, 64)
    with torch.no_grad():
        gate.query.copy_(0.1 * torch.randn_like(gate.query))
        gate.key.copy_(0.1 * torch.randn_like(gate.key))
    held = planted(own=6.0)[:2]
    request, tiling = request_of(*held, held[1], "none", None), LearnedTiling(gate, 0.9, 16, 16)

    def mass() -> float:
        plan = tiling.plan(request, {}, query=held[0], key=held[1])
        share = block_mass(*held, request, 16, 16)
        return float(share.gather(-1, plan.indices.long()).sum(-1).mean())

    before = mass()
    samples = [planted(own=6.0)[:2] for _ in range(80)]
    losses = train_gate(gate, samples, block_size=16, causal=False, learning_rate=1e-2)
    assert sum(losses[-10:]) < 0.5 * sum(losses[:10])
    assert before < 0.5
    assert mass() > 2 * before


@pytest.mark.parametrize("sparsity", [-0.1, 0.96, "0.5", float("nan")])
def test_a_sparsity_that_cannot_be_is_refused(sparsity: Any) -> None:
    with pytest.raises(ContractError, match=r"use a number from 0 to 0\.95"):
        tiling_of("random", sparsity)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: tiling_of("fractal"), "pattern 'fractal' was given: use one of 'random', 'block_sparse'"),
        (lambda: tiling_of("learned"), "without a gate: train one"),
        (lambda: DynamicTiling(0.5, 24, 24, stride=16), "stride 16 was given for blocks of 24 x 24"),
        (lambda: DynamicTiling(0.5, score="best"), "score 'best' was given"),
        (lambda: DynamicTiling(0.5, p=0.0), "p 0.0 was given"),
        (lambda: StaticTiling("random", 0.5, 0), "block_q 0 was given"),
        (lambda: StaticTiling("learned", 0.5), "reads queries and keys: use tiling_of"),
        (lambda: sparse_attention(*draw(8, 8), make("random", 0.5), max_lost=0.1), "max_lost 0.1 and judge None"),
        (lambda: sparse_attention(*draw(8, 8), make("random", 0.5), judge="luck"), "judge 'luck' was given"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_arguments_are_refused_with_what_to_do(call: Any, said: str) -> None:
    with pytest.raises(ContractError) as caught:
        call()
    assert said in str(caught.value)


@pytest.mark.parametrize("kind", ["mean", "antidiagonal"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("causal", ["none", "bottom_right"])
def test_shares_in_half_precision_are_those_in_float32(monkeypatch, kind, dtype, causal):
    """As accelerators score them; every row of what is visible sums to 1."""
    query, key = torch.randn(2, 4, 200, 32).to(dtype), torch.randn(2, 2, 260, 32).to(dtype)
    given = request_of(query, key, key, causal, 0.5), 32, 64, kind, 8
    monkeypatch.setattr(scores, "_in_half", lambda tensor: True)
    found = scores.estimated_share(query, key, *given)
    monkeypatch.setattr(scores, "_in_half", lambda tensor: False)
    wanted = scores.estimated_share(query.float(), key.float(), *given)
    assert found.dtype == torch.float32
    assert relative_error(found, wanted) <= 2e-2
    assert torch.allclose(found.sum(-1), torch.ones(()), atol=2e-2)
