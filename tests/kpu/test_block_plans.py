"""Block plans on the KPU: the values of the listed pairs, and the cycles of the tiles that are left."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hal_kpu.cost import attention_cost
from hal_kpu.profiles.profile import load
from hal_kpu.simulator.attention.block_plans import MOST_ROUNDS, planned_rounds, reads_of, sampled
from hal_kpu.simulator.attention.program import fused
from torch import Tensor

import hal_core as hal
from hal_core import AttentionRequest, BlockPlan, Causal
from hal_core.testing import reference, relative_error


@pytest.fixture
def draw(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def plan_of(table: Tensor, block_q: int, block_k: int) -> BlockPlan:
    """A plan from a table [batch or 1, heads or 1, query blocks, key blocks]; what lies past a count is no block."""
    counts = table.sum(-1).int()
    order = torch.argsort(table.int(), dim=-1, descending=True, stable=True)[..., : max(int(counts.max()), 1)]
    past = torch.arange(order.shape[-1]) >= counts.unsqueeze(-1)
    return BlockPlan(block_q, block_k, order.masked_fill(past, 999).int(), counts)


def metered(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Any:
    with hal.meter() as meter:
        hal.attention(q, k, v, backend="kpu:0", **options)
    return meter.records["kpu:0"]


@pytest.mark.parametrize(
    ("dtype", "block_q", "kind"),
    [(torch.float32, 64, "every other block"), (torch.bfloat16, 128, "another half for every row of blocks")],
)
def test_half_the_tiles_take_half_the_cycles_of_the_whole_call(
    draw: torch.Generator, dtype: torch.dtype, block_q: int, kind: str
) -> None:
    q, k, v = (torch.randn(1, 8, 1024, 64, generator=draw).to(dtype) for _ in range(3))
    rows, columns = torch.arange(1024 // block_q), torch.arange(16)
    shift = 0 if kind == "every other block" else rows.unsqueeze(1)
    half = ((columns + shift) % 2 == 0).expand(len(rows), 16)[None, None]
    skipping = metered(q, k, v, block_plan=plan_of(half, block_q, 64))
    for whole in (metered(q, k, v), metered(q, k, v, block_plan=plan_of(torch.ones_like(half), block_q, 64))):
        assert 0.5 <= skipping.time.middle / whole.time.middle <= 0.55
        assert 0.5 <= skipping.energy.middle / whole.energy.middle <= 0.55


def test_a_plan_of_all_blocks_does_the_work_of_a_dense_call() -> None:
    profile = load("t64")
    dense = AttentionRequest(1, 14, 14, 256, 256, 64, 64, "float32", tiling=("", 64, 64))
    sparse = AttentionRequest(1, 14, 14, 256, 256, 64, 64, "float32", block_plan=(64, 64, 4))
    reads = [[tuple(range(4))] * 4] * 14
    rounds = planned_rounds(profile, sparse, reads)
    assert fused(profile, dense, rounds).total("macs") == dense.macs
    assert attention_cost(profile, sparse, reads).cycles == pytest.approx(
        attention_cost(profile, dense).cycles, rel=0.01
    )


@pytest.mark.parametrize("band", [{}, {"causal": Causal.BOTTOM_RIGHT}, {"window": (40, 10)}])
def test_tiles_that_the_band_hides_are_not_counted_though_they_are_listed(band: dict[str, Any]) -> None:
    profile = load("t32x32")
    request = AttentionRequest(1, 2, 2, 128, 192, 32, 32, "float32", block_plan=(32, 32, 6), **band)
    mask = hal.dense_mask(request, 128, 192)
    seen = sum(
        mask is None or bool(mask[row : row + 32, key : key + 32].any())
        for row in range(0, 128, 32)
        for key in range(0, 192, 32)
    )
    rounds = planned_rounds(profile, request, [[tuple(range(6))] * 4] * 2)
    assert sum(sum(each.seen) * each.active * times for each, times in rounds) == 2 * seen


@pytest.mark.parametrize("heads", [1, 4])
@pytest.mark.parametrize("band", [{}, {"is_causal": True}, {"causal": "bottom_right", "window": (70, 5)}])
def test_a_meter_counts_the_pairs_that_a_plan_lists_and_the_band_shows(
    draw: torch.Generator, band: dict[str, Any], heads: int
) -> None:
    """Rows list different numbers of blocks, so the size of the table bounds the work from above alone."""
    len_q, len_k = 200, 333
    q, k, v = (torch.randn(2, 4, length, 32, generator=draw) for length in (len_q, len_k, len_k))
    plan = plan_of(torch.rand(1, heads, 4, 6, generator=draw) < 0.5, 64, 64)
    visible = hal.expand_block_plan(plan, len_q, len_k).expand(2, 4, -1, -1)
    names = {"is_causal": Causal.TOP_LEFT, None: Causal.NONE, "bottom_right": Causal.BOTTOM_RIGHT}
    causal = names["is_causal" if "is_causal" in band else band.get("causal")]
    request = AttentionRequest(2, 4, 4, len_q, len_k, 32, 32, "float32", causal=causal, window=band.get("window"))
    if (mask := hal.dense_mask(request, len_q, len_k)) is not None:
        visible = visible & mask
    assert metered(q, k, v, block_plan=plan, **band).macs == int(visible.sum()) * (32 + 32)


def test_the_lists_are_those_of_the_plan_for_every_head_without_repetitions() -> None:
    indices = torch.tensor([[[[2, 0, 2], [1, 9, 9]]]], dtype=torch.int32)
    plan = BlockPlan(16, 16, indices, torch.tensor([[[3, 1]]], dtype=torch.int32))
    request = AttentionRequest(2, 2, 1, 32, 48, 8, 8, "float32", block_plan=(16, 16, 3))
    assert reads_of(plan, request) == [[(0, 2), (1,)]] * 4


def test_many_different_rounds_are_represented_by_some(draw: torch.Generator) -> None:
    profile = load("t32x32")  # one array, so every block is a round
    request = AttentionRequest(1, 8, 8, 512, 512, 32, 32, "float32", block_plan=(32, 32, 16))
    table = torch.rand(1, 8, 16, 16, generator=draw) < 0.5
    rounds = planned_rounds(profile, request, reads_of(plan_of(table, 32, 32), request))
    chosen, scale = sampled(rounds)
    assert len(chosen) == MOST_ROUNDS < len(rounds)
    exact = sum(sum(each.seen) * times for each, times in rounds)
    assert scale * sum(sum(each.seen) * times for each, times in chosen) == pytest.approx(exact)
    found = attention_cost(profile, request, reads_of(plan_of(table, 32, 32), request))
    whole = attention_cost(profile, request)
    assert found.cycles / whole.cycles == pytest.approx(exact / (8 * 16 * 16), rel=0.1)


@pytest.mark.parametrize("lead", [(1, 1), (2, 4)])
@pytest.mark.parametrize("blocks", [(32, 64), (48, 40)])
def test_values_and_gradients_are_those_of_the_listed_pairs(
    draw: torch.Generator, lead: tuple[int, int], blocks: tuple[int, int]
) -> None:
    q, k, v = (torch.randn(2, heads, 150, 24, generator=draw).requires_grad_() for heads in (4, 2, 2))
    block_q, block_k = blocks
    table = torch.rand(*lead, -(-150 // block_q), -(-150 // block_k), generator=draw) < 0.5
    table[..., 1, :] = False  # rows that read no key
    plan = plan_of(table, block_q, block_k)
    out, lse = hal.attention(
        q, k, v, backend="kpu:0", block_plan=plan, causal="bottom_right", enable_gqa=True, return_lse=True
    )
    want = reference(q.detach(), k.detach(), v.detach(), causal="bottom_right", plan=plan)
    assert relative_error(out, want.out) < 1e-5
    assert torch.equal(lse == -torch.inf, want.lse == -torch.inf)
    grads = torch.autograd.grad(out.square().sum(), (q, k, v))
    dense = hal.attention(
        q,
        k,
        v,
        hal.expand_block_plan(plan, 150, 150),
        backend="kpu:0",
        causal="bottom_right",
        enable_gqa=True,
    )
    for found, expected in zip(grads, torch.autograd.grad(dense.square().sum(), (q, k, v)), strict=True):
        assert relative_error(found, expected) < 1e-5


def test_blocks_narrower_than_an_array_are_refused_with_what_is_offered(draw: torch.Generator) -> None:
    q = torch.randn(1, 1, 64, 16, generator=draw)
    plan = plan_of(torch.ones(1, 1, 8, 8, dtype=torch.bool), 8, 8)
    with pytest.raises(hal.UnsupportedError, match=r"block_plan +\(8, 8\) asked, blocks of 32 and up offered"):
        hal.attention(q, q, q, backend="kpu:0", block_plan=plan)
