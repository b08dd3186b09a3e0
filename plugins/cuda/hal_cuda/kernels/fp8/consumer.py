# ruff: noqa: N803, E741, SIM108
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
"""A warpgroup of the FP8 kernel that computes: 64 query rows, whose keys it walks from the last tile backwards."""

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
from .config import Scales, Shared, State
from .layouts import accumulator, beside, left_side, narrow, operand, row_sums
from .result import finish
from .softmax import LEAST, phase_of, reciprocal, scale_of, stage_of, weigh


@gluon.jit
def begin_values(shared, barriers, vj, w, o, C: gl.constexpr):
    # P V of the tile at place vj, begun.
    BM: gl.constexpr = C.rows
    BN: gl.constexpr = C.keys
    DV: gl.constexpr = C.dim_v
    OL: gl.constexpr = accumulator(C.dim_v)
    mbarrier.wait(barriers.value_full.index(stage_of(vj, C)), phase_of(vj, C))
    p8 = operand(w, BM, BN, left_side(OL))
    v = shared.value.index(stage_of(vj, C)).reshape([C.dim_v, BN]).permute((1, 0))
    if C.two_levels:
        z = gl.zeros([BM, DV], gl.float32, OL)
        pv = warpgroup_mma(p8, v, z, use_acc=False, is_async=True)
    else:
        pv = warpgroup_mma(p8, v, o, is_async=True)
    return pv


@gluon.jit
def added(o, pv, factor, C: gl.constexpr):
    # The result with a finished P V; with one level, o went into it.
    OL: gl.constexpr = accumulator(C.dim_v)
    if C.two_levels:
        o = o * gl.expand_dims(gl.convert_layout(factor, gl.SliceLayout(1, OL)), 1) + pv
    else:
        o = pv
    return o


