"""Adaptive tilings: bounds that hold, plans that lose no more than they say, orders that change nothing."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hal_geometric import AdaptiveTiling, adaptive_attention, certificate, content_order, parts, topic_orders
from hal_geometric.adaptive import complement
from torch import Tensor

import hal_core as hal
from hal_core import ContractError
from hal_core.testing import relative_error, request_of

hypothesis = pytest.importorskip("hypothesis")
from hypothesis import given, settings, strategies as st  # noqa: E402


def clustered(seed: int, length: int = 512, topics: int = 8, noise: float = 0.1, heads: int = 2) -> list[Tensor]:
    """Queries and keys around topics, shuffled; queries twice as long, so that rows read their own topic."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(1, heads, topics, 64, generator=generator)

    def tokens() -> Tensor:
        topic = torch.randint(topics, (1, heads, length, 1), generator=generator).expand(-1, -1, -1, 64)
        return centres.gather(2, topic) + noise * torch.randn(1, heads, length, 64, generator=generator)

    return [2 * tokens(), tokens(), torch.randn(1, heads, length, 64, generator=generator)]


def lost(q: Tensor, k: Tensor, plan: hal.BlockPlan, causal: str = "none") -> Tensor:
    """The share of each row's weights outside a plan, from the weights themselves."""
    group = q.shape[1] // k.shape[1]
    scores = q.double() @ k.double().repeat_interleave(group, 1).mT / q.shape[-1] ** 0.5
    if causal != "none":
        scores = scores.masked_fill(torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1), -torch.inf)
    inside = torch.zeros(*plan.counts.shape, -(-k.shape[2] // plan.block_k) + 1, dtype=torch.bool)
    used = torch.arange(plan.indices.shape[-1]) < plan.counts.unsqueeze(-1)
    index = torch.where(used, plan.indices.long(), inside.shape[-1] - 1)
    inside = inside.scatter_(-1, index, True)[..., :-1]
    inside = inside.repeat_interleave(plan.block_q, -2)[..., : q.shape[2], :]
    inside = inside.repeat_interleave(plan.block_k, -1)[..., : k.shape[2]]
    return (scores.softmax(-1) * ~inside).sum(-1)


@settings(max_examples=60)
@given(seed=st.integers(0, 2**31), spread=st.floats(0.01, 3.0), block=st.sampled_from([5, 16, 33]))
def test_jensen_and_bennett_bound_every_blocks_mass(seed: int, spread: float, block: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    q = spread * torch.randn(1, 2, 20, 8, generator=generator, dtype=torch.float64)
    k = torch.randn(1, 2, 70, 8, generator=generator, dtype=torch.float64) + 0.5
    blocks = certificate.block_statistics(k, block)
    exact = certificate.block_masses(q, k, block)
    lower = certificate.jensen(q, blocks)
    upper = lower + certificate.bennett(q, blocks)
    assert bool((lower <= exact + 1e-9).all())
    assert bool((exact <= upper + 1e-9).all())


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    spread=st.floats(0.01, 3.0),
    block=st.sampled_from([5, 16, 33]),
    count=st.sampled_from([1, 2, 3]),
)
def test_bounds_of_parts_hold_for_every_row_of_their_block(seed: int, spread: float, block: int, count: int) -> None:
    """Shares of blocks, which do not depend on the summand that a row has in common."""
    generator = torch.Generator().manual_seed(seed)
    q = spread * torch.randn(1, 2, 41, 8, generator=generator, dtype=torch.float64)
    k = torch.randn(1, 2, 70, 8, generator=generator, dtype=torch.float64) + 0.5
    rows, keys = parts.split(q, block, count), parts.split(k, block, count)
    assert torch.equal(keys.tokens.sum((-2, -1)), torch.full((1, 2), 70.0, dtype=torch.float64))
    lower, upper = (t.unflatten(2, (-1, count)) for t in parts.bounds(rows, keys))
    exact = certificate.block_masses(q, k, block)
    for n in range(41):
        mine = exact[:, :, n].unsqueeze(-2)
        low, high = lower[:, :, n // block], upper[:, :, n // block]
        # mass a / mass b of two blocks is at most upper a / lower b, in the row's part.
        ratio = mine.unsqueeze(-1) - mine.unsqueeze(-2)
        fits = (ratio <= high.unsqueeze(-1) - low.unsqueeze(-2) + 1e-9).flatten(-2).all(-1)
        assert bool(fits.any(-1).all())


@pytest.mark.parametrize(("length", "group"), [(64, 1), (257, 1), (1000, 2)])
def test_topic_orders_are_permutations_that_put_topics_together(length: int, group: int, seed: int) -> None:
    q, k, v = clustered(seed, length, topics=4, heads=2)
    k, v = k[:, : 2 // group], v[:, : 2 // group]
    rows, keys = topic_orders(q, k)
    for order, x in ((rows, q), (keys, k)):
        assert torch.equal(order.order.sort(-1).values, torch.arange(length).expand(*x.shape[:2], -1))
        assert torch.equal(order.undo(order.apply(x)), x)
        assert torch.equal(order.apply(x), x.gather(2, order.order.unsqueeze(-1).expand_as(x)))
    near = keys.apply(k)
    jumps = (near[:, :, 1:] - near[:, :, :-1]).norm(dim=-1) > 5  # between topics 11, within one 1.1
    assert int(jumps.sum(-1).max()) == 3


@pytest.mark.parametrize("causal", ["none", "top_left"])
@pytest.mark.parametrize("mode", ["certified", "exact"])
@pytest.mark.parametrize("length", [500, 512])
def test_no_row_loses_more_than_tau(mode: Any, causal: str, length: int, seed: int) -> None:
    q, k, v = clustered(seed, length)
    order = content_order(k, 32)
    k, v = order.apply(k), order.apply(v)
    q = content_order(q, 32).apply(q) if causal == "none" else q
    for tau in (0.1, 0.01):
        tiling = AdaptiveTiling(tau, mode=mode, block=32)
        plan = tiling.plan(request_of(q, k, v, causal=causal), {}, query=q, key=k)
        assert float(lost(q, k, plan, causal).max()) <= tau + 1e-6
        assert float(plan.counts.float().mean()) < 15.5  # of 16 blocks


def test_hal_attention_takes_the_tiling_and_is_off_by_twice_the_lost_mass(device: str, seed: int) -> None:
    tiling = AdaptiveTiling(0.02, block=64, device=device)
    q, k, v = clustered(seed, 512, 4)
    turned, keys = content_order(q, tiling.block_q), content_order(k, tiling.block_k)
    tensors = turned.apply(q), keys.apply(k), keys.apply(v)
    out = hal.attention(*tensors, tiling=tiling, backend=device, allow_simulated=True)
    want = hal.testing.reference(q, k, v).out
    bound = 2 * 0.02 * float((v - v.mean(2, keepdim=True)).norm(dim=-1).max())
    assert float((turned.undo(out) - want).norm(dim=-1).max()) <= bound + 1e-4
    plan = tiling.plan(request_of(*tensors), {}, query=tensors[0], key=tensors[1])
    assert float(plan.counts.float().mean()) < 0.9 * (512 / tiling.block_k)


def test_grouped_heads_and_gradients_go_through_the_tiling(seed: int) -> None:
    q, k, v = clustered(seed, 256, 4, heads=4)
    k, v = k[:, :2].clone().requires_grad_(), v[:, :2].clone().requires_grad_()
    tiling = AdaptiveTiling(1e-4, block=32)
    out = hal.attention(q, k, v, enable_gqa=True, tiling=tiling, backend="cpu:0")
    want = hal.attention(q, k, v, enable_gqa=True, backend="cpu:0")
    assert float((out - want).abs().max()) <= 2e-3
    got = torch.autograd.grad(out.square().sum(), [k, v])
    right = torch.autograd.grad(want.square().sum(), [k, v])
    assert all(relative_error(x, y) <= 1e-2 for x, y in zip(got, right, strict=True))


@pytest.mark.parametrize("length", [64, 100, 257])
def test_a_content_order_is_a_permutation_and_changes_nothing(length: int, seed: int) -> None:
    q, k, v = clustered(seed, length)
    order = content_order(k, 16)
    assert torch.equal(order.order.sort(-1).values, torch.arange(length).expand(1, 2, -1))
    assert torch.equal(order.undo(order.apply(v)), v)
    out = hal.attention(q, order.apply(k), order.apply(v), backend="cpu:0")
    assert relative_error(out, hal.attention(q, k, v, backend="cpu:0")) <= 1e-6
    result = adaptive_attention(q, k, v, AdaptiveTiling(1e-6, block=16), order=True, backend="cpu:0")
    assert relative_error(result.out, hal.attention(q, k, v, backend="cpu:0")) <= 1e-5


def test_blocks_of_two_topics_cost_few_blocks(seed: int) -> None:
    """Bounds of whole blocks read 0.6 of these, since half of the blocks hold two topics."""
    q, k, _ = clustered(seed, 1024, 16)
    rows, keys = topic_orders(q, k)
    q, k = rows.apply(q), keys.apply(k)
    plan = AdaptiveTiling(0.01, block=32).plan(request_of(q, k, k), {}, query=q, key=k)
    assert float(lost(q, k, plan).max()) <= 0.01
    assert float(plan.counts.float().mean()) <= 0.25 * 32


def test_content_order_makes_clustered_keys_sparse(seed: int) -> None:
    tensors, tiling = clustered(seed, 1024, 16), AdaptiveTiling(0.01, block=32)
    shuffled = adaptive_attention(*tensors, tiling, backend="cpu:0")
    ordered = adaptive_attention(*tensors, tiling, order=True, backend="cpu:0")
    assert shuffled.dense
    assert shuffled.density == 1
    assert not ordered.dense
    assert ordered.density < 0.5


def test_an_estimate_comes_with_the_loss_that_it_has(seed: int) -> None:
    q, k, v = clustered(seed, 512, 8, 0.5)
    result = adaptive_attention(q, k, v, AdaptiveTiling(0.1, mode="estimate", block=32), backend="cpu:0")
    assert result.lost is not None
    assert float((result.lost - lost(q, k, result.plan)).abs().max()) <= 1e-5


@pytest.mark.parametrize("causal", ["none", "top_left"])
def test_two_precisions_are_nearer_than_the_low_one(causal: str, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(1, 2, 256, 32, generator=generator) for _ in range(3))
    tiling = AdaptiveTiling(0.1, mode="precision", block=16, share=0.6)
    result = adaptive_attention(q, k, v, tiling, causal=causal, backend="cpu:0")
    want = hal.testing.reference(q, k, v, request=request_of(q, k, v, causal=causal)).out
    low = hal.attention(q.bfloat16(), k.bfloat16(), v.bfloat16(), causal=causal, backend="cpu:0")
    assert result.density == pytest.approx(0.6, abs=0.02)
    assert relative_error(result.out, want) < 0.7 * relative_error(low.float(), want)


def test_a_complement_has_the_other_blocks() -> None:
    indices = torch.tensor([[[[2, 0, 1], [1, 3, 0]]]], dtype=torch.int32)
    plan = hal.BlockPlan(4, 4, indices, torch.tensor([[[2, 1]]], dtype=torch.int32))
    found = complement(plan, 4)
    assert found.counts.tolist() == [[[2, 3]]]
    assert found.indices[0, 0, 0, :2].tolist() == [1, 3]
    assert found.indices[0, 0, 1].tolist() == [0, 2, 3]


def test_another_scorer_changes_the_order_and_not_the_certificate(seed: int) -> None:
    q, k, v = clustered(seed, 256)

    def antidiagonal(query: Tensor, key: Tensor) -> Tensor:
        """Sums along the antidiagonals of each block."""
        a = query.unflatten(2, (-1, 32))  # type: ignore[no-untyped-call]
        b = key.unflatten(2, (-1, 32)).flip(3)  # type: ignore[no-untyped-call]
        return torch.einsum("bhqid,bhkid->bhqk", a, b)

    tiling = AdaptiveTiling(0.05, block=32, scorer=antidiagonal)
    assert "antidiagonal" in tiling.name
    order = content_order(k, 32)
    plan = tiling.plan(request_of(q, k, v), {}, query=q, key=order.apply(k))
    assert float(lost(q, order.apply(k), plan).max()) <= 0.05 + 1e-6


def test_it_is_a_tiling_strategy_with_its_parameters_in_its_name() -> None:
    tiling: hal.TilingStrategy = AdaptiveTiling()
    assert tiling.needs_content
    assert AdaptiveTiling(0.1).name != AdaptiveTiling(0.2).name
    assert AdaptiveTiling(0.1, block=16, device="cpu:0").compute_optimal_tile_size(9, 9, {}) == 16
    assert [t.shape[2] for t in AdaptiveTiling().split_into_tiles(torch.zeros(1, 1, 5, 2), 2)] == [2, 2, 1]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"tau": 1.0}, "between 0 and 1"),
        ({"mode": "hope"}, "use certified, exact"),
        ({"share": 0.5}, "in 'precision'"),
        ({"block": 0}, "block 0 was given"),
    ],
)
def test_parameters_that_cannot_be_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ContractError, match=words):
        AdaptiveTiling(**options)


