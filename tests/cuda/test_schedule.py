"""Tiles and parts of the keys of a decode step: what the model of waves chooses, without a GPU."""

from __future__ import annotations

import pytest
from hal_cuda.discovery import Chip
from hal_cuda.kernels.portable.schedule import PARTS, Tiles, Work, fastest, resident, rows_joined
from hal_cuda.tiling import MOST_CACHE_ROWS, Splits, choose_decode, choose_tiles, packs, tiles_of_plan

from hal_core import AttentionRequest, TilePlan

H200 = Chip(index=0, capability=(9, 0), multiprocessors=132, shared_memory=227 << 10)


def chosen(
    group: int, heads_kv: int, batch: int, keys: int, dim: int = 128, len_q: int = 1, chip: Chip = H200
) -> tuple[Tiles, Splits]:
    request = AttentionRequest(
        batch=batch,
        heads_q=group * heads_kv,
        heads_kv=heads_kv,
        len_q=len_q,
        len_k=keys,
        dim_qk=dim,
        dim_v=dim,
        dtype="bfloat16",
    )
    assert packs(request, len_q)
    return choose_decode(request, len_q, keys, batch, chip)


@pytest.mark.parametrize("group", [1, 4, 8, 16])
@pytest.mark.parametrize("batch", [1, 3, 32, 256])
@pytest.mark.parametrize("keys", [1, 63, 512, 1000, 131072])
@pytest.mark.parametrize("dim", [64, 128, 256])
def test_parts_cover_every_key_and_none_is_empty(group: int, batch: int, keys: int, dim: int) -> None:
    tiles, splits = chosen(group, 4, batch, keys, dim)
    assert (splits.programs - 1) * splits.chunk < keys <= splits.programs * splits.chunk
    assert splits.chunk % tiles.keys == 0
    assert splits.programs <= PARTS[-1]


@pytest.mark.parametrize(("group", "len_q", "rows"), [(1, 1, 16), (8, 1, 16), (16, 1, 16), (4, 8, 32), (4, 16, 64)])
def test_the_rows_of_a_group_share_a_tile(group: int, len_q: int, rows: int) -> None:
    assert chosen(group, 2, 1, 4096, len_q=len_q)[0].rows == rows


def test_keys_are_divided_where_heads_leave_processors_idle_and_only_there() -> None:
    for heads_kv, batch in ((8, 1), (8, 4), (2, 8)):
        _, splits = chosen(4, heads_kv, batch, 8192)
        assert 0.75 * 132 <= heads_kv * batch * splits.programs <= 3 * 132
    for heads_kv, batch in ((8, 16), (8, 32), (8, 256), (32, 8)):
        assert chosen(4, heads_kv, batch, 4096)[1].programs == 1


def test_more_processors_take_more_parts() -> None:
    small = H200.__class__(index=0, capability=(9, 0), multiprocessors=20, shared_memory=227 << 10)
    assert chosen(4, 2, 1, 32768, chip=small)[1].programs < chosen(4, 2, 1, 32768)[1].programs


def test_programs_of_a_processor_are_counted_as_compiled_kernels_take_memory() -> None:
    """Shared memory of 71680, 104448 and 139264 bytes, as Triton says of these tiles, and more than 160 KB."""
    work = Work(8, 8, 8192, 128, 128, 16, 2, None)
    tiles = (Tiles(16, 64, 4, 3), Tiles(16, 64, 4, 4), Tiles(16, 128, 4, 3), Tiles(16, 64, 4, 6))
    assert [resident(work, tile, H200) for tile in tiles] == [3, 2, 1, 1]


def test_a_joining_costs_more_than_no_division_of_few_keys() -> None:
    tiles = Tiles(16, 64, 4, 4)
    for keys in (64, 128):
        assert fastest(Work(8, 4, keys, 128, 128, 16, 2, None), tiles, 16, H200)[1] == 1
    time, parts = fastest(Work(8, 4, 32768, 128, 128, 16, 2, None), tiles, 16, H200)
    assert parts > 8
    assert time < fastest(Work(8, 4, 65536, 128, 128, 16, 2, None), tiles, 16, H200)[0]


def test_fewer_bits_take_less_time() -> None:
    tiles = Tiles(16, 128, 4, 3)
    times = [
        fastest(Work(256, 4, 8192, 128, 128, bits, 2, cache), tiles, 16, H200)[0]
        for bits, cache in ((16, None), (8, "int8"), (4, "int4"))
    ]
    assert times[0] > times[1] > times[2]


def test_rows_that_are_joined_at_once_fill_registers() -> None:
    assert rows_joined(Tiles(16, 64, 4, 3), 128) == 4
    assert rows_joined(Tiles(16, 64, 4, 3), 64) == 8
    assert rows_joined(Tiles(16, 64, 4, 3), 512) == 1


@pytest.mark.parametrize("cache", ["int8", "int4", "float8_e4m3fn", "float8_e5m2"])
@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize("len_q", [1, 8, 16, 40, 512])
def test_no_product_of_a_quantised_cache_is_a_warpgroup_s(cache: str, dim: int, len_q: int) -> None:
    """Such a product takes 64 rows and four warps."""
    chip = Chip(index=0, capability=(9, 0), multiprocessors=132, shared_memory=227 << 10)
    request = AttentionRequest(
        batch=3,
        heads_q=16,
        heads_kv=2,
        len_q=len_q,
        len_k=1500,
        dim_qk=dim,
        dim_v=dim,
        dtype="bfloat16",
        cache_dtype=cache,
    )
    own = choose_tiles(request, len_q, chip)
    assert own.rows <= MOST_CACHE_ROWS
    for block in (16, 64, 128):
        tiles = tiles_of_plan(request, TilePlan.equal(request, block, 64, cut_by="test"), own, chip)
        assert tiles.rows <= MOST_CACHE_ROWS or tiles.warps < 4
