"""Fused attention's movement: it does the work that there is, fits the machine, and hides what the masks hide."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hal_kpu.profiles.profile import load, names
from hal_kpu.simulator.attention.program import fused
from hal_kpu.simulator.cycle_accurate import run_cycle_accurate
from hal_kpu.simulator.engines import BufferTooSmallError
from hal_kpu.simulator.movement import Opcode
from hal_kpu.simulator.stats import bound
from hal_kpu.simulator.transactional import run_transactional
from hal_kpu.tiling import Blocks, longest_head, room, rounds, row_tiles

from hal_core import AttentionRequest, Causal, MaskKind, dense_mask

_BANDS: list[dict[str, Any]] = [
    {},
    {"causal": Causal.TOP_LEFT},
    {"causal": Causal.BOTTOM_RIGHT},
    {"window": (40, 20)},
    {"causal": Causal.BOTTOM_RIGHT, "window": (70, 0)},
]


def request(heads: int = 2, len_q: int = 96, len_k: int = 160, dim: int = 64, **changes: Any) -> AttentionRequest:
    return AttentionRequest(1, heads, heads, len_q, len_k, dim, dim, changes.pop("dtype", "float32"), **changes)


def test_whole_tiles_are_multiplied_once_and_operands_move_once():
    r = request()
    program = fused(load("t32x32"), r)
    assert program.total("macs") == r.macs
    assert program.total("bytes", Opcode.DMA_LOAD_TILE, Opcode.DMA_STORE_TILE) == r.bytes_moved


def test_keys_and_values_come_once_for_each_query_block():
    profile, r = load("t32x32"), request(heads=1, len_q=1024, len_k=64)
    blocks = -(-32 // row_tiles(profile, r))
    assert blocks > 1
    loads = fused(profile, r).total("bytes", Opcode.DMA_LOAD_TILE)
    assert loads == 4 * 64 * (1024 + blocks * 2 * 64)


def test_arrays_share_the_keys_of_one_head_and_of_no_other():
    profile = load("t64")  # 7 arrays for float32
    apart = request(14, 32, 96)
    assert fused(profile, apart).total("bytes", Opcode.DMA_LOAD_TILE, Opcode.DMA_STORE_TILE) == apart.bytes_moved
    grouped = replace(request(7, 32, 96), heads_kv=1)
    assert fused(profile, grouped).total("bytes", Opcode.DMA_LOAD_TILE, Opcode.DMA_STORE_TILE) == grouped.bytes_moved


@pytest.mark.parametrize("band", _BANDS, ids=str)
@pytest.mark.parametrize("lengths", [(96, 160), (160, 96), (70, 70), (1, 200)])
def test_exactly_the_tiles_that_somebody_sees_are_computed(band, lengths):
    r = request(1, *lengths, **band)
    mask = dense_mask(r, *lengths)
    seen = 0
    for row in range(0, lengths[0], 32):
        for key in range(0, lengths[1], 32):
            seen += mask is None or bool(mask[row : row + 32, key : key + 32].any())
    assert fused(load("t32x32"), r).total("macs") == seen * 32 * 32 * 128
    assert sum(sum(each.seen) * times for each, times in rounds(load("t32x32"), r)) == seen


@pytest.mark.parametrize("name", names())
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("dim", [1, 24, 128, "longest"])
def test_every_head_size_that_is_claimed_runs_on_every_profile(name, dtype, dim):
    profile = load(name)
    size = longest_head(profile, dtype) if dim == "longest" else dim
    run = run_transactional(fused(profile, request(3, 17, 10, size, dtype=dtype)), profile)
    assert run.cycles >= bound(run)


def test_a_head_that_does_not_fit_is_refused_by_the_machine_too():
    profile = load("t64")
    size = longest_head(profile, "float32") + 1
    assert room(Blocks.of(profile, "float32"), size, size) > profile.count("buffers.l3")
    with pytest.raises(BufferTooSmallError, match="L3"):
        run_transactional(fused(profile, request(dim=size)), profile)


def test_the_room_is_what_the_buffers_take():
    profile, r = load("t32x32"), request(1, 256, 256)
    blocks = Blocks.of(profile, "float32")
    taken = sum(b.slots * b.slot_bytes for b in fused(profile, r).buffers if b.level == "L3")
    assert taken == room(blocks, 64, 64, row_tiles(profile, r), 2)


@pytest.mark.parametrize("name", ["t32x32", "t64", "t768"])
@pytest.mark.parametrize("band", _BANDS[:3], ids=str)
def test_engines_add_up_and_no_bound_is_beaten(name, band):
    profile = load(name)
    run = run_transactional(fused(profile, request(5, 200, 200, **band)), profile)
    assert all(time.total == run.cycles for time in run.timeline.engines.values())
    assert run.cycles >= bound(run)


def test_a_faster_memory_or_a_wider_vector_unit_is_never_slower():
    profile, r = load("t64"), request(8, 256, 256, 32)
    cycles = run_transactional(fused(profile, r), profile).cycles
    for change in ({"dram__bandwidth": 128e9, "engines__dma_bandwidth": 128e9}, {"engines__vector_lanes": 64}):
        other = profile.replace(**change)
        assert run_transactional(fused(other, r), other).cycles <= cycles
    slow = profile.replace(engines__vector_lanes=4)
    assert run_transactional(fused(slow, r), slow).cycles > 2 * cycles


def test_a_mask_and_a_cap_cost_vector_operations():
    profile, r = load("t32x32"), request()
    pairs = 96 * 160 * 2
    plain = fused(profile, r).total("operations")
    assert fused(profile, replace(r, mask=MaskKind.BOOLEAN)).total("operations") == plain + pairs
    assert fused(profile, replace(r, softcap=2.0)).total("operations") == plain + 8 * pairs


def test_the_cycle_accurate_simulator_agrees_within_5_percent():
    profile, r = load("t32x32"), request(2, 128, 128, 32)
    program = fused(profile, r)
    exact, fast = run_cycle_accurate(program, profile).cycles, run_transactional(program, profile).cycles
    assert abs(fast - exact) <= 0.05 * exact


def test_without_work_there_is_no_time():
    profile = load("t64")
    assert run_transactional(fused(profile, request(len_q=0)), profile).cycles == 0
    assert run_transactional(fused(profile, request(len_k=0)), profile).cycles == 0
