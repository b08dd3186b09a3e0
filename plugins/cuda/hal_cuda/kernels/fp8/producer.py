# ruff: noqa: N803
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
"""The warpgroup of the FP8 kernel that loads: query, key and value tiles, by the tensor memory accelerator."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

from ..hopper.config import Barriers, Work
from ..hopper.pipeline import KEY_BARRIER, bar_sync, bar_sync_if, key_tiles, rounds_of, tile_at, tiles_in, value_barrier
from .config import Shared
from .quantise import BLOCK


@gluon.jit
def load(d, at, s, full, empty, place, base: gl.constexpr, C: gl.constexpr):
    # A tile into the stage that the tile C.stages places before has left. at: its place in the tensor.
    b = place % C.stages
    if C.named:
        bar_sync_if(gl.to_tensor(base) + b, gl.to_tensor(128 * (C.consumers + 1)), (place >= C.stages).to(gl.int32))
    else:
        mbarrier.wait(empty.index(b), (place // C.stages + 1) & 1, pred=place >= C.stages)
    mbarrier.expect(full.index(b), d.block_type.nbytes)
    tma.async_copy_global_to_shared(d, at, full.index(b), s.index(b))


@gluon.jit
def producer(qd, kd, vd, shared: Shared, barriers: Barriers, work: Work, C: gl.constexpr):
    NC: gl.constexpr = C.consumers
    QS: gl.constexpr = C.query_stages
    VB: gl.constexpr = value_barrier(C)
    PARTS: gl.constexpr = BLOCK // C.keys  # tiles of keys in a block of values
    loaded = 0
    total = tiles_in(work, C)
    for r in range(rounds_of(total)):
        tile = tile_at(r, total, work, C)
        first, last = key_tiles(tile.row, C.rows * NC, tile, work, C)
        stage = r % QS
        mbarrier.wait(barriers.query_empty.index(stage), ((r // QS) & 1) ^ 1)
        full = barriers.query_full.index(stage)
        mbarrier.expect(full, NC * qd.block_type.nbytes)
        for c in gl.static_range(NC):
            at = [tile.batch, tile.head, tile.row + c * C.rows, 0]
            tma.async_copy_global_to_shared(qd, at, full, shared.query.index(stage * NC + c))
        head = tile.head // C.group
        for i in range(last - first):
            t = last - 1 - i
            at = [tile.batch, head, t * C.keys, 0]
            load(kd, at, shared.key, barriers.key_full, barriers.key_empty, loaded + i, KEY_BARRIER, C)
            at = [tile.batch, head, t // PARTS * C.dim_v, t % PARTS * C.keys]
            load(vd, at, shared.value, barriers.value_full, barriers.value_empty, loaded + i, VB, C)
        loaded += last - first
    if C.named:  # leave no arrival pending
        for j in range(gl.maximum(loaded - C.stages, 0), loaded):
            bar_sync(gl.to_tensor(KEY_BARRIER) + j % C.stages, gl.to_tensor(128 * (NC + 1)))
            bar_sync(gl.to_tensor(VB) + j % C.stages, gl.to_tensor(128 * (NC + 1)))
