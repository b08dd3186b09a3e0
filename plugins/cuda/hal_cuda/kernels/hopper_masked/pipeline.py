# ruff: noqa: N803
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
"""Which tiles of keys a tile of rows reads, and the warpgroup of the masked Hopper kernel that loads them."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

from ..hopper.config import Barriers, Work
from ..hopper.pipeline import KEY_BARRIER, bar_sync, bar_sync_if, key_tiles, rounds_of, tile_at, value_barrier
from .config import Inputs, Lists, Row, Staged


@gluon.jit
def row_of(tile, work: Work, lists: Lists, C: gl.constexpr):
    # The list of a tile of rows. One without keys reads the block behind the last, of which every key is hidden.
    ROWS: gl.constexpr = C.rows * C.consumers
    if C.per_block > 0:
        block = tile.row // ROWS // lists.tiles
        batch, head = tile.batch.to(gl.int64), tile.head.to(gl.int64)
        at = lists.indices + (batch * lists.index_b + head * lists.index_h + block.to(gl.int64) * lists.index_m)
        listed = gl.load(lists.counts + (batch * lists.count_b + head * lists.count_h + block))
        return Row(at, gl.maximum(listed * C.per_block, 1), listed)
    else:
        first, last = key_tiles(tile.row, ROWS, tile, work, C)
        return Row(first, last - first, last)


@gluon.jit
def key_tile(row: Row, i, lists: Lists, C: gl.constexpr):
    # The number of the tile of step i. A wrong plan reads zeros, no foreign memory.
    if C.per_block > 0:
        block = gl.load(row.at + i // C.per_block, mask=row.last > 0, other=0)
        block = gl.where(row.last > 0, gl.minimum(gl.maximum(block, 0), lists.blocks), lists.blocks)
        return block * C.per_block + i % C.per_block
    else:
        return row.last - 1 - i


@gluon.jit
def load_keys(
    inputs: Inputs, staged: Staged, barriers: Barriers, place, batch, head, row0, key0, lists: Lists, C: gl.constexpr
):
    # A tile of keys and the mask of all rows for them, into the stage that the tile C.stages places before has left.
    NC: gl.constexpr = C.consumers
    stage = place % C.stages
    if C.named:
        all_threads = gl.to_tensor(128 * (NC + 1))
        bar_sync_if(gl.to_tensor(KEY_BARRIER) + stage, all_threads, (place >= C.stages).to(gl.int32))
    else:
        mbarrier.wait(barriers.key_empty.index(stage), (place // C.stages + 1) & 1, pred=place >= C.stages)
    full = barriers.key_full.index(stage)
    if C.tiled:
        mbarrier.expect(full, inputs.key.block_type.nbytes + NC * inputs.mask.block_type.nbytes)
        for c in gl.static_range(NC):
            at = [batch * lists.mask_b, head * lists.mask_h, row0 + c * C.rows, key0]
            tma.async_copy_global_to_shared(inputs.mask, at, full, staged.mask.index(stage * NC + c))
    else:
        mbarrier.expect(full, inputs.key.block_type.nbytes)
    tma.async_copy_global_to_shared(inputs.key, [batch, head // C.group, key0, 0], full, staged.key.index(stage))


@gluon.jit
def load_values(inputs: Inputs, staged: Staged, barriers: Barriers, place, batch, head, key0, C: gl.constexpr):
    stage = place % C.stages
    if C.named:
        all_threads = gl.to_tensor(128 * (C.consumers + 1))
        bar_sync_if(gl.to_tensor(value_barrier(C)) + stage, all_threads, (place >= C.stages).to(gl.int32))
    else:
        mbarrier.wait(barriers.value_empty.index(stage), (place // C.stages + 1) & 1, pred=place >= C.stages)
    full = barriers.value_full.index(stage)
    mbarrier.expect(full, inputs.value.block_type.nbytes)
    tma.async_copy_global_to_shared(inputs.value, [batch, head // C.group, key0, 0], full, staged.value.index(stage))


@gluon.jit
def load_queries(inputs: Inputs, staged: Staged, barriers: Barriers, r, tile, C: gl.constexpr):
    # The query tile of round r, the rows of one consumer after the other.
    NC: gl.constexpr = C.consumers
    stage = r % C.query_stages
    mbarrier.wait(barriers.query_empty.index(stage), ((r // C.query_stages) & 1) ^ 1)
    full = barriers.query_full.index(stage)
    mbarrier.expect(full, NC * inputs.query.block_type.nbytes)
    for c in gl.static_range(NC):
        at = [tile.batch, tile.head, tile.row + c * C.rows, 0]
        tma.async_copy_global_to_shared(inputs.query, at, full, staged.query.index(stage * NC + c))


@gluon.jit
def producer(inputs: Inputs, staged: Staged, barriers: Barriers, work: Work, lists: Lists, C: gl.constexpr):
    ST: gl.constexpr = C.stages
    loaded = 0
    for r in range(rounds_of(work.total)):
        tile = tile_at(r, work.total, work, C)
        row = row_of(tile, work, lists, C)
        load_queries(inputs, staged, barriers, r, tile, C)
        for i in range(row.count):
            key0 = key_tile(row, i, lists, C) * C.keys
            load_keys(inputs, staged, barriers, loaded + i, tile.batch, tile.head, tile.row, key0, lists, C)
            load_values(inputs, staged, barriers, loaded + i, tile.batch, tile.head, key0, C)
        loaded += row.count
    if C.named:  # leave no arrival pending
        for j in range(gl.maximum(loaded - ST, 0), loaded):
            bar_sync(gl.to_tensor(KEY_BARRIER) + j % ST, gl.to_tensor(128 * (C.consumers + 1)))
            bar_sync(gl.to_tensor(value_barrier(C)) + j % ST, gl.to_tensor(128 * (C.consumers + 1)))
