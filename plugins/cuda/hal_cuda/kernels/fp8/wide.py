# ruff: noqa: N803, E741
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
"""A warpgroup of the FP8 kernel that computes, where its registers hold the result beside a product P V or beside the
scores, not beside both: at head size 256, and at 128 with three warpgroups.

One product of a tile of keys follows the other, with C.halves the second in two halves of its columns, and warpgroups
overlap with each other alone.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait

from ..hopper.config import Barriers, Work
from ..hopper.pipeline import (
    KEY_BARRIER,
    bar_arrive,
    hand_back,
    key_tiles,
    pass_turn,
    release,
    rounds_of,
    take_turn,
    tile_at,
    tiles_in,
    turn_barrier,
    value_barrier,
)
from ..hopper.softmax import hide, scaled, sums, totals
from .config import Scales, Shared, WideState
from .layouts import accumulator, left_side, narrow, operand, row_sums
from .result import finish
from .softmax import LEAST, phase_of, reciprocal, scale_of, stage_of, weigh


@gluon.jit
def half(w, shared, vj, place: gl.constexpr, C: gl.constexpr):
    # P V of one half of the columns; w comes back as what the product has read.
    BM: gl.constexpr = C.rows
    BN: gl.constexpr = C.keys
    HALF: gl.constexpr = C.dim_v // 2 if C.halves else C.dim_v
    OL: gl.constexpr = accumulator(HALF)
    z = gl.zeros([BM, HALF], gl.float32, OL)
    p8 = operand(w, BM, BN, left_side(OL))
    v = shared.value.index(stage_of(vj, C)).reshape([C.dim_v, BN]).slice(place * HALF, HALF)
    pv = warpgroup_mma(p8, v.permute((1, 0)), z, use_acc=False, is_async=True)
    pv, w = warpgroup_mma_wait(0, deps=[pv, w])
    return pv, w


@gluon.jit
def steps_wide(
    begin,
    end,
    last,
    before,
    q,
    shared: Shared,
    barriers: Barriers,
    row0,
    tile,
    state: WideState,
    work: Work,
    scales: Scales,
    scale,
    c: gl.constexpr,
    RIGHT: gl.constexpr,
    RAGGED: gl.constexpr,
    C: gl.constexpr,
):
    # The steps [begin, end) of a consumer's rows, whose keys end with tile `last` - 1 at place `before`.
    BM: gl.constexpr = C.rows
    BN: gl.constexpr = C.keys
    HALF: gl.constexpr = C.dim_v // 2 if C.halves else C.dim_v
    WIDE: gl.constexpr = C.keys > 64
    SL: gl.constexpr = accumulator(C.keys)
    OL: gl.constexpr = accumulator(HALF)
    LL: gl.constexpr = row_sums(C.keys)
    head = tile.batch * (work.heads // C.group) + tile.head // C.group
    for i in range(begin, end):
        o, o2, level, l, key_scale, value_scale, unit = state
        kj = before + i
        t = last - 1 - i
        scale_here = scale * key_scale
        unit_here = value_scale
        if C.blocks:
            following = gl.maximum(t - 1, 0) * BN
            key_scale = scale_of(scales.key, head, following, scales.key_blocks, C)
            value_scale = scale_of(scales.value, head, following, scales.key_blocks, C)
        mbarrier.wait(barriers.key_full.index(stage_of(kj, C)), phase_of(kj, C))
        take_turn(c, C)
        z = gl.zeros([BM, BN], gl.float32, SL)
        k = shared.key.index(stage_of(kj, C)).reshape([BN, C.dim_qk])
        s = warpgroup_mma(q, k.permute((1, 0)), z, use_acc=False, is_async=True)
        pass_turn(c, C)
        s = warpgroup_mma_wait(0, deps=[s])
        release(barriers.key_empty, stage_of(kj, C), KEY_BARRIER, C)
        if RIGHT or RAGGED:
            s = hide(s * scale_here, t, row0, tile, work, SL, False, RIGHT, RAGGED)
            scale_here = 1.0
        level, factor, p = weigh(s, scale_here, level, C)
        l = scaled(l, factor, LL, WIDE) + sums(p, BM, BN, LL, WIDE)
        w = narrow(p, BM, BN)
        if C.blocks:
            factor = factor * (unit * reciprocal(unit_here))
        factor = gl.expand_dims(gl.convert_layout(factor, gl.SliceLayout(1, OL)), 1)
        mbarrier.wait(barriers.value_full.index(stage_of(kj, C)), phase_of(kj, C))
        pv, w = half(w, shared, kj, 0, C)
        o = o * factor + pv
        if C.halves:
            pv, w = half(w, shared, kj, 1, C)
            o2 = o2 * factor + pv
        else:
            o2 = o
        release(barriers.value_empty, stage_of(kj, C), value_barrier(C), C)
        state = WideState(o, o2, level, l, key_scale, value_scale, unit_here)
    return state


@gluon.jit
def consumer_wide(
    od,
    lse,
    shared: Shared,
    barriers: Barriers,
    work: Work,
    scales: Scales,
    scale,
    c: gl.constexpr,
    C: gl.constexpr,
):
    BM: gl.constexpr = C.rows
    BN: gl.constexpr = C.keys
    HALF: gl.constexpr = C.dim_v // 2 if C.halves else C.dim_v
    SL: gl.constexpr = accumulator(C.keys)
    LL: gl.constexpr = row_sums(C.keys)
    OL: gl.constexpr = accumulator(HALF)
    WIDE: gl.constexpr = C.keys > 64
    PB: gl.constexpr = turn_barrier(C)
    APART: gl.constexpr = C.right and (C.shifted or C.consumers * C.rows > C.keys)
    total = tiles_in(work, C)
    loaded = 0
    if C.turns and c == C.consumers - 1:  # warpgroup 0 has the first turn
        bar_arrive(gl.to_tensor(PB), gl.to_tensor(256))
    for r in range(rounds_of(total)):
        tile = tile_at(r, total, work, C)
        row0 = tile.row + c * BM
        first, last = key_tiles(tile.row, BM * C.consumers, tile, work, C)
        hi = last
        if APART:
            _lo, hi = key_tiles(row0, BM, tile, work, C)
            hi = gl.minimum(hi, last)
            hand_back(loaded, 0, last - hi, last - first, barriers, c, C)
        before = loaded + last - hi
        n = hi - first
        stage = r % C.query_stages
        head = tile.batch * (work.heads // C.group) + tile.head // C.group
        at = gl.minimum(row0, work.len_q - 1)  # rows behind the last have no scale; they are not written
        q_scale = scale_of(scales.query, tile.batch * work.heads + tile.head, at, scales.query_blocks, C)
        key_scale = scale_of(scales.key, head, (hi - 1) * BN, scales.key_blocks, C)
        value_scale = scale_of(scales.value, head, (hi - 1) * BN, scales.key_blocks, C)
        mbarrier.wait(barriers.query_full.index(stage), (r // C.query_stages) & 1)
        q = shared.query.index(stage * C.consumers + c).reshape([BM, C.dim_qk])
        here = scale * q_scale
        o = gl.zeros([BM, HALF], gl.float32, OL)
        level = gl.full([BM], LEAST, gl.float32, gl.SliceLayout(1, SL))
        l = sums(gl.zeros([BM, BN], gl.float32, SL), BM, BN, LL, WIDE)
        state = WideState(o, o, level, l, key_scale, value_scale, value_scale)
        clear = 0  # tiles from here on have every key right of no row's reach, and none behind the last
        if C.right or C.ragged:
            clear = gl.minimum(1, n)
        if C.right and (C.shifted or BN < BM):
            clear = gl.minimum(gl.maximum(hi - gl.maximum(row0 + tile.shift + work.right + 1, 0) // BN, 1), n)
        if C.right or C.ragged:
            state = steps_wide(
                0,
                clear,
                hi,
                before,
                q,
                shared,
                barriers,
                row0,
                tile,
                state,
                work,
                scales,
                here,
                c,
                C.right,
                C.ragged,
                C,
            )
        state = steps_wide(
            clear, n, hi, before, q, shared, barriers, row0, tile, state, work, scales, here, c, False, False, C
        )
        mbarrier.arrive(barriers.query_empty.index(stage), count=1)
        loaded += last - first
        l = totals(state.total, gl.SliceLayout(1, SL), WIDE)
        finish(od, lse, shared, state.out, state.out2, state.level, l, state.unit, row0, tile, work, scales, c, C)
    tma.store_wait(0)
    if c == 0:
        take_turn(c, C)  # leave no arrival pending
