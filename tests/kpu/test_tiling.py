"""`KPUTiling`: the machine's own cut of the work, and tilings that a caller brings."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hal_kpu.cost import attention_cost
from hal_kpu.profiles.profile import load, names
from hal_kpu.simulator.attention.program import fused
from hal_kpu.simulator.transactional import run_transactional
from hal_kpu.tiling import Blocks, KPUTiling, cut_into, own_cut, room, shortened

import hal_core as hal
from hal_core import AttentionRequest, Causal
from hal_core.plugin_api import DenseTiling, TilePlan, UnsupportedError
from hal_core.testing import reference, relative_error

_REQUEST = AttentionRequest(1, 8, 4, 256, 384, 64, 64, "float32")


def test_the_plan_has_the_blocks_of_the_program() -> None:
    profile = load("t64")
    plan, cut = KPUTiling(profile).plan(_REQUEST, {}), own_cut(profile, _REQUEST)
    assert (plan.block_q, plan.block_k, plan.cut_by) == (cut.block_q, cut.block_k, "kpu")
    buffers = {buffer.name: buffer for buffer in fused(profile, _REQUEST).buffers}
    arrays, held = cut.blocks.arrays, plan.block_k * 64 * 4
    assert buffers["keys"].slot_bytes == held * arrays
    assert buffers["queries"].slot_bytes == plan.block_q * 64 * 4 * arrays
    assert hal.explain(*(torch.randn(1, 8, n, 64) for n in (256, 256, 256)), backend="kpu:0").chosen == "kpu:0"


def test_equal_names_give_equal_plans_and_other_machines_other_names() -> None:
    assert KPUTiling(load("t64")).name == KPUTiling(load("t64")).name
    tilings = [KPUTiling(load(name)) for name in names()]
    tilings += [KPUTiling(load("t64"), 64, 32), KPUTiling(load("t64").replace(buffers__l3=1 << 17))]
    assert len({tiling.name for tiling in tilings}) == len(tilings)


def test_choices_begin_with_the_own_cut_and_keep_the_limits() -> None:
    tiling = KPUTiling(load("t64"))
    best, *others = tiling.choices(_REQUEST, {"minimum": 16, "maximum": 128})
    plan = tiling.plan(_REQUEST, {"minimum": 16, "maximum": 128})
    assert (best.block_q, best.block_k) == (plan.block_q, plan.block_k)
    assert others
    assert all(16 <= size <= 128 for choice in others for size in (choice.block_q, choice.block_k))


@pytest.mark.parametrize(
    ("limits", "rows", "keys"),
    [({"block_q": 16, "block_k": 24}, 16, 24), ({"maximum": 20}, 20, 20), ({"available_memory": 1 << 14}, 64, 32)],
)
def test_a_plan_keeps_the_bounds_that_it_is_given(limits, rows, keys) -> None:
    plan = KPUTiling(load("t64")).plan(_REQUEST, limits)
    assert 1 <= plan.block_q <= rows
    assert 1 <= plan.block_k <= keys
    if "available_memory" in limits:
        held = (plan.block_q * 64 + plan.block_k * 128 + plan.block_q * plan.block_k) * 4
        assert held <= limits["available_memory"] < 2 * held


@pytest.mark.parametrize("name", ["t64", "t768", "t4x4"])
@pytest.mark.parametrize("block", [(1, 1), (64, 64), (100, 37), (4096, 4096), (8, 1000)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_blocks_too_large_for_the_buffers_become_equal_pieces_that_fit(name, block, dtype) -> None:
    profile, request = load(name), replace(_REQUEST, dtype=dtype)
    cut = cut_into(profile, request, *block)
    l2, l3 = profile.count("buffers.l2"), profile.count("buffers.l3")
    assert cut.blocks.staged(l2) >= 1 or cut.blocks.keys == cut.blocks.cols
    assert room(cut.blocks, 64, 64, cut.row_tiles) <= l3
    assert cut.block_k <= cut.blocks.keys < cut.block_k + cut.blocks.cols
    assert cut.block_q <= cut.row_tiles * cut.blocks.rows < cut.block_q + cut.blocks.rows
    whole = min(block[0], request.len_q)
    pieces = -(-whole // cut.block_q)
    assert cut.block_q == -(-whole // pieces), "the pieces of a block are equal"


@pytest.mark.parametrize("causal", [Causal.NONE, Causal.BOTTOM_RIGHT])
def test_the_own_cut_given_by_hand_takes_the_same_cycles(causal) -> None:
    profile, request = load("t64"), replace(_REQUEST, causal=causal)
    cut = own_cut(profile, request)
    named = replace(request, tiling=("mine", cut.block_q, cut.block_k))
    assert cut_into(profile, request, cut.block_q, cut.block_k) == cut
    assert attention_cost(profile, named).cycles == attention_cost(profile, request).cycles


def test_smaller_blocks_move_more_bytes() -> None:
    profile = load("t64")
    runs = [run_transactional(fused(profile, replace(_REQUEST, tiling=("cut", n, 64))), profile) for n in (32, 64, 128)]
    moved = [run.memory.bytes for run in runs]
    assert moved == sorted(moved, reverse=True)
    assert moved[0] > moved[-1]


@pytest.mark.parametrize("block", [(32, 32), (64, 48), (1000, 1000)])
def test_a_tiling_of_the_caller_is_served_and_costs_what_it_is(block, seed) -> None:
    g = torch.Generator().manual_seed(seed)
    q, k, v = torch.randn(2, 4, 100, 32, generator=g), *(torch.randn(2, 2, 150, 32, generator=g) for _ in range(2))
    tiling, given = DenseTiling(*block), {"causal": "bottom_right", "enable_gqa": True, "backend": "kpu:0"}
    out, lse = hal.attention(q, k, v, tiling=tiling, return_lse=True, **given)
    want = reference(q, k, v, causal="bottom_right")
    assert relative_error(out, want.out) < 1e-6
    assert relative_error(lse, want.lse) < 1e-6
    own = hal.explain(q, k, v, **given).winner.estimate
    cut = hal.explain(q, k, v, tiling=tiling, **given).winner.estimate
    assert cut.time.middle >= own.time.middle * 0.999


def test_a_tile_too_small_and_uneven_ranges_are_refused() -> None:
    q = torch.randn(1, 1, 64, 16)
    with pytest.raises(UnsupportedError, match="tiles of 32 and up offered"):
        hal.attention(q, q, q, backend="kpu:0", tiling=DenseTiling(4))
    request = AttentionRequest(1, 1, 1, 64, 64, 16, 16, "float32")
    uneven = TilePlan.uneven(request, ((0, 10, ((0, 64),)), (10, 64, ((0, 64),))))
    with pytest.raises(UnsupportedError, match="equal blocks"):
        hal.session("kpu:0").prepare_attention(q, q, q, request=request, plan=uneven)


def test_a_tile_size_of_the_call_is_followed(seed) -> None:
    g = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(1, 2, 80, 16, generator=g) for _ in range(3))
    request = AttentionRequest(1, 2, 2, 80, 80, 16, 16, "float32")
    session = hal.session("kpu:0")
    prepared = session.prepare_attention(q, k, v, 32, request=request)
    assert (prepared.plan.block_q, prepared.plan.block_k, prepared.block_k) == (32, 32, 32)
    assert relative_error(session.compute_attention(prepared).out, reference(q, k, v).out) < 1e-6


def test_a_very_tall_call_is_represented_by_a_short_one() -> None:
    profile = load("t64")
    rows, keys = Blocks.of(profile, "float32").rows, Blocks.of(profile, "float32").keys
    tall = AttentionRequest(4, 8, 8, rows << 27, keys, 64, 64, "float32")
    short = shortened(profile, tall)
    assert short.len_q * short.len_k < 1 << 22
    assert (
        attention_cost(profile, tall).seconds > 1e3 * attention_cost(profile, replace(tall, len_q=rows << 12)).seconds
    )
