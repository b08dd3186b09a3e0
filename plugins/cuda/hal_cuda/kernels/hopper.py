# ruff: noqa: N803, E501, E741, SIM102, SIM108
"""Flash-attention forward for Hopper in Gluon: bf16 and fp16, full, causal, sliding window, softcap, any lengths, packed or not.

One producer partition feeds Q, K and V tiles by TMA; NC consumer warpgroups own BM = 64 query rows each and share the K and V
tiles. Keys are walked from the last tile backwards; tiles on an edge (diagonal, window, last key) are masked and come in loops
of their own, so the loop in the middle has no mask. The softmax of tile i runs beside the product P V of tile i - 1.

Sources: Shah et al. 2024 (FlashAttention-3) for warp specialisation and turns between warpgroups.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from .pipeline import (
    bar_arrive,
    bar_sync,
    hand_back,
    key_place,
    key_tiles,
    load_tile,
    pass_turn,
    release,
    rounds_of,
    take_turn,
    tile_at,
    tiles_in,
    value_place,
)
from .result import finish
from .softmax import capped, hide, largest, level, narrow, operand, rescaled, scaled, sums, totals

LEAST = gl.constexpr(
    -1.0e20
)  # least row maximum: far above a hidden score times any scale, so hidden weights are exactly 0


@gluon.jit
def scores(q, q2, k, k2, z, DQ: gl.constexpr, Q2: gl.constexpr, HELD: gl.constexpr):
    # Q K^T, begun. HELD: q2 is the first half of Q in registers, q the second half in shared memory.
    if HELD:
        s = warpgroup_mma(q2, k.slice(0, DQ // 2, dim=1).permute((1, 0)), z, use_acc=False, is_async=True)
        s = warpgroup_mma(q, k.slice(DQ // 2, DQ // 2, dim=1).permute((1, 0)), s, is_async=True)
    else:
        s = warpgroup_mma(q, k.permute((1, 0)), z, use_acc=False, is_async=True)
    if Q2:
        s = warpgroup_mma(q2, k2.permute((1, 0)), s, is_async=True)
    return s


@gluon.jit
def step(
    q,
    q2,
    k_s,
    v_s,
    k_s2,
    v_s2,
    kf,
    ke,
    vf,
    ve,
    kj,
    t,
    o,
    o2,
    m,
    l,
    w,
    row0,
    len_k,
    shift,
    left,
    right,
    scale,
    cap_in,
    cap_out,
    c: gl.constexpr,
    BM: gl.constexpr,
    BN: gl.constexpr,
    DQ: gl.constexpr,
    DV: gl.constexpr,
    ST: gl.constexpr,
    S2: gl.constexpr,
    NB: gl.constexpr,
    NC: gl.constexpr,
    LEFT: gl.constexpr,
    RIGHT: gl.constexpr,
    PING: gl.constexpr,
    EB: gl.constexpr,
    PB: gl.constexpr,
    SOFTCAP: gl.constexpr,
    Q2: gl.constexpr,
    V2: gl.constexpr,
    SL: gl.constexpr,
    OL: gl.constexpr,
    OL2: gl.constexpr,
    PL: gl.constexpr,
    LL: gl.constexpr,
    WIDE: gl.constexpr,
    RING: gl.constexpr,
    HELD: gl.constexpr,
    VC: gl.constexpr,
    LAZY: gl.constexpr,
):
    # Q K^T of the keys at place kj (t * BN on) beside P V of the tile before them, then the softmax of the first.
    vj = kj + (1 if RING else -1)
    mbarrier.wait(kf.index(kj % NB), (kj // NB) & 1)
    take_turn(c, PB, PING)
    z = gl.zeros([BM, BN], gl.float32, SL)
    k = k_s.index(kj % ST).reshape([BN, DQ])
    k2 = k
    if Q2:
        k2 = k_s2.index(kj % S2).reshape([BN, Q2])
    s = scores(q, q2, k, k2, z, DQ, Q2, HELD)
    mbarrier.wait(vf.index(vj % NB), (vj // NB) & 1)
    p16 = operand(w, BM, BN, v_s.dtype, PL, WIDE)
    ot = warpgroup_mma(p16, v_s.index(vj % ST).reshape([BN, DV]), o, is_async=True)
    if V2:
        ot2 = warpgroup_mma(p16, v_s2.index(vj % S2).reshape([BN, V2]), o2, is_async=True)
    pass_turn(c, NC, PB, PING)
    if V2:
        s = warpgroup_mma_wait(2, deps=[s])
    else:
        s = warpgroup_mma_wait(1, deps=[s])
    release(ke, kj % NB, 8, EB, NC)
    s = capped(s, cap_in, cap_out, SOFTCAP)
    if LEFT or RIGHT:
        s = hide(s, t, row0, len_k, shift, left, right, BM, BN, SL, LEFT, RIGHT, False)
    mn = level(m, largest(s, BM, BN, gl.SliceLayout(1, SL), WIDE) * scale, LAZY)
    alpha = gl.exp2(m - mn)
    p = gl.exp2(s * scale - gl.expand_dims(mn, 1))
    l = scaled(l, alpha, LL, WIDE) + sums(p, BM, BN, LL, WIDE)
    if V2:
        o, o2, p16 = warpgroup_mma_wait(0, deps=[ot, ot2, p16])
        o2 = rescaled(o2, alpha, BM, V2, OL2, LAZY)
    else:
        o, p16 = warpgroup_mma_wait(0, deps=[ot, p16])
    release(ve, vj % NB, 8 + NB, EB, NC)
    o = rescaled(o, alpha, BM, DV, OL, LAZY)
    if VC < DV:  # padding, zero already: said again so that no registers carry it through the loop (see narrow.py)
        o = gl.where(gl.expand_dims(gl.arange(0, DV, gl.SliceLayout(0, OL)) < VC, 0), o, 0.0)
    return o, o2, mn, l, narrow(p, BM, BN, v_s.dtype, PL, WIDE)


@gluon.jit
def producer(
    qd,
    kd,
    vd,
    qd2,
    kd2,
    vd2,
    q_s,
    k_s,
    v_s,
    q_s2,
    k_s2,
    v_s2,
    qf,
    qe,
    kf,
    ke,
    vf,
    ve,
    table,
    total,
    NT,
    HG,
    heads,
    len_q,
    len_k,
    shift,
    left,
    right,
    BM: gl.constexpr,
    BN: gl.constexpr,
    ST: gl.constexpr,
    S2: gl.constexpr,
    NB: gl.constexpr,
    NC: gl.constexpr,
    GROUP: gl.constexpr,
    LEFT: gl.constexpr,
    RIGHT: gl.constexpr,
    EB: gl.constexpr,
    Q2: gl.constexpr,
    V2: gl.constexpr,
    DQ: gl.constexpr,
    DV: gl.constexpr,
    QS: gl.constexpr,
    TABLE: gl.constexpr,
    BOTTOM: gl.constexpr,
    RING: gl.constexpr,
):
    VB: gl.constexpr = 8 + NB
    it = 0
    total = tiles_in(total, table, heads, TABLE)
    for r in range(rounds_of(total)):
        batch, head, m0, q_at, k_at, _rows, keys, diagonal = tile_at(
            r, total, table, NT, HG, heads, len_q, len_k, shift, BM * NC, TABLE, BOTTOM
        )
        first, last = key_tiles(m0, BM * NC, keys, diagonal, left, right, BN, LEFT, RIGHT)
        qst = r % QS
        mbarrier.wait(qe.index(qst), ((r // QS) & 1) ^ 1)
        mbarrier.expect(qf.index(qst), NC * (qd.block_type.nbytes + (qd2.block_type.nbytes if Q2 else 0)))
        for c in gl.static_range(NC):
            row = q_at + m0 + c * BM
            tma.async_copy_global_to_shared(qd, [batch, head, row, 0], qf.index(qst), q_s.index(qst * NC + c))
            if Q2:
                tma.async_copy_global_to_shared(qd2, [batch, head, row, DQ], qf.index(qst), q_s2.index(qst * NC + c))
        count = last - first
        for i in range(count):
            col = k_at + (last - 1 - i) * BN
            load_tile(
                kd,
                kd2,
                k_s,
                k_s2,
                kf,
                ke,
                key_place(it, i, RING),
                batch,
                head // GROUP,
                col,
                8,
                ST,
                S2,
                NB,
                NC,
                EB,
                DQ,
                Q2,
            )
            if RING:
                if i > 0:
                    load_tile(
                        vd,
                        vd2,
                        v_s,
                        v_s2,
                        vf,
                        ve,
                        value_place(it, i - 1, count, RING),
                        batch,
                        head // GROUP,
                        col + BN,
                        VB,
                        ST,
                        S2,
                        NB,
                        NC,
                        EB,
                        DV,
                        V2,
                    )
            else:
                load_tile(vd, vd2, v_s, v_s2, vf, ve, it + i, batch, head // GROUP, col, VB, ST, S2, NB, NC, EB, DV, V2)
        if RING:
            load_tile(
                vd,
                vd2,
                v_s,
                v_s2,
                vf,
                ve,
                value_place(it, count - 1, count, RING),
                batch,
                head // GROUP,
                k_at + first * BN,
                VB,
                ST,
                S2,
                NB,
                NC,
                EB,
                DV,
                V2,
            )
        it += count
    if EB:  # leave no arrival pending
        for j in range(gl.maximum(it - NB, 0), it):
            bar_sync(gl.to_tensor(8) + j % NB, gl.to_tensor(128 * (NC + 1)))
            bar_sync(gl.to_tensor(VB) + j % NB, gl.to_tensor(128 * (NC + 1)))


@gluon.jit
def clear_rows(v_s, count, BN: gl.constexpr, D: gl.constexpr):
    # Values behind the last key of a packed sequence: weights of 0 would not hide a NaN in them. Every warpgroup writes the
    # same, so none waits for another.
    WL: gl.constexpr = gl.BlockedLayout([1, 8], [32 // (D // 8), D // 8], [4, 1], [1, 0])
    rows = gl.expand_dims(gl.arange(0, BN, gl.SliceLayout(1, WL)), 1)
    tile = v_s.reshape([BN, D])
    kept = tile.load(WL)
    tile.store(gl.where(rows < count, kept, gl.zeros([BN, D], v_s.dtype, WL)))
    fence_async_shared()


@gluon.jit
def consumer(
    od,
    od2,
    lse,
    out,
    out_head,
    out_row,
    q_s,
    k_s,
    v_s,
    o_s,
    q_s2,
    k_s2,
    v_s2,
    o_s2,
    qf,
    qe,
    kf,
    ke,
    vf,
    ve,
    table,
    total,
    NT,
    HG,
    heads,
    len_q,
    len_k,
    shift,
    left,
    right,
    scale,
    cap_in,
    cap_out,
    c: gl.constexpr,
    BM: gl.constexpr,
    BN: gl.constexpr,
    DQ: gl.constexpr,
    DV: gl.constexpr,
    ST: gl.constexpr,
    S2: gl.constexpr,
    NB: gl.constexpr,
    NC: gl.constexpr,
    LEFT: gl.constexpr,
    RIGHT: gl.constexpr,
    SHIFTED: gl.constexpr,
    HALF: gl.constexpr,
    RAG: gl.constexpr,
    SOFTCAP: gl.constexpr,
    LSE: gl.constexpr,
    PING: gl.constexpr,
    EB: gl.constexpr,
    OSEP: gl.constexpr,
    Q2: gl.constexpr,
    V2: gl.constexpr,
    QS: gl.constexpr,
    TABLE: gl.constexpr,
    BOTTOM: gl.constexpr,
    RING: gl.constexpr,
    HELD: gl.constexpr,
    VC: gl.constexpr,
    LAZY: gl.constexpr,
):
    PB: gl.constexpr = 8 + (2 * NB if EB else 0)  # named barriers: K empty at 8, V empty, then the turns
    SKIP: gl.constexpr = LEFT or (RIGHT and (SHIFTED or NC * BM > BN))
    # Keys of the first tile: where the diagonal goes through the corners of tiles, the upper of two warpgroups reads half.
    FN: gl.constexpr = BM if HALF and NC * BM == BN and c == 0 else BN
    SL: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BN, 16])
    FL: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, FN, 16])
    OL: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, DV, 16])
    OL2: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, V2 if V2 else 16, 16]
    )
    PL: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=OL, k_width=2)
    RL: gl.constexpr = gl.SliceLayout(1, SL)
    WIDE: gl.constexpr = BN > 64
    PART: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 8, 16])
    LL: gl.constexpr = PART if WIDE else RL
    dt: gl.constexpr = q_s.dtype
    total = tiles_in(total, table, heads, TABLE)
    it = 0
    if PING and c == NC - 1:  # warpgroup 0 has the first turn
        bar_arrive(gl.to_tensor(PB), gl.to_tensor(256))
    for r in range(rounds_of(total)):
        batch, head, m0, q_at, _k_at, length, keys, diagonal = tile_at(
            r, total, table, NT, HG, heads, len_q, len_k, shift, BM * NC, TABLE, BOTTOM
        )
        row0 = m0 + c * BM
        first, last = key_tiles(m0, BM * NC, keys, diagonal, left, right, BN, LEFT, RIGHT)
        lo = first
        hi = last
        if SKIP:
            lo, hi = key_tiles(row0, BM, keys, diagonal, left, right, BN, LEFT, RIGHT)
            lo = gl.minimum(lo, last - 1)
            hi = gl.minimum(hi, last)
            hand_back(it, 0, last - hi, last - first, kf, vf, ke, ve, c, NB, NC, PING, EB, PB, RING)
        count = last - first
        skipped = last - hi
        qst = r % QS
        mbarrier.wait(qf.index(qst), (r // QS) & 1)
        q = q_s.index(qst * NC + c).reshape([BM, DQ])
        q2 = q
        if Q2:
            q2 = q_s2.index(qst * NC + c).reshape([BM, Q2])
        first_q2 = q2
        if HELD:
            q2 = q.slice(0, DQ // 2, dim=1).load(gl.DotOperandLayout(operand_index=0, parent=SL, k_width=2))
            first_q2 = gl.convert_layout(
                q2, gl.DotOperandLayout(operand_index=0, parent=FL, k_width=2), assert_trivial=True
            )
            q = q.slice(DQ // 2, DQ // 2, dim=1)
        z = gl.zeros([BM, FN], gl.float32, FL)
        o = gl.zeros([BM, DV], gl.float32, OL)
        o2 = gl.zeros([BM, V2 if V2 else 16], gl.float32, OL2)
        # the first tile: diagonal or ragged edge
        kj = key_place(it, skipped, RING)
        mbarrier.wait(kf.index(kj % NB), (kj // NB) & 1)
        take_turn(c, PB, PING)
        k = k_s.index(kj % ST).reshape([BN, DQ]).slice(0, FN)
        k2 = k
        if Q2:
            k2 = k_s2.index(kj % S2).reshape([BN, Q2]).slice(0, FN)
        s = scores(q, first_q2, k, k2, z, DQ, Q2, HELD)
        pass_turn(c, NC, PB, PING)
        s = warpgroup_mma_wait(0, deps=[s])
        release(ke, kj % NB, 8, EB, NC)
        s = capped(s, cap_in, cap_out, SOFTCAP)
        s = hide(s, (hi - 1) * (BN // FN), row0, keys, diagonal, left, right, BM, FN, FL, LEFT, RIGHT, RAG)
        m = gl.maximum(largest(s, BM, FN, RL, WIDE) * scale, LEAST)  # finite without keys too
        p = gl.exp2(s * scale - gl.expand_dims(gl.convert_layout(m, gl.SliceLayout(1, FL), assert_trivial=True), 1))
        l = sums(p, BM, FN, LL, WIDE)
        if FN < BN:  # the hidden half
            p = gl.permute(gl.join(p, gl.zeros([BM, FN], gl.float32, FL)), (0, 2, 1)).reshape([BM, BN])
            p = gl.convert_layout(p, SL, assert_trivial=True)
        w = narrow(p, BM, BN, dt, PL, WIDE)
        if TABLE:
            if hi * BN > keys:
                vj = value_place(it, skipped, count, RING)
                mbarrier.wait(vf.index(vj % NB), (vj // NB) & 1)
                clear_rows(v_s.index(vj % ST), keys - (hi - 1) * BN, BN, DV)
                if V2:
                    clear_rows(v_s2.index(vj % S2), keys - (hi - 1) * BN, BN, V2)
        n = hi - lo
        clear = 1  # tiles from here on have every key right of no row's reach
        if RIGHT and SHIFTED:
            clear = gl.minimum(gl.maximum(hi - gl.maximum(row0 + diagonal + right + 1, 0) // BN, 1), n)
            for i in range(1, clear):
                o, o2, m, l, w = step(
                    q,
                    q2,
                    k_s,
                    v_s,
                    k_s2,
                    v_s2,
                    kf,
                    ke,
                    vf,
                    ve,
                    key_place(it, skipped + i, RING),
                    hi - 1 - i,
                    o,
                    o2,
                    m,
                    l,
                    w,
                    row0,
                    keys,
                    diagonal,
                    left,
                    right,
                    scale,
                    cap_in,
                    cap_out,
                    c,
                    BM,
                    BN,
                    DQ,
                    DV,
                    ST,
                    S2,
                    NB,
                    NC,
                    LEFT,
                    RIGHT,
                    PING,
                    EB,
                    PB,
                    SOFTCAP,
                    Q2,
                    V2,
                    SL,
                    OL,
                    OL2,
                    PL,
                    LL,
                    WIDE,
                    RING,
                    HELD,
                    VC,
                    LAZY,
                )
        edge = n
        if LEFT:
            edge = gl.minimum(
                gl.maximum(hi - (gl.maximum(row0 + BM - 1 + diagonal - left, 0) + BN - 1) // BN, clear), n
            )
        for i in range(clear, edge):
            o, o2, m, l, w = step(
                q,
                q2,
                k_s,
                v_s,
                k_s2,
                v_s2,
                kf,
                ke,
                vf,
                ve,
                key_place(it, skipped + i, RING),
                hi - 1 - i,
                o,
                o2,
                m,
                l,
                w,
                row0,
                keys,
                diagonal,
                left,
                right,
                scale,
                cap_in,
                cap_out,
                c,
                BM,
                BN,
                DQ,
                DV,
                ST,
                S2,
                NB,
                NC,
                False,
                False,
                PING,
                EB,
                PB,
                SOFTCAP,
                Q2,
                V2,
                SL,
                OL,
                OL2,
                PL,
                LL,
                WIDE,
                RING,
                HELD,
                VC,
                LAZY,
            )
        if LEFT:
            for i in range(edge, n):
                o, o2, m, l, w = step(
                    q,
                    q2,
                    k_s,
                    v_s,
                    k_s2,
                    v_s2,
                    kf,
                    ke,
                    vf,
                    ve,
                    key_place(it, skipped + i, RING),
                    hi - 1 - i,
                    o,
                    o2,
                    m,
                    l,
                    w,
                    row0,
                    keys,
                    diagonal,
                    left,
                    right,
                    scale,
                    cap_in,
                    cap_out,
                    c,
                    BM,
                    BN,
                    DQ,
                    DV,
                    ST,
                    S2,
                    NB,
                    NC,
                    LEFT,
                    False,
                    PING,
                    EB,
                    PB,
                    SOFTCAP,
                    Q2,
                    V2,
                    SL,
                    OL,
                    OL2,
                    PL,
                    LL,
                    WIDE,
                    RING,
                    HELD,
                    VC,
                    LAZY,
                )
        if OSEP:  # Q may be overwritten: the loads of the next tile but one start now
            mbarrier.arrive(qe.index(qst), count=1)
        vj = value_place(it, skipped + n - 1, count, RING)
        mbarrier.wait(vf.index(vj % NB), (vj // NB) & 1)
        p16 = operand(w, BM, BN, dt, PL, WIDE)
        ot = warpgroup_mma(p16, v_s.index(vj % ST).reshape([BN, DV]), o, is_async=True)
        if V2:
            ot2 = warpgroup_mma(p16, v_s2.index(vj % S2).reshape([BN, V2]), o2, is_async=True)
            o, o2, p16 = warpgroup_mma_wait(0, deps=[ot, ot2, p16])
        else:
            o, p16 = warpgroup_mma_wait(0, deps=[ot, p16])
        release(ve, vj % NB, 8 + NB, EB, NC)
        if LEFT:
            hand_back(it, skipped + n, count, count, kf, vf, ke, ve, c, NB, NC, PING, EB, PB, RING)
        it += count if LEFT else skipped + n
        finish(
            od,
            od2,
            lse,
            out,
            out_head,
            out_row,
            o_s,
            o_s2,
            o,
            o2,
            m,
            totals(l, RL, WIDE),
            qe,
            qst,
            batch,
            head,
            row0,
            q_at,
            length,
            heads,
            len_q,
            c,
            BM,
            DV,
            V2,
            VC,
            NC,
            LSE,
            OSEP,
            TABLE,
            SL,
            OL,
            OL2,
        )
    tma.store_wait(0)
    if c == 0:
        take_turn(c, PB, PING)  # leave no arrival pending


@gluon.jit
def body(
    qd,
    kd,
    vd,
    od,
    qd2,
    kd2,
    vd2,
    od2,
    lse,
    out,
    out_head,
    out_row,
    table,
    total,
    NT,
    HG,
    heads,
    len_q,
    len_k,
    shift,
    left,
    right,
    scale,
    cap_in,
    cap_out,
    GROUP: gl.constexpr,
    BM: gl.constexpr,
    BN: gl.constexpr,
    DQ: gl.constexpr,
    DV: gl.constexpr,
    Q2: gl.constexpr,
    V2: gl.constexpr,
    ST: gl.constexpr,
    S2: gl.constexpr,
    RING: gl.constexpr,
    QS: gl.constexpr,
    NC: gl.constexpr,
    LEFT: gl.constexpr,
    RIGHT: gl.constexpr,
    SHIFTED: gl.constexpr,
    HALF: gl.constexpr,
    RAG: gl.constexpr,
    SOFTCAP: gl.constexpr,
    LSE: gl.constexpr,
    PING: gl.constexpr,
    EB: gl.constexpr,
    OSEP: gl.constexpr,
    HELD: gl.constexpr,
    VC: gl.constexpr,
    LAZY: gl.constexpr,
    TABLE: gl.constexpr,
    BOTTOM: gl.constexpr,
):
    NB: gl.constexpr = (
        ST if ST == S2 else ST * S2
    )  # barriers: a place's is its own until both its stages have gone round
    q_s = gl.allocate_shared_memory(qd.dtype, [QS * NC, 1, 1, BM, DQ], qd.layout)
    k_s = gl.allocate_shared_memory(kd.dtype, [ST, 1, 1, BN, DQ], kd.layout)
    v_s = k_s
    if not RING:
        v_s = gl.allocate_shared_memory(vd.dtype, [ST, 1, 1, BN, DV], vd.layout)
    q_s2, k_s2, v_s2 = q_s, k_s, v_s
    if Q2:
        q_s2 = gl.allocate_shared_memory(qd.dtype, [QS * NC, 1, 1, BM, Q2], qd2.layout)
        k_s2 = gl.allocate_shared_memory(kd.dtype, [S2, 1, 1, BN, Q2], kd2.layout)
    if RING:
        v_s2 = k_s2
    elif V2:
        v_s2 = gl.allocate_shared_memory(vd.dtype, [S2, 1, 1, BN, V2], vd2.layout)
    o_s, o_s2 = q_s, q_s2
    if OSEP:
        o_s = gl.allocate_shared_memory(od.dtype, [NC, 1, 1, BM, DV], od.layout)
        if V2:
            o_s2 = gl.allocate_shared_memory(od.dtype, [NC, 1, 1, BM, V2], od2.layout)
    qf = gl.allocate_shared_memory(gl.int64, [QS, 1], mbarrier.MBarrierLayout())
    qe = gl.allocate_shared_memory(gl.int64, [QS, 1], mbarrier.MBarrierLayout())
    kf = gl.allocate_shared_memory(gl.int64, [NB, 1], mbarrier.MBarrierLayout())
    ke = gl.allocate_shared_memory(gl.int64, [NB, 1], mbarrier.MBarrierLayout())
    vf, ve = kf, ke
    if not RING:
        vf = gl.allocate_shared_memory(gl.int64, [NB, 1], mbarrier.MBarrierLayout())
        ve = gl.allocate_shared_memory(gl.int64, [NB, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(QS):
        mbarrier.init(qf.index(i), count=1)
        mbarrier.init(qe.index(i), count=NC)
    for i in gl.static_range(NB):
        mbarrier.init(kf.index(i), count=1)
        mbarrier.init(ke.index(i), count=NC)
        if not RING:
            mbarrier.init(vf.index(i), count=1)
            mbarrier.init(ve.index(i), count=NC)
    fence_async_shared()
    if NC == 2:
        gl.warp_specialize(
            [
                (
                    producer,
                    (
                        qd,
                        kd,
                        vd,
                        qd2,
                        kd2,
                        vd2,
                        q_s,
                        k_s,
                        v_s,
                        q_s2,
                        k_s2,
                        v_s2,
                        qf,
                        qe,
                        kf,
                        ke,
                        vf,
                        ve,
                        table,
                        total,
                        NT,
                        HG,
                        heads,
                        len_q,
                        len_k,
                        shift,
                        left,
                        right,
                        BM,
                        BN,
                        ST,
                        S2,
                        NB,
                        NC,
                        GROUP,
                        LEFT,
                        RIGHT,
                        EB,
                        Q2,
                        V2,
                        DQ,
                        DV,
                        QS,
                        TABLE,
                        BOTTOM,
                        RING,
                    ),
                ),
                (
                    consumer,
                    (
                        od,
                        od2,
                        lse,
                        out,
                        out_head,
                        out_row,
                        q_s,
                        k_s,
                        v_s,
                        o_s,
                        q_s2,
                        k_s2,
                        v_s2,
                        o_s2,
                        qf,
                        qe,
                        kf,
                        ke,
                        vf,
                        ve,
                        table,
                        total,
                        NT,
                        HG,
                        heads,
                        len_q,
                        len_k,
                        shift,
                        left,
                        right,
                        scale,
                        cap_in,
                        cap_out,
                        gl.constexpr(0),
                        BM,
                        BN,
                        DQ,
                        DV,
                        ST,
                        S2,
                        NB,
                        NC,
                        LEFT,
                        RIGHT,
                        SHIFTED,
                        HALF,
                        RAG,
                        SOFTCAP,
                        LSE,
                        PING,
                        EB,
                        OSEP,
                        Q2,
                        V2,
                        QS,
                        TABLE,
                        BOTTOM,
                        RING,
                        HELD,
                        VC,
                        LAZY,
                    ),
                ),
                (
                    consumer,
                    (
                        od,
                        od2,
                        lse,
                        out,
                        out_head,
                        out_row,
                        q_s,
                        k_s,
                        v_s,
                        o_s,
                        q_s2,
                        k_s2,
                        v_s2,
                        o_s2,
                        qf,
                        qe,
                        kf,
                        ke,
                        vf,
                        ve,
                        table,
                        total,
                        NT,
                        HG,
                        heads,
                        len_q,
                        len_k,
                        shift,
                        left,
                        right,
                        scale,
                        cap_in,
                        cap_out,
                        gl.constexpr(1),
                        BM,
                        BN,
                        DQ,
                        DV,
                        ST,
                        S2,
                        NB,
                        NC,
                        LEFT,
                        RIGHT,
                        SHIFTED,
                        HALF,
                        RAG,
                        SOFTCAP,
                        LSE,
                        PING,
                        EB,
                        OSEP,
                        Q2,
                        V2,
                        QS,
                        TABLE,
                        BOTTOM,
                        RING,
                        HELD,
                        VC,
                        LAZY,
                    ),
                ),
            ],
            [4, 4],
            [240, 240],
        )
    else:
        gl.warp_specialize(
            [
                (
                    producer,
                    (
                        qd,
                        kd,
                        vd,
                        qd2,
                        kd2,
                        vd2,
                        q_s,
                        k_s,
                        v_s,
                        q_s2,
                        k_s2,
                        v_s2,
                        qf,
                        qe,
                        kf,
                        ke,
                        vf,
                        ve,
                        table,
                        total,
                        NT,
                        HG,
                        heads,
                        len_q,
                        len_k,
                        shift,
                        left,
                        right,
                        BM,
                        BN,
                        ST,
                        S2,
                        NB,
                        NC,
                        GROUP,
                        LEFT,
                        RIGHT,
                        EB,
                        Q2,
                        V2,
                        DQ,
                        DV,
                        QS,
                        TABLE,
                        BOTTOM,
                        RING,
                    ),
                ),
                (
                    consumer,
                    (
                        od,
                        od2,
                        lse,
                        out,
                        out_head,
                        out_row,
                        q_s,
                        k_s,
                        v_s,
                        o_s,
                        q_s2,
                        k_s2,
                        v_s2,
                        o_s2,
                        qf,
                        qe,
                        kf,
                        ke,
                        vf,
                        ve,
                        table,
                        total,
                        NT,
                        HG,
                        heads,
                        len_q,
                        len_k,
                        shift,
                        left,
                        right,
                        scale,
                        cap_in,
                        cap_out,
                        gl.constexpr(0),
                        BM,
                        BN,
                        DQ,
                        DV,
                        ST,
                        S2,
                        NB,
                        NC,
                        LEFT,
                        RIGHT,
                        SHIFTED,
                        HALF,
                        RAG,
                        SOFTCAP,
                        LSE,
                        PING,
                        EB,
                        OSEP,
                        Q2,
                        V2,
                        QS,
                        TABLE,
                        BOTTOM,
                        RING,
                        HELD,
                        VC,
                        LAZY,
                    ),
                ),
                (
                    consumer,
                    (
                        od,
                        od2,
                        lse,
                        out,
                        out_head,
                        out_row,
                        q_s,
                        k_s,
                        v_s,
                        o_s,
                        q_s2,
                        k_s2,
                        v_s2,
                        o_s2,
                        qf,
                        qe,
                        kf,
                        ke,
                        vf,
                        ve,
                        table,
                        total,
                        NT,
                        HG,
                        heads,
                        len_q,
                        len_k,
                        shift,
                        left,
                        right,
                        scale,
                        cap_in,
                        cap_out,
                        gl.constexpr(1),
                        BM,
                        BN,
                        DQ,
                        DV,
                        ST,
                        S2,
                        NB,
                        NC,
                        LEFT,
                        RIGHT,
                        SHIFTED,
                        HALF,
                        RAG,
                        SOFTCAP,
                        LSE,
                        PING,
                        EB,
                        OSEP,
                        Q2,
                        V2,
                        QS,
                        TABLE,
                        BOTTOM,
                        RING,
                        HELD,
                        VC,
                        LAZY,
                    ),
                ),
                (
                    consumer,
                    (
                        od,
                        od2,
                        lse,
                        out,
                        out_head,
                        out_row,
                        q_s,
                        k_s,
                        v_s,
                        o_s,
                        q_s2,
                        k_s2,
                        v_s2,
                        o_s2,
                        qf,
                        qe,
                        kf,
                        ke,
                        vf,
                        ve,
                        table,
                        total,
                        NT,
                        HG,
                        heads,
                        len_q,
                        len_k,
                        shift,
                        left,
                        right,
                        scale,
                        cap_in,
                        cap_out,
                        gl.constexpr(2),
                        BM,
                        BN,
                        DQ,
                        DV,
                        ST,
                        S2,
                        NB,
                        NC,
                        LEFT,
                        RIGHT,
                        SHIFTED,
                        HALF,
                        RAG,
                        SOFTCAP,
                        LSE,
                        PING,
                        EB,
                        OSEP,
                        Q2,
                        V2,
                        QS,
                        TABLE,
                        BOTTOM,
                        RING,
                        HELD,
                        VC,
                        LAZY,
                    ),
                ),
            ],
            [4, 4, 4],
            [160, 160, 160],
        )


@gluon.jit
def forward(
    qd,
    kd,
    vd,
    od,
    lse,
    total,
    NT,
    HG,
    heads,
    len_q,
    len_k,
    shift,
    left,
    right,
    scale,
    cap_in,
    cap_out,
    GROUP: gl.constexpr,
    BM: gl.constexpr,
    BN: gl.constexpr,
    DQ: gl.constexpr,
    DV: gl.constexpr,
    Q2: gl.constexpr,
    V2: gl.constexpr,
    ST: gl.constexpr,
    S2: gl.constexpr,
    RING: gl.constexpr,
    QS: gl.constexpr,
    NC: gl.constexpr,
    LEFT: gl.constexpr,
    RIGHT: gl.constexpr,
    SHIFTED: gl.constexpr,
    HALF: gl.constexpr,
    RAG: gl.constexpr,
    SOFTCAP: gl.constexpr,
    LSE: gl.constexpr,
    PING: gl.constexpr,
    EB: gl.constexpr,
    OSEP: gl.constexpr,
    HELD: gl.constexpr,
    VC: gl.constexpr,
    LAZY: gl.constexpr,
):
    """Grid: one program a multiprocessor (persistent) or one a tile of NC * BM rows; heads in groups of HG for L2.

    Descriptors are [batch, heads, length, dim] with blocks [1, 1, rows, D]. lse: float32 [batch, heads, len_q]. total: tiles.
    NT: row tiles of a head. scale: of the scores, in base-2 units (1 with SOFTCAP). Row i reads keys i + shift - left to
    i + shift + right. SHIFTED: the diagonal is not on a multiple of BM, so a warpgroup meets it in more than one tile.
    HALF: it is on a multiple of BN, and no row reaches past the last key.
    HELD: half of Q stays in registers, which leaves shared memory more time for K. ST, S2, QS: stages of K and V, of their
    second parts, and of Q. RING: K and V share ST and S2 stages (see `key_place`); they have the same head size, and EB is off.
    VC: columns of V; where fewer than DV, the rest is padding. LAZY: weights are counted from up to GROWTH below the row's
    maximum (see `level`).
    """
    body(
        qd,
        kd,
        vd,
        od,
        qd,
        kd,
        vd,
        od,
        lse,
        lse,
        0,
        0,
        lse,
        total,
        NT,
        HG,
        heads,
        len_q,
        len_k,
        shift,
        left,
        right,
        scale,
        cap_in,
        cap_out,
        GROUP,
        BM,
        BN,
        DQ,
        DV,
        0,
        0,
        ST,
        S2,
        RING,
        QS,
        NC,
        LEFT,
        RIGHT,
        SHIFTED,
        HALF,
        RAG,
        SOFTCAP,
        LSE,
        PING,
        EB,
        OSEP,
        HELD,
        VC,
        LAZY,
        False,
        False,
    )


@gluon.jit
def forward_split(
    qd,
    kd,
    vd,
    od,
    qd2,
    kd2,
    vd2,
    od2,
    lse,
    total,
    NT,
    HG,
    heads,
    len_q,
    len_k,
    shift,
    left,
    right,
    scale,
    cap_in,
    cap_out,
    GROUP: gl.constexpr,
    BM: gl.constexpr,
    BN: gl.constexpr,
    DQ: gl.constexpr,
    DV: gl.constexpr,
    Q2: gl.constexpr,
    V2: gl.constexpr,
    ST: gl.constexpr,
    S2: gl.constexpr,
    RING: gl.constexpr,
    QS: gl.constexpr,
    NC: gl.constexpr,
    LEFT: gl.constexpr,
    RIGHT: gl.constexpr,
    SHIFTED: gl.constexpr,
    HALF: gl.constexpr,
    RAG: gl.constexpr,
    SOFTCAP: gl.constexpr,
    LSE: gl.constexpr,
    PING: gl.constexpr,
    EB: gl.constexpr,
    OSEP: gl.constexpr,
    HELD: gl.constexpr,
    VC: gl.constexpr,
    LAZY: gl.constexpr,
):
    """`forward` for head sizes between powers of two: DQ + Q2 of query and key, DV + V2 of value; V2 may be 0.

    qd2 and the rest are descriptors of the same tensors with blocks of the second part.
    """
    body(
        qd,
        kd,
        vd,
        od,
        qd2,
        kd2,
        vd2,
        od2,
        lse,
        lse,
        0,
        0,
        lse,
        total,
        NT,
        HG,
        heads,
        len_q,
        len_k,
        shift,
        left,
        right,
        scale,
        cap_in,
        cap_out,
        GROUP,
        BM,
        BN,
        DQ,
        DV,
        Q2,
        V2,
        ST,
        S2,
        RING,
        QS,
        NC,
        LEFT,
        RIGHT,
        SHIFTED,
        HALF,
        RAG,
        SOFTCAP,
        LSE,
        PING,
        EB,
        OSEP,
        HELD,
        VC,
        LAZY,
        False,
        False,
    )


@gluon.jit
def forward_packed(
    qd,
    kd,
    vd,
    od,
    lse,
    out,
    table,
    out_head,
    out_row,
    HG,
    heads,
    len_q,
    shift,
    left,
    right,
    scale,
    cap_in,
    cap_out,
    GROUP: gl.constexpr,
    BM: gl.constexpr,
    BN: gl.constexpr,
    DQ: gl.constexpr,
    DV: gl.constexpr,
    Q2: gl.constexpr,
    V2: gl.constexpr,
    ST: gl.constexpr,
    S2: gl.constexpr,
    RING: gl.constexpr,
    QS: gl.constexpr,
    NC: gl.constexpr,
    LEFT: gl.constexpr,
    RIGHT: gl.constexpr,
    SHIFTED: gl.constexpr,
    HALF: gl.constexpr,
    RAG: gl.constexpr,
    SOFTCAP: gl.constexpr,
    LSE: gl.constexpr,
    PING: gl.constexpr,
    EB: gl.constexpr,
    OSEP: gl.constexpr,
    HELD: gl.constexpr,
    VC: gl.constexpr,
    LAZY: gl.constexpr,
    BOTTOM: gl.constexpr,
):
    """`forward` for sequences packed along the length, whose tiles are in `table` (see `tile_table`), longest first.

    Descriptors are of [1, heads, all tokens, dim]; out_head, out_row: strides of the output, of which the last rows of a
    sequence are written one by one. lse: float32 [heads, len_q]; len_q: all tokens. BOTTOM: shift counts from the diagonal
    that ends in a sequence's last row and key.
    """
    body(
        qd,
        kd,
        vd,
        od,
        qd,
        kd,
        vd,
        od,
        lse,
        out,
        out_head,
        out_row,
        table,
        0,
        0,
        HG,
        heads,
        len_q,
        0,
        shift,
        left,
        right,
        scale,
        cap_in,
        cap_out,
        GROUP,
        BM,
        BN,
        DQ,
        DV,
        Q2,
        V2,
        ST,
        S2,
        RING,
        QS,
        NC,
        LEFT,
        RIGHT,
        SHIFTED,
        HALF,
        RAG,
        SOFTCAP,
        LSE,
        PING,
        EB,
        OSEP,
        HELD,
        VC,
        LAZY,
        True,
        BOTTOM,
    )
