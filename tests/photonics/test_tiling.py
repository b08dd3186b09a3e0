"""The device's own cut of attention, cuts that a caller brings, and what both cost."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from hal_photonics.cost import attention_cost
from hal_photonics.profiles.profile import Profile
from hal_photonics.simulator.core import PhotonicCore
from hal_photonics.simulator.work import attention_work, tiles_seen
from hal_photonics.tiling import PhotonicTiling, rows_at_once

import hal_core as hal
from hal_core import AttentionRequest, Causal, DenseTiling, UnsupportedError
from hal_core.plugin_api import TilePlan, visible_keys
from hal_core.testing import reference, relative_error

SHAPES = [
    {"len_q": 300, "len_k": 300},
    {"len_q": 1, "len_k": 500, "causal": Causal.BOTTOM_RIGHT},
    {"len_q": 500, "len_k": 130, "causal": Causal.BOTTOM_RIGHT},
    {"len_q": 3000, "len_k": 2000, "causal": Causal.TOP_LEFT},
    {"len_q": 2500, "len_k": 2500, "window": (200, 100)},
    {"len_q": 2500, "len_k": 2600, "window": (5, 3), "causal": Causal.BOTTOM_RIGHT},
    {"len_q": 40, "len_k": 30, "window": (3, None), "diagonal": 60},
]


def request(**changes: Any) -> AttentionRequest:
    plain = {"batch": 1, "heads_q": 2, "heads_kv": 1, "len_q": 64, "len_k": 64, "dim_qk": 16, "dim_v": 16}
    return AttentionRequest(**(plain | {"dtype": "float32"} | changes))


class Uneven:
    """Row ranges of 7 with key ranges of 5 and 11 by turns: a cut no device would choose."""

    name, needs_content = "uneven", False

    def compute_optimal_tile_size(self, length: int, memory: int, constraints: Mapping[str, int]) -> int:
        return 7

    def split_into_tiles(self, tensor: torch.Tensor, tile_size: int) -> list[torch.Tensor]:
        return list(tensor.split(tile_size, dim=2))

    def plan(self, request: AttentionRequest, limits: Mapping[str, int], **tensors: Any) -> TilePlan:
        ends = [0]
        while ends[-1] < request.len_k:
            ends.append(min(ends[-1] + (11 if len(ends) % 2 else 5), request.len_k))
        spans = tuple(itertools.pairwise(ends))
        rows = [(q, min(q + 7, request.len_q), spans) for q in range(0, request.len_q, 7)]
        return TilePlan.uneven(request, rows)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_own_plan_covers_every_visible_pair_once_in_tiles_of_the_array(shape: dict[str, Any]) -> None:
    r = request(**shape)
    plan = PhotonicTiling("photonic", 64, 64).plan(r, {})
    plan.check("photonic")
    assert plan.cut_by == "photonic"
    assert all(stop - start <= 64 for _, _, spans in plan.rows() for start, stop in spans)
    assert next(iter(plan.rows()))[1] == rows_at_once(r)


def test_equal_tilings_have_equal_names_and_others_not() -> None:
    assert PhotonicTiling("a", 64, 64).name == PhotonicTiling("b", 64, 64).name
    assert PhotonicTiling("a", 64, 64).name != PhotonicTiling("a", 128, 64).name
    own = PhotonicTiling("a", 64, 64)
    assert [choice.name for choice in own.choices(request(), {})] == [own.name, "dense(64x64)", "dense(32x32)"]


@pytest.mark.parametrize(
    ("tiling", "widths"), [(None, [64, 64, 2]), (DenseTiling(32, 16), [16] * 8 + [2]), (Uneven(), None)]
)
def test_the_optics_load_the_tiles_of_the_plan(
    tiling: Any, widths: list[int] | None, draw: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    q, k, v = (torch.randn(1, 1, 130, 16, generator=draw) for _ in range(3))
    loaded: list[slice] = []
    load = PhotonicCore.load
    hal.attention(q, k, v, backend="photonic:0", tiling=tiling)  # opens and calibrates
    monkeypatch.setattr(PhotonicCore, "load", lambda self, w, place: (loaded.append(place), load(self, w, place))[1])
    out = hal.attention(q, k, v, backend="photonic:0", tiling=tiling, rng=(1, 2))
    tiles = [place.stop - place.start for place in loaded]
    if widths is None:
        spans = [(11, 5)[i % 2] for i in range(16)] + [2]
        widths = spans
    ranges = len(list((tiling or hal.session("photonic:0").tiling).plan(request(len_q=130, len_k=130), {}).rows()))
    assert tiles == widths * ranges
    assert relative_error(out, reference(q, k, v).out) < 0.35


def test_the_plan_is_shown_and_what_does_not_fit_the_array_is_refused(draw: torch.Generator) -> None:
    q = torch.randn(1, 2, 200, 16, generator=draw)
    assert "cut by photonic" in hal.explain(q, q, q, backend="photonic:0").plan
    assert "32 x 32" in hal.explain(q, q, q, backend="photonic:0", tiling=DenseTiling(32)).plan
    with pytest.raises(UnsupportedError, match="tiles of 0 to 64 offered"):
        hal.attention(q, q, q, backend="photonic:0", tiling=DenseTiling(128))


def test_a_tile_size_bounds_the_rows_at_once(draw: torch.Generator) -> None:
    session: Any = hal.session("photonic:0")
    q, k, v = (torch.randn(1, 2, 50, 16, generator=draw) for _ in range(3))
    r = request(heads_kv=2, len_q=50, len_k=50)
    assert session.prepare_attention(q, k, v, 7, request=r).plan.block_q == 7
    assert session.prepare_attention(q, k, v, request=r).plan.block_q == 50


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("size", [1, 7, 32, 64, 4096])
def test_tiles_seen_by_rows_are_counted_exactly(shape: dict[str, Any], size: int) -> None:
    r = request(**shape)
    counts = [0] * -(-r.len_k // size)
    for row in range(r.len_q):
        start, stop = visible_keys(r, row, r.len_q, r.len_k)
        for tile in range(start // size, -(-stop // size) if start < stop else 0):
            counts[tile] += 1
    assert tiles_seen(r, size) == (sum(count > 0 for count in counts), sum(counts))


@pytest.mark.timeout(30)
def test_the_estimate_of_a_huge_call_is_as_quick_as_of_a_small_one(generic: Profile) -> None:
    for changes in ({}, {"causal": Causal.TOP_LEFT}, {"window": (1000, 0)}, {"tiling": ("dense(32x32)", 32, 32)}):
        cost = attention_cost(generic, request(len_q=10**12, len_k=10**12, **changes))
        assert cost.time > 1e3


@pytest.mark.parametrize("causal", list(Causal))
def test_tiles_of_a_brought_tiling_are_loaded_for_each_of_its_row_ranges(generic: Profile, causal: Causal) -> None:
    r = request(len_q=200, len_k=300, causal=causal, tiling=("dense(32x16)", 32, 16))
    plan = TilePlan.equal(r, 32, 16)
    keys = values = key_rows = value_rows = 0
    for start, stop, spans in plan.rows():
        if spans:
            tiles = -(-(spans[-1][1] - spans[0][0]) // 64)
            keys, key_rows = keys + tiles, key_rows + tiles * (stop - start)
            values, value_rows = values + len(spans), value_rows + len(spans) * (stop - start)
    work = attention_work(generic, r, plan)
    assert (work.loads, work.rows) == (keys + values, 2 * (key_rows + value_rows))
    uneven = TilePlan.uneven(r, plan.rows())
    assert attention_work(generic, r, uneven) == work
    assert attention_work(generic, r).loads == work.loads


def test_what_a_prepared_call_costs_is_its_estimate_at_the_exact_lengths(draw: torch.Generator) -> None:
    session: Any = hal.session("photonic:0")
    q, k, v = (torch.randn(1, 2, 100, 16, generator=draw) for _ in range(3))
    exact = request(heads_kv=2, len_q=100, len_k=100)
    bucket = request(heads_kv=2, len_q=128, len_k=128)
    found = session.cost(session.prepare_attention(q, k, v, request=bucket))
    assert found.time.middle == pytest.approx(attention_cost(session.profile, exact).time, rel=1e-12)
    with hal.meter() as meter:
        hal.attention(q, k, v, backend="photonic:0")
        hal.attention(q, k, v, backend="photonic:0", tiling=DenseTiling(16))
    narrow = request(heads_kv=2, len_q=100, len_k=100, tiling=("dense(16x16)", 16, 16))
    both = found.time.middle + attention_cost(session.profile, narrow).time
    assert meter.records["photonic:0"].time.middle == pytest.approx(both, rel=1e-6)
    with hal.meter() as meter:
        hal.attention(q, k, v, backend="photonic:0", tiling=Uneven())
    uneven = request(heads_kv=2, len_q=100, len_k=100, tiling=("uneven", 0, 0))
    want = attention_cost(session.profile, uneven, Uneven().plan(uneven, {})).time
    assert meter.records["photonic:0"].time.middle == pytest.approx(want, rel=1e-6)
    assert want > 4 * found.time.middle
