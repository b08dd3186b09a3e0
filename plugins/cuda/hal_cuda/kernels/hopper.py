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
    bar_sync_if,
    hand_back,
    key_tiles,
    pass_turn,
    release,
    rounds_of,
    take_turn,
    tile_at,
    tiles_in,
)
from .softmax import capped, hide, largest, narrow, operand, scaled, sums, totals

LN2 = gl.constexpr(0.6931471805599453)
LEAST = gl.constexpr(-1.0e20)  # least row maximum: far above a hidden score times any scale, so hidden weights are exactly 0


@gluon.jit
def step(q, q2, k_s, v_s, k_s2, v_s2, kf, ke, vf, ve, j, t, o, o2, m, l, w, row0, len_k, shift, left, right, scale, cap_in,
         cap_out, c: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, DQ: gl.constexpr, DV: gl.constexpr, ST: gl.constexpr,
         NC: gl.constexpr, LEFT: gl.constexpr, RIGHT: gl.constexpr, PING: gl.constexpr, EB: gl.constexpr,
         PB: gl.constexpr, SOFTCAP: gl.constexpr, Q2: gl.constexpr, V2: gl.constexpr, SL: gl.constexpr, OL: gl.constexpr,
         OL2: gl.constexpr, PL: gl.constexpr, LL: gl.constexpr, WIDE: gl.constexpr):  # fmt: skip
    # Q K^T of tile j of the pipeline (keys t * BN on) beside P V of the tile before it, then the softmax of tile j.
    st = j % ST
    pst = (j - 1) % ST
    mbarrier.wait(kf.index(st), (j // ST) & 1)
    take_turn(c, PB, PING)
    z = gl.zeros([BM, BN], gl.float32, SL)
    s = warpgroup_mma(q, k_s.index(st).reshape([BN, DQ]).permute((1, 0)), z, use_acc=False, is_async=True)
    if Q2:
        s = warpgroup_mma(q2, k_s2.index(st).reshape([BN, Q2]).permute((1, 0)), s, is_async=True)
    mbarrier.wait(vf.index(pst), ((j - 1) // ST) & 1)
    p16 = operand(w, BM, BN, v_s.dtype, PL, WIDE)
    ot = warpgroup_mma(p16, v_s.index(pst).reshape([BN, DV]), o, is_async=True)
    if V2:
        ot2 = warpgroup_mma(p16, v_s2.index(pst).reshape([BN, V2]), o2, is_async=True)
    pass_turn(c, NC, PB, PING)
    if V2:
        s = warpgroup_mma_wait(2, deps=[s])
    else:
        s = warpgroup_mma_wait(1, deps=[s])
    release(ke, st, 8, EB, NC)
    s = capped(s, cap_in, cap_out, SOFTCAP)
    if LEFT or RIGHT:
        s = hide(s, t, row0, len_k, shift, left, right, BM, BN, SL, LEFT, RIGHT, False)
    mn = gl.maximum(m, largest(s, BM, BN, gl.SliceLayout(1, SL), WIDE) * scale)
    alpha = gl.exp2(m - mn)
    p = gl.exp2(s * scale - gl.expand_dims(mn, 1))
    l = scaled(l, alpha, LL, WIDE) + sums(p, BM, BN, LL, WIDE)
    if V2:
        o, o2, p16 = warpgroup_mma_wait(0, deps=[ot, ot2, p16])
        o2 = o2 * gl.expand_dims(gl.convert_layout(alpha, gl.SliceLayout(1, OL2)), 1)
    else:
        o, p16 = warpgroup_mma_wait(0, deps=[ot, p16])
    release(ve, pst, 8 + ST, EB, NC)
    o = o * gl.expand_dims(gl.convert_layout(alpha, gl.SliceLayout(1, OL)), 1)
    return o, o2, mn, l, narrow(p, BM, BN, v_s.dtype, PL, WIDE)


@gluon.jit
def producer(qd, kd, vd, qd2, kd2, vd2, q_s, k_s, v_s, q_s2, k_s2, v_s2, qf, qe, kf, ke, vf, ve, table, total, NT, HG, heads, len_q, len_k, shift, left, right,
             BM: gl.constexpr, BN: gl.constexpr, ST: gl.constexpr, NC: gl.constexpr, GROUP: gl.constexpr, LEFT: gl.constexpr,
             RIGHT: gl.constexpr, EB: gl.constexpr, Q2: gl.constexpr, V2: gl.constexpr, DQ: gl.constexpr,
             DV: gl.constexpr, QS: gl.constexpr, TABLE: gl.constexpr, BOTTOM: gl.constexpr):  # fmt: skip
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
        for i in range(last - first):
            st = it % ST
            ph = (it // ST) & 1
            col = k_at + (last - 1 - i) * BN
            if EB:
                bar_sync_if(gl.to_tensor(8) + st, gl.to_tensor(128 * (NC + 1)), (it >= ST).to(gl.int32))
            else:
                mbarrier.wait(ke.index(st), ph ^ 1)
            mbarrier.expect(kf.index(st), kd.block_type.nbytes + (kd2.block_type.nbytes if Q2 else 0))
            tma.async_copy_global_to_shared(kd, [batch, head // GROUP, col, 0], kf.index(st), k_s.index(st))
            if Q2:
                tma.async_copy_global_to_shared(kd2, [batch, head // GROUP, col, DQ], kf.index(st), k_s2.index(st))
            if EB:
                bar_sync_if(gl.to_tensor(8 + ST) + st, gl.to_tensor(128 * (NC + 1)), (it >= ST).to(gl.int32))
            else:
                mbarrier.wait(ve.index(st), ph ^ 1)
            mbarrier.expect(vf.index(st), vd.block_type.nbytes + (vd2.block_type.nbytes if V2 else 0))
            tma.async_copy_global_to_shared(vd, [batch, head // GROUP, col, 0], vf.index(st), v_s.index(st))
            if V2:
                tma.async_copy_global_to_shared(vd2, [batch, head // GROUP, col, DV], vf.index(st), v_s2.index(st))
            it += 1
    if EB:  # leave no arrival pending
        for j in range(gl.maximum(it - ST, 0), it):
            bar_sync(gl.to_tensor(8) + j % ST, gl.to_tensor(128 * (NC + 1)))
            bar_sync(gl.to_tensor(8 + ST) + j % ST, gl.to_tensor(128 * (NC + 1)))


@gluon.jit
def put_rows(out, o, row0, end, step, BM: gl.constexpr, D: gl.constexpr, OL: gl.constexpr):
    # Rows before the end of their sequence alone: the next sequence's follow in memory.
    rows = row0 + gl.arange(0, BM, gl.SliceLayout(1, OL))
    at = gl.expand_dims(rows.to(gl.int64) * step, 1) + gl.expand_dims(gl.arange(0, D, gl.SliceLayout(0, OL)), 0)
    gl.store(out + at, o.to(out.dtype.element_ty), mask=gl.expand_dims(rows < end, 1))


@gluon.jit
def finish(od, od2, lse, out, out_head, out_row, o_s, o_s2, o, o2, m, l, qe, qst, batch, head, row0, q_at, length, heads, all_rows,
           c: gl.constexpr, BM: gl.constexpr, DV: gl.constexpr, V2: gl.constexpr, NC: gl.constexpr, LSE: gl.constexpr,
           OSEP: gl.constexpr, TABLE: gl.constexpr, SL: gl.constexpr, OL: gl.constexpr, OL2: gl.constexpr):  # fmt: skip
    # Normalise a tile of rows and write it.
    dt: gl.constexpr = o_s.dtype
    oat = qst * NC + c
    if OSEP:
        oat = c
    alive = l > 0.0
    linv = gl.where(alive, 1.0 / l, 0.0)
    o = o * gl.expand_dims(gl.convert_layout(linv, gl.SliceLayout(1, OL)), 1)
    if V2:
        o2 = o2 * gl.expand_dims(gl.convert_layout(linv, gl.SliceLayout(1, OL2)), 1)
    whole = True
    if TABLE:
        whole = row0 + BM <= length
    if whole:
        tma.store_wait(0)  # the last tile's store has read this buffer
        o_s.index(oat).reshape([BM, DV]).store(o.to(dt))
        if V2:
            o_s2.index(oat).reshape([BM, V2]).store(o2.to(dt))
        fence_async_shared()
        tma.async_copy_shared_to_global(od, [batch, head, q_at + row0, 0], o_s.index(oat))
        if V2:
            tma.async_copy_shared_to_global(od2, [batch, head, q_at + row0, DV], o_s2.index(oat))
    if TABLE:
        if not whole:
            out += head.to(gl.int64) * out_head
            put_rows(out, o, q_at + row0, q_at + length, out_row, BM, DV, OL)
            if V2:
                put_rows(out + DV, o2, q_at + row0, q_at + length, out_row, BM, V2, OL2)
    if LSE:
        rows = row0 + gl.arange(0, BM, gl.SliceLayout(1, SL))
        place = (batch * heads + head).to(gl.int64) * all_rows + q_at
        gl.store(lse + place + rows, gl.where(alive, (m + gl.log2(l)) * LN2, float("-inf")), mask=rows < length)
    if not OSEP:
        tma.store_wait(0)
        mbarrier.arrive(qe.index(qst), count=1)


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
def consumer(od, od2, lse, out, out_head, out_row, q_s, k_s, v_s, o_s, q_s2, k_s2, v_s2, o_s2, qf, qe, kf, ke, vf, ve, table, total, NT, HG, heads, len_q, len_k, shift, left, right,
             scale, cap_in, cap_out, c: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, DQ: gl.constexpr, DV: gl.constexpr,
             ST: gl.constexpr, NC: gl.constexpr, LEFT: gl.constexpr, RIGHT: gl.constexpr, SHIFTED: gl.constexpr, HALF: gl.constexpr,
             RAG: gl.constexpr, SOFTCAP: gl.constexpr, LSE: gl.constexpr, PING: gl.constexpr,
             EB: gl.constexpr, OSEP: gl.constexpr, Q2: gl.constexpr, V2: gl.constexpr, QS: gl.constexpr,
             TABLE: gl.constexpr, BOTTOM: gl.constexpr):  # fmt: skip
    VB: gl.constexpr = 8 + ST  # named barriers: K empty at 8, V empty, then the turns
    PB: gl.constexpr = 8 + (2 * ST if EB else 0)
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
            hand_back(it, last - hi, kf, vf, ke, ve, c, ST, NC, PING, EB, PB)
            it += last - hi
        qst = r % QS
        mbarrier.wait(qf.index(qst), (r // QS) & 1)
        q = q_s.index(qst * NC + c).reshape([BM, DQ])
        q2 = q
        if Q2:
            q2 = q_s2.index(qst * NC + c).reshape([BM, Q2])
        z = gl.zeros([BM, FN], gl.float32, FL)
        o = gl.zeros([BM, DV], gl.float32, OL)
        o2 = gl.zeros([BM, V2 if V2 else 16], gl.float32, OL2)
        # the first tile: diagonal or ragged edge
        st = it % ST
        mbarrier.wait(kf.index(st), (it // ST) & 1)
        take_turn(c, PB, PING)
        s = warpgroup_mma(q, k_s.index(st).reshape([BN, DQ]).slice(0, FN).permute((1, 0)), z, use_acc=False, is_async=True)
        if Q2:
            s = warpgroup_mma(q2, k_s2.index(st).reshape([BN, Q2]).slice(0, FN).permute((1, 0)), s, is_async=True)
        pass_turn(c, NC, PB, PING)
        s = warpgroup_mma_wait(0, deps=[s])
        release(ke, st, 8, EB, NC)
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
                mbarrier.wait(vf.index(st), (it // ST) & 1)
                clear_rows(v_s.index(st), keys - (hi - 1) * BN, BN, DV)
                if V2:
                    clear_rows(v_s2.index(st), keys - (hi - 1) * BN, BN, V2)
        n = hi - lo
        clear = 1  # tiles from here on have every key right of no row's reach
        if RIGHT and SHIFTED:
            clear = gl.minimum(gl.maximum(hi - gl.maximum(row0 + diagonal + right + 1, 0) // BN, 1), n)
            for i in range(1, clear):
                o, o2, m, l, w = step(q, q2, k_s, v_s, k_s2, v_s2, kf, ke, vf, ve, it + i, hi - 1 - i, o, o2, m, l, w, row0, keys, diagonal, left,
                                    right, scale, cap_in, cap_out, c, BM, BN, DQ, DV, ST, NC, LEFT, RIGHT, PING, EB, PB,
                                    SOFTCAP, Q2, V2, SL, OL, OL2, PL, LL, WIDE)  # fmt: skip
        edge = n
        if LEFT:
            edge = gl.minimum(gl.maximum(hi - (gl.maximum(row0 + BM - 1 + diagonal - left, 0) + BN - 1) // BN, clear), n)
        for i in range(clear, edge):
            o, o2, m, l, w = step(q, q2, k_s, v_s, k_s2, v_s2, kf, ke, vf, ve, it + i, hi - 1 - i, o, o2, m, l, w, row0, keys, diagonal, left, right,
                                scale, cap_in, cap_out, c, BM, BN, DQ, DV, ST, NC, False, False, PING, EB, PB, SOFTCAP,
                                Q2, V2, SL, OL, OL2, PL, LL, WIDE)  # fmt: skip
        if LEFT:
            for i in range(edge, n):
                o, o2, m, l, w = step(q, q2, k_s, v_s, k_s2, v_s2, kf, ke, vf, ve, it + i, hi - 1 - i, o, o2, m, l, w, row0, keys, diagonal, left, right,
                                    scale, cap_in, cap_out, c, BM, BN, DQ, DV, ST, NC, LEFT, False, PING, EB, PB,
                                    SOFTCAP, Q2, V2, SL, OL, OL2, PL, LL, WIDE)  # fmt: skip
        it += n
        if OSEP:  # Q may be overwritten: the loads of the next tile but one start now
            mbarrier.arrive(qe.index(qst), count=1)
        pst = (it - 1) % ST
        mbarrier.wait(vf.index(pst), ((it - 1) // ST) & 1)
        p16 = operand(w, BM, BN, dt, PL, WIDE)
        ot = warpgroup_mma(p16, v_s.index(pst).reshape([BN, DV]), o, is_async=True)
        if V2:
            ot2 = warpgroup_mma(p16, v_s2.index(pst).reshape([BN, V2]), o2, is_async=True)
            o, o2, p16 = warpgroup_mma_wait(0, deps=[ot, ot2, p16])
        else:
            o, p16 = warpgroup_mma_wait(0, deps=[ot, p16])
        release(ve, pst, VB, EB, NC)
        if LEFT:
            hand_back(it, lo - first, kf, vf, ke, ve, c, ST, NC, PING, EB, PB)
            it += lo - first
        finish(od, od2, lse, out, out_head, out_row, o_s, o_s2, o, o2, m, totals(l, RL, WIDE), qe, qst, batch, head, row0, q_at, length, heads, len_q,
               c, BM, DV, V2, NC, LSE, OSEP, TABLE, SL, OL, OL2)  # fmt: skip
    tma.store_wait(0)
    if c == 0:
        take_turn(c, PB, PING)  # leave no arrival pending


@gluon.jit
def body(qd, kd, vd, od, qd2, kd2, vd2, od2, lse, out, out_head, out_row, table, total, NT, HG, heads, len_q, len_k, shift, left, right, scale, cap_in, cap_out,
         GROUP: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, DQ: gl.constexpr, DV: gl.constexpr, Q2: gl.constexpr,
         V2: gl.constexpr, ST: gl.constexpr, QS: gl.constexpr, NC: gl.constexpr, LEFT: gl.constexpr, RIGHT: gl.constexpr,
         SHIFTED: gl.constexpr, HALF: gl.constexpr, RAG: gl.constexpr, SOFTCAP: gl.constexpr, LSE: gl.constexpr, PING: gl.constexpr, EB: gl.constexpr,
         OSEP: gl.constexpr, TABLE: gl.constexpr, BOTTOM: gl.constexpr):  # fmt: skip
    q_s = gl.allocate_shared_memory(qd.dtype, [QS * NC, 1, 1, BM, DQ], qd.layout)
    k_s = gl.allocate_shared_memory(kd.dtype, [ST, 1, 1, BN, DQ], kd.layout)
    v_s = gl.allocate_shared_memory(vd.dtype, [ST, 1, 1, BN, DV], vd.layout)
    q_s2, k_s2, v_s2 = q_s, k_s, v_s
    if Q2:
        q_s2 = gl.allocate_shared_memory(qd.dtype, [QS * NC, 1, 1, BM, Q2], qd2.layout)
        k_s2 = gl.allocate_shared_memory(kd.dtype, [ST, 1, 1, BN, Q2], kd2.layout)
    if V2:
        v_s2 = gl.allocate_shared_memory(vd.dtype, [ST, 1, 1, BN, V2], vd2.layout)
    o_s, o_s2 = q_s, q_s2
    if OSEP:
        o_s = gl.allocate_shared_memory(od.dtype, [NC, 1, 1, BM, DV], od.layout)
        if V2:
            o_s2 = gl.allocate_shared_memory(od.dtype, [NC, 1, 1, BM, V2], od2.layout)
    qf = gl.allocate_shared_memory(gl.int64, [QS, 1], mbarrier.MBarrierLayout())
    qe = gl.allocate_shared_memory(gl.int64, [QS, 1], mbarrier.MBarrierLayout())
    kf = gl.allocate_shared_memory(gl.int64, [ST, 1], mbarrier.MBarrierLayout())
    vf = gl.allocate_shared_memory(gl.int64, [ST, 1], mbarrier.MBarrierLayout())
    ke = gl.allocate_shared_memory(gl.int64, [ST, 1], mbarrier.MBarrierLayout())
    ve = gl.allocate_shared_memory(gl.int64, [ST, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(QS):
        mbarrier.init(qf.index(i), count=1)
        mbarrier.init(qe.index(i), count=NC)
    for i in gl.static_range(ST):
        mbarrier.init(kf.index(i), count=1)
        mbarrier.init(vf.index(i), count=1)
        mbarrier.init(ke.index(i), count=NC)
        mbarrier.init(ve.index(i), count=NC)
    fence_async_shared()
    if NC == 2:
        gl.warp_specialize([
            (producer, (qd, kd, vd, qd2, kd2, vd2, q_s, k_s, v_s, q_s2, k_s2, v_s2, qf, qe, kf, ke, vf, ve, table, total, NT, HG, heads, len_q, len_k, shift, left, right, BM, BN, ST, NC, GROUP, LEFT, RIGHT, EB, Q2, V2, DQ, DV, QS, TABLE, BOTTOM)),
            (consumer, (od, od2, lse, out, out_head, out_row, q_s, k_s, v_s, o_s, q_s2, k_s2, v_s2, o_s2, qf, qe, kf, ke, vf, ve, table, total, NT, HG, heads, len_q, len_k, shift, left, right, scale, cap_in, cap_out, gl.constexpr(0), BM, BN, DQ, DV, ST, NC, LEFT, RIGHT, SHIFTED, HALF, RAG, SOFTCAP, LSE, PING, EB, OSEP, Q2, V2, QS, TABLE, BOTTOM)),
            (consumer, (od, od2, lse, out, out_head, out_row, q_s, k_s, v_s, o_s, q_s2, k_s2, v_s2, o_s2, qf, qe, kf, ke, vf, ve, table, total, NT, HG, heads, len_q, len_k, shift, left, right, scale, cap_in, cap_out, gl.constexpr(1), BM, BN, DQ, DV, ST, NC, LEFT, RIGHT, SHIFTED, HALF, RAG, SOFTCAP, LSE, PING, EB, OSEP, Q2, V2, QS, TABLE, BOTTOM)),
        ], [4, 4], [240, 240])  # fmt: skip
    else:
        gl.warp_specialize([
            (producer, (qd, kd, vd, qd2, kd2, vd2, q_s, k_s, v_s, q_s2, k_s2, v_s2, qf, qe, kf, ke, vf, ve, table, total, NT, HG, heads, len_q, len_k, shift, left, right, BM, BN, ST, NC, GROUP, LEFT, RIGHT, EB, Q2, V2, DQ, DV, QS, TABLE, BOTTOM)),
            (consumer, (od, od2, lse, out, out_head, out_row, q_s, k_s, v_s, o_s, q_s2, k_s2, v_s2, o_s2, qf, qe, kf, ke, vf, ve, table, total, NT, HG, heads, len_q, len_k, shift, left, right, scale, cap_in, cap_out, gl.constexpr(0), BM, BN, DQ, DV, ST, NC, LEFT, RIGHT, SHIFTED, HALF, RAG, SOFTCAP, LSE, PING, EB, OSEP, Q2, V2, QS, TABLE, BOTTOM)),
            (consumer, (od, od2, lse, out, out_head, out_row, q_s, k_s, v_s, o_s, q_s2, k_s2, v_s2, o_s2, qf, qe, kf, ke, vf, ve, table, total, NT, HG, heads, len_q, len_k, shift, left, right, scale, cap_in, cap_out, gl.constexpr(1), BM, BN, DQ, DV, ST, NC, LEFT, RIGHT, SHIFTED, HALF, RAG, SOFTCAP, LSE, PING, EB, OSEP, Q2, V2, QS, TABLE, BOTTOM)),
            (consumer, (od, od2, lse, out, out_head, out_row, q_s, k_s, v_s, o_s, q_s2, k_s2, v_s2, o_s2, qf, qe, kf, ke, vf, ve, table, total, NT, HG, heads, len_q, len_k, shift, left, right, scale, cap_in, cap_out, gl.constexpr(2), BM, BN, DQ, DV, ST, NC, LEFT, RIGHT, SHIFTED, HALF, RAG, SOFTCAP, LSE, PING, EB, OSEP, Q2, V2, QS, TABLE, BOTTOM)),
        ], [4, 4, 4], [160, 160, 160])  # fmt: skip


@gluon.jit
def forward(qd, kd, vd, od, lse, total, NT, HG, heads, len_q, len_k, shift, left, right, scale, cap_in, cap_out,
            GROUP: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, DQ: gl.constexpr, DV: gl.constexpr, Q2: gl.constexpr,
            V2: gl.constexpr, ST: gl.constexpr, QS: gl.constexpr, NC: gl.constexpr, LEFT: gl.constexpr, RIGHT: gl.constexpr,
            SHIFTED: gl.constexpr, HALF: gl.constexpr, RAG: gl.constexpr, SOFTCAP: gl.constexpr, LSE: gl.constexpr, PING: gl.constexpr,
            EB: gl.constexpr, OSEP: gl.constexpr):  # fmt: skip
    """Grid: one program a multiprocessor (persistent) or one a tile of NC * BM rows; heads in groups of HG for L2.

    Descriptors are [batch, heads, length, dim] with blocks [1, 1, rows, D]. lse: float32 [batch, heads, len_q]. total: tiles.
    NT: row tiles of a head. scale: of the scores, in base-2 units (1 with SOFTCAP). Row i reads keys i + shift - left to
    i + shift + right. SHIFTED: the diagonal is not on a multiple of BM, so a warpgroup meets it in more than one tile.
    HALF: it is on a multiple of BN, and no row reaches past the last key.
    ST, QS: stages of K and V, and of Q.
    """
    body(qd, kd, vd, od, qd, kd, vd, od, lse, lse, 0, 0, lse, total, NT, HG, heads, len_q, len_k, shift, left, right, scale, cap_in, cap_out,
         GROUP, BM, BN, DQ, DV, 0, 0, ST, QS, NC, LEFT, RIGHT, SHIFTED, HALF, RAG, SOFTCAP, LSE, PING, EB, OSEP, False, False)  # fmt: skip


@gluon.jit
def forward_split(qd, kd, vd, od, qd2, kd2, vd2, od2, lse, total, NT, HG, heads, len_q, len_k, shift, left, right, scale,
                  cap_in, cap_out, GROUP: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, DQ: gl.constexpr, DV: gl.constexpr,
                  Q2: gl.constexpr, V2: gl.constexpr, ST: gl.constexpr, QS: gl.constexpr, NC: gl.constexpr, LEFT: gl.constexpr,
                  RIGHT: gl.constexpr, SHIFTED: gl.constexpr, HALF: gl.constexpr, RAG: gl.constexpr, SOFTCAP: gl.constexpr, LSE: gl.constexpr,
                  PING: gl.constexpr, EB: gl.constexpr, OSEP: gl.constexpr):  # fmt: skip
    """`forward` for head sizes between powers of two: DQ + Q2 of query and key, DV + V2 of value; V2 may be 0.

    qd2 and the rest are descriptors of the same tensors with blocks of the second part.
    """
    body(qd, kd, vd, od, qd2, kd2, vd2, od2, lse, lse, 0, 0, lse, total, NT, HG, heads, len_q, len_k, shift, left, right, scale, cap_in, cap_out,
         GROUP, BM, BN, DQ, DV, Q2, V2, ST, QS, NC, LEFT, RIGHT, SHIFTED, HALF, RAG, SOFTCAP, LSE, PING, EB, OSEP, False, False)  # fmt: skip


@gluon.jit
def forward_packed(qd, kd, vd, od, lse, out, table, out_head, out_row, HG, heads, len_q, shift, left, right, scale, cap_in, cap_out,
                   GROUP: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, DQ: gl.constexpr, DV: gl.constexpr,
                   Q2: gl.constexpr, V2: gl.constexpr, ST: gl.constexpr, QS: gl.constexpr, NC: gl.constexpr, LEFT: gl.constexpr,
                   RIGHT: gl.constexpr, SHIFTED: gl.constexpr, HALF: gl.constexpr, RAG: gl.constexpr, SOFTCAP: gl.constexpr,
                   LSE: gl.constexpr, PING: gl.constexpr, EB: gl.constexpr, OSEP: gl.constexpr,
                   BOTTOM: gl.constexpr):  # fmt: skip
    """`forward` for sequences packed along the length, whose tiles are in `table` (see `tile_table`), longest first.

    Descriptors are of [1, heads, all tokens, dim]; out_head, out_row: strides of the output, of which the last rows of a
    sequence are written one by one. lse: float32 [heads, len_q]; len_q: all tokens. BOTTOM: shift counts from the diagonal
    that ends in a sequence's last row and key.
    """
    body(qd, kd, vd, od, qd, kd, vd, od, lse, out, out_head, out_row, table, 0, 0, HG, heads, len_q, 0, shift, left, right, scale, cap_in, cap_out,
         GROUP, BM, BN, DQ, DV, Q2, V2, ST, QS, NC, LEFT, RIGHT, SHIFTED, HALF, RAG, SOFTCAP, LSE, PING, EB, OSEP, True, BOTTOM)  # fmt: skip
