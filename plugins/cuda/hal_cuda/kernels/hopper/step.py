# ruff: noqa: N803, E741, SIM108
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
"""One step of a consumer warpgroup: the product Q K^T of a tile of keys beside the product P V of the tile before."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma, warpgroup_mma_wait

from .config import Barriers, Rows, Scaling, Shared, State, Work
from .layouts import accumulator, left_side, row_sums
from .pipeline import KEY_BARRIER, key_place, pass_turn, release, take_turn, value_barrier
from .softmax import capped, hide, largest, level, narrow, operand, rescaled, scaled, sums


@gluon.jit
def scores(q, q2, k, k2, z, C: gl.constexpr):
    # Q K^T, begun. With C.held q2 is the first half of Q in registers, q the second half in shared memory.
    HALF: gl.constexpr = C.dim_qk // 2
    if C.held:
        s = warpgroup_mma(q2, k.slice(0, HALF, dim=1).permute((1, 0)), z, use_acc=False, is_async=True)
        s = warpgroup_mma(q, k.slice(HALF, HALF, dim=1).permute((1, 0)), s, is_async=True)
    else:
        s = warpgroup_mma(q, k.permute((1, 0)), z, use_acc=False, is_async=True)
    if C.dim_qk2:
        s = warpgroup_mma(q2, k2.permute((1, 0)), s, is_async=True)
    return s


@gluon.jit
def step(
    q,
    q2,
    shared: Shared,
    barriers: Barriers,
    kj,
    t,
    rows: Rows,
    state: State,
    work: Work,
    scaling: Scaling,
    c: gl.constexpr,
    LEFT: gl.constexpr,
    RIGHT: gl.constexpr,
    C: gl.constexpr,
):
    # Q K^T of the keys at place kj (tile t) beside P V of the tile before them, then the softmax of the first. LEFT,
    # RIGHT: a diagonal may go through the tile.
    BM: gl.constexpr = C.rows
    BN: gl.constexpr = C.keys
    NB: gl.constexpr = C.barriers
    WIDE: gl.constexpr = C.keys > 64
    SL: gl.constexpr = accumulator(C.keys)
    OL: gl.constexpr = accumulator(C.dim_v)
    OL2: gl.constexpr = accumulator(C.dim_v2)
    PL: gl.constexpr = left_side(OL)
    LL: gl.constexpr = row_sums(C.keys)
    VB: gl.constexpr = value_barrier(C)
    kind: gl.constexpr = shared.value.dtype
    o, o2, m, l, w = state
    vj = kj + (1 if C.shared_ring else -1)
    mbarrier.wait(barriers.key_full.index(kj % NB), (kj // NB) & 1)
    take_turn(c, C)
    z = gl.zeros([BM, BN], gl.float32, SL)
    k = shared.key.index(kj % C.stages).reshape([BN, C.dim_qk])
    k2 = k
    if C.dim_qk2:
        k2 = shared.key2.index(kj % C.stages2).reshape([BN, C.dim_qk2])
    s = scores(q, q2, k, k2, z, C)
    mbarrier.wait(barriers.value_full.index(vj % NB), (vj // NB) & 1)
    p16 = operand(w, BM, BN, kind, PL, WIDE)
    ot = warpgroup_mma(p16, shared.value.index(vj % C.stages).reshape([BN, C.dim_v]), o, is_async=True)
    if C.dim_v2:
        ot2 = warpgroup_mma(p16, shared.value2.index(vj % C.stages2).reshape([BN, C.dim_v2]), o2, is_async=True)
    pass_turn(c, C)
    if C.dim_v2:
        s = warpgroup_mma_wait(2, deps=[s])
    else:
        s = warpgroup_mma_wait(1, deps=[s])
    release(barriers.key_empty, kj % NB, KEY_BARRIER, C)
    s = capped(s, scaling, C)
    if LEFT or RIGHT:
        s = hide(s, t, rows.first, rows.tile, work, SL, LEFT, RIGHT, False)
    mn = level(m, largest(s, BM, BN, gl.SliceLayout(1, SL), WIDE) * scaling.scale, C.lazy)
    alpha = gl.exp2(m - mn)
    p = gl.exp2(s * scaling.scale - gl.expand_dims(mn, 1))
    l = scaled(l, alpha, LL, WIDE) + sums(p, BM, BN, LL, WIDE)
    if C.dim_v2:
        o, o2, p16 = warpgroup_mma_wait(0, deps=[ot, ot2, p16])
        o2 = rescaled(o2, alpha, BM, C.dim_v2, OL2, C.lazy)
    else:
        o, p16 = warpgroup_mma_wait(0, deps=[ot, p16])
    release(barriers.value_empty, vj % NB, VB, C)
    o = rescaled(o, alpha, BM, C.dim_v, OL, C.lazy)
    if C.value_columns < C.dim_v:
        # Padding, zero already: said again so that no registers carry it through the loop (see narrow.py).
        o = gl.where(gl.expand_dims(gl.arange(0, C.dim_v, gl.SliceLayout(0, OL)) < C.value_columns, 0), o, 0.0)
    return State(o, o2, mn, l, narrow(p, BM, BN, kind, PL, WIDE))


@gluon.jit
def steps(
    begin,
    end,
    q,
    q2,
    shared: Shared,
    barriers: Barriers,
    rows: Rows,
    state: State,
    work: Work,
    scaling: Scaling,
    c: gl.constexpr,
    LEFT: gl.constexpr,
    RIGHT: gl.constexpr,
    C: gl.constexpr,
):
    # The steps [begin, end) of a consumer's rows.
    for i in range(begin, end):
        kj = key_place(rows.loaded, rows.skipped + i, C)
        state = step(q, q2, shared, barriers, kj, rows.end - 1 - i, rows, state, work, scaling, c, LEFT, RIGHT, C)
    return state
