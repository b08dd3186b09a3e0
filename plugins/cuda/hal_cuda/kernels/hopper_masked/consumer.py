# ruff: noqa: N803, E741
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
"""A warpgroup of the masked Hopper kernel that computes: 64 query rows against the tiles of keys that they read.

The softmax of a tile of keys runs beside the product P V of the tile before, as in the kernel without masks. Positions
(diagonals, the last key) are looked at only in tiles that they cut, a mask in every tile.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait

from ..hopper.config import Barriers, Scaling, Work
from ..hopper.layouts import accumulator, left_side, row_sums
from ..hopper.pipeline import (
    KEY_BARRIER,
    bar_arrive,
    pass_turn,
    release,
    rounds_of,
    take_turn,
    tile_at,
    turn_barrier,
    value_barrier,
)
from ..hopper.result import LN2, finish
from ..hopper.softmax import (
    HIDDEN,
    capped,
    hide,
    largest,
    level,
    narrow,
    operand,
    rescaled,
    scaled,
    sums,
    totals,
)
from ..hopper.step import scores
from .config import Lists, Output, Staged, State
from .pipeline import key_tile, row_of

# Least row maximum in base-2 units: far above a hidden score times any scale, so hidden weights are exactly 0.
LEAST = gl.constexpr(-1.0e20)
# The same under an additive mask, whose lowest finite number is no hidden score: hidden ones are -inf.
LOWEST = gl.constexpr(-3.4028234663852886e38)
LOG2E = gl.constexpr(1.4426950408889634)


@gluon.jit
def mask_of_keys(t, tile, lists: Lists, SL: gl.constexpr, C: gl.constexpr):
    # A mask that says the same to all rows, of the keys of tile t.
    BN: gl.constexpr = C.keys
    columns = t * BN + gl.arange(0, BN, gl.SliceLayout(0, SL))
    at = lists.mask + (tile.batch.to(gl.int64) * lists.mask_b + tile.head.to(gl.int64) * lists.mask_h)
    return gl.expand_dims(gl.load(at + columns, mask=columns < tile.len_k, other=0), 0)


@gluon.jit
def shown(s, given, t, row0, tile, work: Work, scaling: Scaling, SL: gl.constexpr, EDGE: gl.constexpr, C: gl.constexpr):
    # Scores under the mask `given`, and with EDGE without what lies beyond the diagonals or behind the last key; with
    # an additive mask in natural units, else still to be scaled.
    BM: gl.constexpr = C.rows
    BN: gl.constexpr = C.keys
    s = capped(s, scaling, C)
    if C.mask == 2:
        s = s * scaling.scale + given.to(gl.float32)
    if C.mask == 1:
        s = gl.where(given != 0, s, HIDDEN)
    if EDGE:
        if C.mask == 2:  # in two halves, so that HIDDEN of `hide` is told from the mask's lowest finite number
            one = hide(gl.zeros([BM, BN], gl.float32, SL), t, row0, tile, work, SL, C.left, C.right, C.ragged)
            s = gl.where(one < 0.0, float("-inf"), s)
        else:
            s = hide(s, t, row0, tile, work, SL, C.left, C.right, C.ragged)
    return s


@gluon.jit
def weights(s, mn, scaling: Scaling, C: gl.constexpr):
    # exp of scores less their row's level.
    if C.mask == 2:  # the difference first: the lowest finite number of a mask times log2(e) would be -inf
        return gl.exp2((s - gl.expand_dims(mn, 1)) * LOG2E)
    else:
        return gl.exp2(s * scaling.scale - gl.expand_dims(mn, 1))


@gluon.jit
def maxima(s, scaling: Scaling, RL: gl.constexpr, C: gl.constexpr):
    BM: gl.constexpr = C.rows
    BN: gl.constexpr = C.keys
    m = largest(s, BM, BN, RL, C.keys > 64)
    if C.mask != 2:
        m = m * scaling.scale
    return m


@gluon.jit
def mask_tile(staged: Staged, stage, c: gl.constexpr, SL: gl.constexpr, C: gl.constexpr):
    # This warpgroup's rows of the mask that came with the keys.
    BM: gl.constexpr = C.rows
    BN: gl.constexpr = C.keys
    return staged.mask.index(stage * C.consumers + c).reshape([BM, BN]).load(SL)


@gluon.jit
def first_step(
    q,
    q2,
    staged: Staged,
    barriers: Barriers,
    kj,
    t,
    row0,
    tile,
    work: Work,
    lists: Lists,
    scaling: Scaling,
    c: gl.constexpr,
    C: gl.constexpr,
):
    # Q K^T of the first tile of keys and its softmax.
    BM: gl.constexpr = C.rows
    BN: gl.constexpr = C.keys
    DV: gl.constexpr = C.dim_v
    ST: gl.constexpr = C.stages
    WIDE: gl.constexpr = C.keys > 64
    SL: gl.constexpr = accumulator(C.keys)
    OL: gl.constexpr = accumulator(C.dim_v)
    RL: gl.constexpr = gl.SliceLayout(1, SL)
    stage = kj % ST
    mbarrier.wait(barriers.key_full.index(stage), (kj // ST) & 1)
    take_turn(c, C)
    k = staged.key.index(stage).reshape([BN, C.dim_qk])
    s = scores(q, q2, k, k, gl.zeros([BM, BN], gl.float32, SL), C)
    pass_turn(c, C)
    s = warpgroup_mma_wait(0, deps=[s])
    given = 0
    if C.of_keys:
        given = mask_of_keys(t, tile, lists, SL, C)
    if C.tiled:
        given = mask_tile(staged, stage, c, SL, C)
    s = shown(s, given, t, row0, tile, work, scaling, SL, C.edges, C)
    release(barriers.key_empty, stage, KEY_BARRIER, C)
    m = gl.maximum(maxima(s, scaling, RL, C), LOWEST if C.mask == 2 else LEAST)  # finite without keys too
    p = weights(s, m, scaling, C)
    l = sums(p, BM, BN, row_sums(C.keys), WIDE)
    w = narrow(p, BM, BN, staged.value.dtype, left_side(OL), WIDE)
    return State(gl.zeros([BM, DV], gl.float32, OL), m, l, w)


@gluon.jit
def step(
    q,
    q2,
    staged: Staged,
    barriers: Barriers,
    kj,
    t,
    row0,
    tile,
    state: State,
    work: Work,
    lists: Lists,
    scaling: Scaling,
    c: gl.constexpr,
    EDGE: gl.constexpr,
    C: gl.constexpr,
):
    # Q K^T of the keys at place kj (tile t) beside P V of the tile before them, then the softmax of the first. EDGE: a
    # diagonal or the last key may cut the tile.
    BM: gl.constexpr = C.rows
    BN: gl.constexpr = C.keys
    DV: gl.constexpr = C.dim_v
    ST: gl.constexpr = C.stages
    WIDE: gl.constexpr = C.keys > 64
    SL: gl.constexpr = accumulator(C.keys)
    OL: gl.constexpr = accumulator(C.dim_v)
    PL: gl.constexpr = left_side(OL)
    LL: gl.constexpr = row_sums(C.keys)
    RL: gl.constexpr = gl.SliceLayout(1, SL)
    kind: gl.constexpr = staged.value.dtype
    o, m, l, w = state
    stage = kj % ST
    vj = kj - 1
    mbarrier.wait(barriers.key_full.index(stage), (kj // ST) & 1)
    take_turn(c, C)
    k = staged.key.index(stage).reshape([BN, C.dim_qk])
    s = scores(q, q2, k, k, gl.zeros([BM, BN], gl.float32, SL), C)
    mbarrier.wait(barriers.value_full.index(vj % ST), (vj // ST) & 1)
    p16 = operand(w, BM, BN, kind, PL, WIDE)
    ot = warpgroup_mma(p16, staged.value.index(vj % ST).reshape([BN, DV]), o, is_async=True)
    pass_turn(c, C)
    given = 0
    if C.of_keys:
        given = mask_of_keys(t, tile, lists, SL, C)
    s = warpgroup_mma_wait(1, deps=[s])
    if C.tiled:
        given = mask_tile(staged, stage, c, SL, C)
    s = shown(s, given, t, row0, tile, work, scaling, SL, EDGE, C)
    release(barriers.key_empty, stage, KEY_BARRIER, C)
    mn = level(m, maxima(s, scaling, RL, C), C.lazy)
    alpha = gl.exp2((m - mn) * (LOG2E if C.mask == 2 else 1.0))
    p = weights(s, mn, scaling, C)
    l = scaled(l, alpha, LL, WIDE) + sums(p, BM, BN, LL, WIDE)
    o, p16 = warpgroup_mma_wait(0, deps=[ot, p16])
    release(barriers.value_empty, vj % ST, value_barrier(C), C)
    o = rescaled(o, alpha, BM, DV, OL, C.lazy)
    return State(o, mn, l, narrow(p, BM, BN, kind, PL, WIDE))


@gluon.jit
def cut(t, row0, tile, work: Work, C: gl.constexpr):
    # Whether a diagonal or the last key cuts tile t for the rows from row0 on.
    key0 = t * C.keys
    found = key0 > key0
    if C.ragged:
        found = key0 + C.keys > tile.len_k
    if C.right:
        found = found | (key0 + C.keys - 1 > row0 + tile.shift + work.right)
    if C.left:
        found = found | (key0 < row0 + C.rows - 1 + tile.shift - work.left)
    return found


@gluon.jit
def put_lse(output: Output, m, l, row0, tile, work: Work, C: gl.constexpr):
    # The log-sum-exp of rows whose maxima are in natural units.
    BM: gl.constexpr = C.rows
    rows = row0 + gl.arange(0, BM, gl.SliceLayout(1, accumulator(C.keys)))
    place = (tile.batch * work.heads + tile.head).to(gl.int64) * work.len_q
    value = gl.where(l > 0.0, m + gl.log2(l) * LN2, float("-inf"))
    gl.store(output.lse + place + rows, value, mask=rows < tile.len_q)


@gluon.jit
def consumer(
    output: Output,
    staged: Staged,
    barriers: Barriers,
    work: Work,
    lists: Lists,
    scaling: Scaling,
    c: gl.constexpr,
    C: gl.constexpr,
):
    BM: gl.constexpr = C.rows
    BN: gl.constexpr = C.keys
    DV: gl.constexpr = C.dim_v
    ST: gl.constexpr = C.stages
    HALF: gl.constexpr = C.dim_qk // 2
    SL: gl.constexpr = accumulator(C.keys)
    OL: gl.constexpr = accumulator(C.dim_v)
    WIDE: gl.constexpr = C.keys > 64
    loaded = 0
    if C.turns and c == C.consumers - 1:  # warpgroup 0 has the first turn
        bar_arrive(gl.to_tensor(turn_barrier(C)), gl.to_tensor(256))
    for r in range(rounds_of(work.total)):
        tile = tile_at(r, work.total, work, C)
        row = row_of(tile, work, lists, C)
        row0 = tile.row + c * C.rows
        stage = r % C.query_stages
        mbarrier.wait(barriers.query_full.index(stage), (r // C.query_stages) & 1)
        q = staged.query.index(stage * C.consumers + c).reshape([BM, C.dim_qk])
        q2 = q
        if C.held:
            q2 = q.slice(0, HALF, dim=1).load(left_side(SL))
            q = q.slice(HALF, HALF, dim=1)
        t = key_tile(row, 0, lists, C)
        state = first_step(q, q2, staged, barriers, loaded, t, row0, tile, work, lists, scaling, c, C)
        for i in range(1, row.count):
            t = key_tile(row, i, lists, C)
            kj = loaded + i
            if C.edges:
                if cut(t, row0, tile, work, C):
                    state = step(q, q2, staged, barriers, kj, t, row0, tile, state, work, lists, scaling, c, True, C)
                else:
                    state = step(q, q2, staged, barriers, kj, t, row0, tile, state, work, lists, scaling, c, False, C)
            else:
                state = step(q, q2, staged, barriers, kj, t, row0, tile, state, work, lists, scaling, c, False, C)
        o, m, l, w = state
        if C.own_output:  # Q may be overwritten: the loads of the next tile but one start now
            mbarrier.arrive(barriers.query_empty.index(stage), count=1)
        vj = loaded + row.count - 1
        mbarrier.wait(barriers.value_full.index(vj % ST), (vj // ST) & 1)
        p16 = operand(w, BM, BN, staged.query.dtype, left_side(OL), WIDE)
        ot = warpgroup_mma(p16, staged.value.index(vj % ST).reshape([BN, DV]), o, is_async=True)
        o, p16 = warpgroup_mma_wait(0, deps=[ot, p16])
        release(barriers.value_empty, vj % ST, value_barrier(C), C)
        loaded += row.count
        l = totals(l, gl.SliceLayout(1, SL), WIDE)
        if C.natural_lse:
            put_lse(output, m, l, row0, tile, work, C)
        finish(output, staged, barriers.query_empty, o, o, m, l, stage, row0, tile, work, c, C)
    tma.store_wait(0)
    if c == 0:
        take_turn(c, C)  # leave no arrival pending
