# ruff: noqa: N803
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
"""The warpgroup of the Hopper kernel that loads: query, key and value tiles, by the tensor memory accelerator."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

from .config import Barriers, Inputs, Staged, Work
from .pipeline import (
    KEY_BARRIER,
    bar_sync,
    key_place,
    key_tiles,
    load_tile,
    rounds_of,
    tile_at,
    tiles_in,
    value_barrier,
    value_place,
)


@gluon.jit
def load_keys(inputs: Inputs, staged: Staged, barriers: Barriers, place, at, C: gl.constexpr):
    full, empty = barriers.key_full, barriers.key_empty
    load_tile(inputs.key, inputs.key2, staged.key, staged.key2, full, empty, place, at, KEY_BARRIER, C)


@gluon.jit
def load_values(inputs: Inputs, staged: Staged, barriers: Barriers, place, at, C: gl.constexpr):
    full, empty = barriers.value_full, barriers.value_empty
    load_tile(inputs.value, inputs.value2, staged.value, staged.value2, full, empty, place, at, value_barrier(C), C)


@gluon.jit
def load_queries(inputs: Inputs, staged: Staged, barriers: Barriers, r, tile, C: gl.constexpr):
    # The query tile of round r, the rows of one consumer after the other.
    NC: gl.constexpr = C.consumers
    stage = r % C.query_stages
    query, query2 = inputs.query, inputs.query2
    mbarrier.wait(barriers.query_empty.index(stage), ((r // C.query_stages) & 1) ^ 1)
    full = barriers.query_full.index(stage)
    mbarrier.expect(full, NC * (query.block_type.nbytes + (query2.block_type.nbytes if C.dim_qk2 else 0)))
    for c in gl.static_range(NC):
        row = tile.first_query + tile.row + c * C.rows
        place = stage * NC + c
        tma.async_copy_global_to_shared(query, [tile.batch, tile.head, row, 0], full, staged.query.index(place))
        if C.dim_qk2:
            at = [tile.batch, tile.head, row, C.dim_qk]
            tma.async_copy_global_to_shared(query2, at, full, staged.query2.index(place))


@gluon.jit
def producer(inputs: Inputs, staged: Staged, barriers: Barriers, work: Work, C: gl.constexpr):
    NB: gl.constexpr = C.barriers
    VB: gl.constexpr = value_barrier(C)
    ROWS: gl.constexpr = C.rows * C.consumers
    loaded = 0
    total = tiles_in(work, C)
    for r in range(rounds_of(total)):
        tile = tile_at(r, total, work, C)
        first, last = key_tiles(tile.row, ROWS, tile, work, C)
        load_queries(inputs, staged, barriers, r, tile, C)
        count = last - first
        for i in range(count):
            row = tile.first_key + (last - 1 - i) * C.keys
            place = key_place(loaded, i, C)
            load_keys(inputs, staged, barriers, place, (tile.batch, tile.head // C.group, row), C)
            if C.shared_ring:
                if i > 0:
                    place = value_place(loaded, i - 1, count, C)
                    load_values(inputs, staged, barriers, place, (tile.batch, tile.head // C.group, row + C.keys), C)
            else:
                load_values(inputs, staged, barriers, loaded + i, (tile.batch, tile.head // C.group, row), C)
        if C.shared_ring:
            place = value_place(loaded, count - 1, count, C)
            at = (tile.batch, tile.head // C.group, tile.first_key + first * C.keys)
            load_values(inputs, staged, barriers, place, at, C)
        loaded += count
    if C.named:  # leave no arrival pending
        for j in range(gl.maximum(loaded - NB, 0), loaded):
            bar_sync(gl.to_tensor(KEY_BARRIER) + j % NB, gl.to_tensor(128 * (C.consumers + 1)))
            bar_sync(gl.to_tensor(VB) + j % NB, gl.to_tensor(128 * (C.consumers + 1)))