@gluon.jit
def step(
    q,
    shared: Shared,
    barriers: Barriers,
    kj,
    t,
    row0,
    tile,
    state: State,
    work: Work,
    scales: Scales,
    scale,
    c: gl.constexpr,
    RIGHT: gl.constexpr,
    C: gl.constexpr,
):
    # Q K^T of the keys at place kj (tile t) beside P V of the tile before them, then the softmax of the first.
    BM: gl.constexpr = C.rows
    BN: gl.constexpr = C.keys
    WIDE: gl.constexpr = C.keys > 64
    SL: gl.constexpr = accumulator(C.keys)
    OL: gl.constexpr = accumulator(C.dim_v)
    LL: gl.constexpr = row_sums(C.keys)
    o, factor, level, l, w, key_scale, value_scale, unit = state
    scale_here = scale * key_scale
    unit_here = value_scale
    if C.blocks:
        head = tile.batch * (work.heads // C.group) + tile.head // C.group
        following = gl.maximum(t - 1, 0) * BN
        key_scale = scale_of(scales.key, head, following, scales.key_blocks, C)
        value_scale = scale_of(scales.value, head, following, scales.key_blocks, C)
    mbarrier.wait(barriers.key_full.index(stage_of(kj, C)), phase_of(kj, C))
    take_turn(c, C)
    z = gl.zeros([BM, BN], gl.float32, SL)
    k = shared.key.index(stage_of(kj, C)).reshape([BN, C.dim_qk])
    s = warpgroup_mma(q, k.permute((1, 0)), z, use_acc=False, is_async=True)
    pv = begin_values(shared, barriers, kj - 1, w, o, C)
    pass_turn(c, C)
    s = warpgroup_mma_wait(1, deps=[s])
    release(barriers.key_empty, stage_of(kj, C), KEY_BARRIER, C)
    if RIGHT:
        s = hide(s * scale_here, t, row0, tile, work, SL, False, True, False)
        scale_here = 1.0
    level, alpha, p = weigh(s, scale_here, level, C)
    l = scaled(l, alpha, LL, WIDE) + sums(p, BM, BN, LL, WIDE)
    l = beside(l, WIDE)
    pv, w = warpgroup_mma_wait(0, deps=[pv, w])
    release(barriers.value_empty, stage_of(kj - 1, C), value_barrier(C), C)
    o = added(o, pv, factor, C)
    if C.blocks:
        alpha = alpha * (unit * reciprocal(unit_here))
    if not C.two_levels:
        o = o * gl.expand_dims(gl.convert_layout(alpha, gl.SliceLayout(1, OL)), 1)
    return State(o, alpha, level, l, narrow(p, BM, BN), key_scale, value_scale, unit_here)


@gluon.jit
def steps(
    begin,
    end,
    last,
    before,
    q,
    shared: Shared,
    barriers: Barriers,
    row0,
    tile,
    state: State,
    work: Work,
    scales: Scales,
    scale,
    c: gl.constexpr,
    RIGHT: gl.constexpr,
    C: gl.constexpr,
):
    # The steps [begin, end) of a consumer's rows, whose keys end with tile `last` - 1 at place `before`.
    for i in range(begin, end):
        state = step(q, shared, barriers, before + i, last - 1 - i, row0, tile, state, work, scales, scale, c, RIGHT, C)
    return state


@gluon.jit
def first_tile(
    q,
    shared: Shared,
    barriers: Barriers,
    kj,
    t,
    row0,
    tile,
    work: Work,
    scales: Scales,
    scale,
    c: gl.constexpr,
    C: gl.constexpr,
):
    # The softmax of the first tile of keys, on the diagonal or the ragged edge.
    BM: gl.constexpr = C.rows
    BN: gl.constexpr = C.keys
    WIDE: gl.constexpr = C.keys > 64
    SL: gl.constexpr = accumulator(C.keys)
    OL: gl.constexpr = accumulator(C.dim_v)
    LL: gl.constexpr = row_sums(C.keys)
    DV: gl.constexpr = C.dim_v
    head = tile.batch * (work.heads // C.group) + tile.head // C.group
    key_scale = scale_of(scales.key, head, t * BN, scales.key_blocks, C)
    unit = scale_of(scales.value, head, t * BN, scales.key_blocks, C)
    scale_here = scale * key_scale
    value_scale = unit
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
    if C.right or C.ragged:
        s = hide(s * scale_here, t, row0, tile, work, SL, False, C.right, C.ragged)
        scale_here = 1.0
    level, alpha, p = weigh(s, scale_here, gl.full([BM], LEAST, gl.float32, gl.SliceLayout(1, SL)), C)
    o = gl.zeros([BM, DV], gl.float32, OL)
    l = sums(p, BM, BN, LL, WIDE)
    return State(o, alpha, level, l, narrow(p, BM, BN), key_scale, value_scale, unit)


@gluon.jit
def consumer(
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
    APART: gl.constexpr = C.right and (C.shifted or C.consumers * C.rows > C.keys)
    PB: gl.constexpr = turn_barrier(C)
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
        # Rows behind the last have no scale; they are not written.
        at = gl.minimum(row0, work.len_q - 1)
        q_scale = scale_of(scales.query, tile.batch * work.heads + tile.head, at, scales.query_blocks, C)
        mbarrier.wait(barriers.query_full.index(stage), (r // C.query_stages) & 1)
        q = shared.query.index(stage * C.consumers + c).reshape([BM, C.dim_qk])
        here = scale * q_scale
        state = first_tile(q, shared, barriers, before, hi - 1, row0, tile, work, scales, here, c, C)
        clear = 1  # tiles from here on have every key right of no row's reach
        if C.right and C.shifted:
            clear = gl.minimum(gl.maximum(hi - gl.maximum(row0 + tile.shift + work.right + 1, 0) // BN, 1), n)
            state = steps(1, clear, hi, before, q, shared, barriers, row0, tile, state, work, scales, here, c, True, C)
        state = steps(clear, n, hi, before, q, shared, barriers, row0, tile, state, work, scales, here, c, False, C)
        mbarrier.arrive(barriers.query_empty.index(stage), count=1)
        vj = before + n - 1
        o, factor, level, l, w, _key_scale, _value_scale, unit = state
        pv = begin_values(shared, barriers, vj, w, o, C)
        pv, w = warpgroup_mma_wait(0, deps=[pv, w])
        release(barriers.value_empty, stage_of(vj, C), value_barrier(C), C)
        o = added(o, pv, factor, C)
        loaded += last - first
        l = totals(l, gl.SliceLayout(1, accumulator(C.keys)), C.keys > 64)
        finish(od, lse, shared, o, o, level, l, unit, row0, tile, work, scales, c, C)
    tma.store_wait(0)
    if c == 0:
        take_turn(c, C)  # leave no arrival pending
