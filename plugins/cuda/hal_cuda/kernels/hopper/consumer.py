# ruff: noqa: N803, E741, SIM102
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
"""A warpgroup of the Hopper kernel that computes: 64 query rows, whose keys it walks from the last tile backwards."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from .config import Barriers, Output, Rows, Scaling, Shared, State, Work
from .layouts import accumulator, left_side, row_sums
from .pipeline import (
    KEY_BARRIER,
    bar_arrive,
    hand_back,
    key_place,
    key_tiles,
    pass_turn,
    release,
    rounds_of,
    take_turn,
    tile_at,
    tiles_in,
    turn_barrier,
    value_barrier,
    value_place,
)
from .result import finish
from .softmax import capped, hide, largest, narrow, operand, sums, totals
from .step import scores, steps

# Least row maximum: far above a hidden score times any scale, so hidden weights are exactly 0.
LEAST = gl.constexpr(-1.0e20)


@gluon.constexpr_function
def meets_edges_apart(C):
    # Whether a consumer's rows reach other tiles of keys than those of all consumers together.
    return C.left or (C.right and (C.shifted or C.consumers * C.rows > C.keys))


@gluon.constexpr_function
def first_keys(c, C):
    # Keys of the first tile: where the diagonal goes through the corners of tiles, the upper of two consumers reads
    # half.
    return C.rows if C.half and C.consumers * C.rows == C.keys and c == 0 else C.keys


@gluon.jit
def clear_rows(v_s, count, D: gl.constexpr, C: gl.constexpr):
    # Values behind the last key of a packed sequence: weights of 0 would not hide a NaN in them. Every warpgroup writes
    # the same, so none waits for another.
    BN: gl.constexpr = C.keys
    WL: gl.constexpr = gl.BlockedLayout([1, 8], [32 // (D // 8), D // 8], [4, 1], [1, 0])
    rows = gl.expand_dims(gl.arange(0, BN, gl.SliceLayout(1, WL)), 1)
    tile = v_s.reshape([BN, D])
    kept = tile.load(WL)
    tile.store(gl.where(rows < count, kept, gl.zeros([BN, D], v_s.dtype, WL)))
    fence_async_shared()


@gluon.jit
def first_tile(
    q,
    q2,
    shared: Shared,
    barriers: Barriers,
    rows: Rows,
    count,
    work: Work,
    scaling: Scaling,
    c: gl.constexpr,
    C: gl.constexpr,
):
    # The softmax of the first tile of keys, on the diagonal or the ragged edge.
    BM: gl.constexpr = C.rows
    BN: gl.constexpr = C.keys
    FN: gl.constexpr = first_keys(c, C)
    NB: gl.constexpr = C.barriers
    WIDE: gl.constexpr = C.keys > 64
    SL: gl.constexpr = accumulator(C.keys)
    FL: gl.constexpr = accumulator(FN)
    OL: gl.constexpr = accumulator(C.dim_v)
    OL2: gl.constexpr = accumulator(C.dim_v2)
    RL: gl.constexpr = gl.SliceLayout(1, SL)
    LL: gl.constexpr = row_sums(C.keys)
    DV: gl.constexpr = C.dim_v
    V2: gl.constexpr = C.dim_v2 if C.dim_v2 else 16
    z = gl.zeros([BM, FN], gl.float32, FL)
    o = gl.zeros([BM, DV], gl.float32, OL)
    o2 = gl.zeros([BM, V2], gl.float32, OL2)
    kj = key_place(rows.loaded, rows.skipped, C)
    mbarrier.wait(barriers.key_full.index(kj % NB), (kj // NB) & 1)
    take_turn(c, C)
    k = shared.key.index(kj % C.stages).reshape([BN, C.dim_qk]).slice(0, FN)
    k2 = k
    if C.dim_qk2:
        k2 = shared.key2.index(kj % C.stages2).reshape([BN, C.dim_qk2]).slice(0, FN)
    s = scores(q, q2, k, k2, z, C)
    pass_turn(c, C)
    s = warpgroup_mma_wait(0, deps=[s])
    release(barriers.key_empty, kj % NB, KEY_BARRIER, C)
    s = capped(s, scaling, C)
    s = hide(s, (rows.end - 1) * (BN // FN), rows.first, rows.tile, work, FL, C.left, C.right, C.ragged)
    m = gl.maximum(largest(s, BM, FN, RL, WIDE) * scaling.scale, LEAST)  # finite without keys too
    level_of_rows = gl.convert_layout(m, gl.SliceLayout(1, FL), assert_trivial=True)
    p = gl.exp2(s * scaling.scale - gl.expand_dims(level_of_rows, 1))
    l = sums(p, BM, FN, LL, WIDE)
    if FN < BN:  # the hidden half
        p = gl.permute(gl.join(p, gl.zeros([BM, FN], gl.float32, FL)), (0, 2, 1)).reshape([BM, BN])
        p = gl.convert_layout(p, SL, assert_trivial=True)
    w = narrow(p, BM, BN, shared.query.dtype, left_side(OL), WIDE)
    if C.packed:
        if rows.end * BN > rows.tile.len_k:
            vj = value_place(rows.loaded, rows.skipped, count, C)
            mbarrier.wait(barriers.value_full.index(vj % NB), (vj // NB) & 1)
            clear_rows(shared.value.index(vj % C.stages), rows.tile.len_k - (rows.end - 1) * BN, C.dim_v, C)
            if C.dim_v2:
                clear_rows(shared.value2.index(vj % C.stages2), rows.tile.len_k - (rows.end - 1) * BN, C.dim_v2, C)
    return State(o, o2, m, l, w)


@gluon.jit
def consumer(
    output: Output,
    shared: Shared,
    barriers: Barriers,
    work: Work,
    scaling: Scaling,
    c: gl.constexpr,
    C: gl.constexpr,
):
    BM: gl.constexpr = C.rows
    BN: gl.constexpr = C.keys
    NB: gl.constexpr = C.barriers
    SKIP: gl.constexpr = meets_edges_apart(C)
    HALF: gl.constexpr = C.dim_qk // 2
    SL: gl.constexpr = accumulator(C.keys)
    FL: gl.constexpr = accumulator(first_keys(c, C))
    OL: gl.constexpr = accumulator(C.dim_v)
    PB: gl.constexpr = turn_barrier(C)
    ROWS: gl.constexpr = C.rows * C.consumers
    WIDE: gl.constexpr = C.keys > 64
    total = tiles_in(work, C)
    loaded = 0
    if C.turns and c == C.consumers - 1:  # warpgroup 0 has the first turn
        bar_arrive(gl.to_tensor(PB), gl.to_tensor(256))
    for r in range(rounds_of(total)):
        tile = tile_at(r, total, work, C)
        row0 = tile.row + c * BM
        first, last = key_tiles(tile.row, ROWS, tile, work, C)
        lo = first
        hi = last
        if SKIP:
            lo, hi = key_tiles(row0, BM, tile, work, C)
            lo = gl.minimum(lo, last - 1)
            hi = gl.minimum(hi, last)
            hand_back(loaded, 0, last - hi, last - first, barriers, c, C)
        count = last - first
        skipped = last - hi
        stage = r % C.query_stages
        mbarrier.wait(barriers.query_full.index(stage), (r // C.query_stages) & 1)
        q = shared.query.index(stage * C.consumers + c).reshape([BM, C.dim_qk])
        q2 = q
        if C.dim_qk2:
            q2 = shared.query2.index(stage * C.consumers + c).reshape([BM, C.dim_qk2])
        first_q2 = q2
        if C.held:
            q2 = q.slice(0, HALF, dim=1).load(left_side(SL))
            first_q2 = gl.convert_layout(q2, left_side(FL), assert_trivial=True)
            q = q.slice(HALF, HALF, dim=1)
        rows = Rows(row0, tile, loaded, skipped, hi)
        state = first_tile(q, first_q2, shared, barriers, rows, count, work, scaling, c, C)
        n = hi - lo
        clear = 1  # tiles from here on have every key right of no row's reach
        if C.right and C.shifted:
            clear = gl.minimum(gl.maximum(hi - gl.maximum(row0 + tile.shift + work.right + 1, 0) // BN, 1), n)
            state = steps(1, clear, q, q2, shared, barriers, rows, state, work, scaling, c, C.left, C.right, C)
        edge = n
        if C.left:
            inside = (gl.maximum(row0 + BM - 1 + tile.shift - work.left, 0) + BN - 1) // BN
            edge = gl.minimum(gl.maximum(hi - inside, clear), n)
        state = steps(clear, edge, q, q2, shared, barriers, rows, state, work, scaling, c, False, False, C)
        if C.left:
            state = steps(edge, n, q, q2, shared, barriers, rows, state, work, scaling, c, C.left, False, C)
        o, o2, m, l, w = state
        if C.own_output:  # Q may be overwritten: the loads of the next tile but one start now
            mbarrier.arrive(barriers.query_empty.index(stage), count=1)
        vj = value_place(loaded, skipped + n - 1, count, C)
        mbarrier.wait(barriers.value_full.index(vj % NB), (vj // NB) & 1)
        p16 = operand(w, BM, BN, shared.query.dtype, left_side(OL), WIDE)
        ot = warpgroup_mma(p16, shared.value.index(vj % C.stages).reshape([BN, C.dim_v]), o, is_async=True)
        if C.dim_v2:
            ot2 = warpgroup_mma(p16, shared.value2.index(vj % C.stages2).reshape([BN, C.dim_v2]), o2, is_async=True)
            o, o2, p16 = warpgroup_mma_wait(0, deps=[ot, ot2, p16])
        else:
            o, p16 = warpgroup_mma_wait(0, deps=[ot, p16])
        release(barriers.value_empty, vj % NB, value_barrier(C), C)
        if C.left:
            hand_back(loaded, skipped + n, count, count, barriers, c, C)
        loaded += count if C.left else skipped + n
        l = totals(l, gl.SliceLayout(1, SL), WIDE)
        finish(output, shared, barriers.query_empty, o, o2, m, l, stage, row0, tile, work, c, C)
    tma.store_wait(0)
    if c == 0:
        take_turn(c, C)  # leave no arrival pending