def test_calls_that_the_bounds_do_not_know_are_refused(seed: int) -> None:
    q, k, v = clustered(seed, 64)
    with pytest.raises(ContractError, match="whose bounds do not know it"):
        hal.attention(q, k, v, torch.zeros(64, 64), tiling=AdaptiveTiling(block=16), backend="cpu:0")
    with pytest.raises(ContractError, match=r"call hal_geometric\.adaptive_attention"):
        hal.attention(q, k, v, tiling=AdaptiveTiling(mode="precision", block=16), backend="cpu:0")
    with pytest.raises(ContractError, match="exact without causal alone"):
        adaptive_attention(q, k, v, order=True, causal="top_left")
    assert math.isfinite(float(adaptive_attention(q, k, v, AdaptiveTiling(block=16)).out.sum()))


def test_16_bit_tokens_have_the_plan_of_their_values(seed: int) -> None:
    """Queries and keys of one shape are widened and split together."""
    query, key = (t.bfloat16() for t in clustered(seed, length=520, topics=16)[:2])
    tiling = AdaptiveTiling(0.01, block=32)
    plans = [tiling.choose(request_of(q, k, k), q, k) for q, k in ((query, key), (query.float(), key.float()))]
    assert torch.equal(plans[0].counts, plans[1].counts)
    assert torch.equal(plans[0].indices, plans[1].indices)
