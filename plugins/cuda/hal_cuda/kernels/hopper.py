# ruff: noqa: N803, E501, E741, SIM108
"""Flash-attention forward for Hopper in Gluon: bf16 and fp16, full, causal, sliding window, softcap, any lengths.

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

# Named barriers 8 to 15 are free in Triton. Each asm text needs an operand and a result, so it copies one.
SYNC = gl.constexpr("bar.sync $1, $2; mov.b32 $0, $1;")
SYNC_IF = gl.constexpr("{ .reg .pred q; setp.ne.s32 q, $3, 0; @q bar.sync $1, $2; mov.b32 $0, $1; }")
ARRIVE = gl.constexpr("bar.arrive $1, $2; mov.b32 $0, $1;")
THREE, FOUR = gl.constexpr("=r,r,r"), gl.constexpr("=r,r,r,r")
LN2 = gl.constexpr(0.6931471805599453)
HIDDEN = gl.constexpr(-1.0e30)  # a hidden score: finite, because -inf - -inf is NaN under FMA contraction
LEAST = gl.constexpr(-1.0e20)  # least row maximum: far above HIDDEN times any scale, so hidden weights are exactly 0


@gluon.jit
def bar_sync(i, n):
    gl.inline_asm_elementwise(SYNC, THREE, [i, n], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def bar_sync_if(i, n, c):
    gl.inline_asm_elementwise(SYNC_IF, FOUR, [i, n, c], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def bar_arrive(i, n):
    gl.inline_asm_elementwise(ARRIVE, THREE, [i, n], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def take_turn(c: gl.constexpr, PB: gl.constexpr, PING: gl.constexpr):
    if PING:
        bar_sync(gl.to_tensor(PB + c), gl.to_tensor(256))


@gluon.jit
def pass_turn(c: gl.constexpr, NC: gl.constexpr, PB: gl.constexpr, PING: gl.constexpr):
    if PING:
        bar_arrive(gl.to_tensor(PB + (c + 1) % NC), gl.to_tensor(256))


@gluon.jit
def release(e, st, base: gl.constexpr, EB: gl.constexpr, NC: gl.constexpr):
    # A stage has been read. bar.arrive (EB) does not block; mbarrier.arrive costs a barrier of the whole partition.
    if EB:
        bar_arrive(gl.to_tensor(base) + st, gl.to_tensor(128 * (NC + 1)))
    else:
        mbarrier.arrive(e.index(st), count=1)


@gluon.jit
def rounds_of(total):
    # Persistent programs take tiles forwards in even rounds, backwards in odd ones: longest first, that balances them.
    P = gl.num_programs(0)
    pos = gl.program_id(0)
    if (total // P) % 2 == 1:
        pos = P - 1 - pos
    return total // P + (pos < total % P).to(gl.int32)


@gluon.jit
def key_tiles(row, ROWS: gl.constexpr, len_k, shift, left, right, BN: gl.constexpr, LEFT: gl.constexpr, RIGHT: gl.constexpr):
    # Tiles [first, last) of keys that rows [row, row + ROWS) may read; at least one, which masks then hide.
    end = len_k
    if RIGHT:
        end = gl.maximum(gl.minimum(row + ROWS + shift + right, len_k), 1)
    last = (end + BN - 1) // BN
    first = 0
    if LEFT:
        first = gl.minimum(gl.maximum(row + shift - left, 0) // BN, last - 1)
    return first, last


@gluon.jit
def tile_at(r, NT, HG, ROWS: gl.constexpr):
    P = gl.num_programs(0)
    pos = gl.program_id(0)
    if r % 2 == 1:
        pos = P - 1 - pos
    t = r * P + pos
    # Heads in groups of HG, so that their K and V stay in L2; in a group, the longest tiles of every head first.
    g = t // (HG * NT)
    u = t % (HG * NT)
    return g * HG + u % HG, (NT - 1 - u // HG) * ROWS


@gluon.jit
def hide(s, t, row0, len_k, shift, left, right, BM: gl.constexpr, BN: gl.constexpr, SL: gl.constexpr,
         LEFT: gl.constexpr, RIGHT: gl.constexpr, RAG: gl.constexpr):  # fmt: skip
    cols = t * BN + gl.arange(0, BN, gl.SliceLayout(0, SL))
    rows = row0 + gl.arange(0, BM, gl.SliceLayout(1, SL))
    if RIGHT:
        s = gl.where(gl.expand_dims(cols, 0) <= gl.expand_dims(rows + (shift + right), 1), s, HIDDEN)
    if LEFT:
        s = gl.where(gl.expand_dims(cols, 0) >= gl.expand_dims(rows + (shift - left), 1), s, HIDDEN)
    if RAG:
        s = s + gl.expand_dims(gl.where(cols < len_k, 0.0, HIDDEN), 0)
    return s


@gluon.jit
def capped(s, cap_in, cap_out, SOFTCAP: gl.constexpr):
    # cap_out * tanh(s * scale / cap), in base-2 units; cap_in = 2 * log2(e) * scale / cap.
    if SOFTCAP:
        s = cap_out - (2.0 * cap_out) / (gl.exp2(s * cap_in) + 1.0)
    return s


@gluon.jit
def hand_back(it, count, kf, vf, ke, ve, c: gl.constexpr, ST: gl.constexpr, NC: gl.constexpr, PING: gl.constexpr,
              EB: gl.constexpr, PB: gl.constexpr):  # fmt: skip
    # Tiles that this warpgroup does not read. It waits for them all the same: a skipped phase would let the next wait on
    # the stage pass at once, by parity.
    for i in range(0, count):
        st = (it + i) % ST
        ph = ((it + i) // ST) & 1
        mbarrier.wait(kf.index(st), ph)
        take_turn(c, PB, PING)
        pass_turn(c, NC, PB, PING)
        release(ke, st, 8, EB, NC)
        mbarrier.wait(vf.index(st), ph)
        release(ve, st, 8 + ST, EB, NC)


@gluon.jit
def producer(qd, kd, vd, qd2, kd2, vd2, q_s, k_s, v_s, q_s2, k_s2, v_s2, qf, qe, kf, ke, vf, ve, total, NT, HG, heads, len_k, shift, left, right,
             BM: gl.constexpr, BN: gl.constexpr, ST: gl.constexpr, NC: gl.constexpr, GROUP: gl.constexpr, LEFT: gl.constexpr,
             RIGHT: gl.constexpr, EB: gl.constexpr, Q2: gl.constexpr, V2: gl.constexpr, DQ: gl.constexpr,
             DV: gl.constexpr):  # fmt: skip
    it = 0
    for r in range(rounds_of(total)):
        place, m0 = tile_at(r, NT, HG, BM * NC)
        batch = place // heads
        head = place % heads
        first, last = key_tiles(m0, BM * NC, len_k, shift, left, right, BN, LEFT, RIGHT)
        mbarrier.wait(qe, (r & 1) ^ 1)
        mbarrier.expect(qf, NC * (qd.block_type.nbytes + (qd2.block_type.nbytes if Q2 else 0)))
        for c in gl.static_range(NC):
            tma.async_copy_global_to_shared(qd, [batch, head, m0 + c * BM, 0], qf, q_s.index(c))
            if Q2:
                tma.async_copy_global_to_shared(qd2, [batch, head, m0 + c * BM, DQ], qf, q_s2.index(c))
        for i in range(last - first):
            st = it % ST
            ph = (it // ST) & 1
            col = (last - 1 - i) * BN
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
def step(q, q2, k_s, v_s, k_s2, v_s2, kf, ke, vf, ve, j, t, o, o2, m, l, p16, row0, len_k, shift, left, right, scale, cap_in,
         cap_out, c: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, DQ: gl.constexpr, DV: gl.constexpr, ST: gl.constexpr,
         NC: gl.constexpr, LEFT: gl.constexpr, RIGHT: gl.constexpr, PING: gl.constexpr, EB: gl.constexpr,
         PB: gl.constexpr, SOFTCAP: gl.constexpr, Q2: gl.constexpr, V2: gl.constexpr, SL: gl.constexpr, OL: gl.constexpr,
         OL2: gl.constexpr, PL: gl.constexpr):  # fmt: skip
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
    mn = gl.maximum(m, gl.max(s, axis=1) * scale)
    alpha = gl.exp2(m - mn)
    p = gl.exp2(s * scale - gl.expand_dims(mn, 1))
    l = l * alpha + gl.sum(p, axis=1)
    if V2:
        o, o2, p16 = warpgroup_mma_wait(0, deps=[ot, ot2, p16])
        o2 = o2 * gl.expand_dims(gl.convert_layout(alpha, gl.SliceLayout(1, OL2)), 1)
    else:
        o, p16 = warpgroup_mma_wait(0, deps=[ot, p16])
    release(ve, pst, 8 + ST, EB, NC)
    o = o * gl.expand_dims(gl.convert_layout(alpha, gl.SliceLayout(1, OL)), 1)
    p16 = gl.convert_layout(p.to(p16.dtype), PL, assert_trivial=True)
    return o, o2, mn, l, p16


@gluon.jit
def consumer(od, od2, lse, q_s, k_s, v_s, o_s, q_s2, k_s2, v_s2, o_s2, qf, qe, kf, ke, vf, ve, total, NT, HG, heads, len_q, len_k, shift, left, right,
             scale, cap_in, cap_out, c: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, DQ: gl.constexpr, DV: gl.constexpr,
             ST: gl.constexpr, NC: gl.constexpr, LEFT: gl.constexpr, RIGHT: gl.constexpr, SHIFTED: gl.constexpr,
             RAG: gl.constexpr, SOFTCAP: gl.constexpr, LSE: gl.constexpr, PING: gl.constexpr,
             EB: gl.constexpr, OSEP: gl.constexpr, Q2: gl.constexpr, V2: gl.constexpr):  # fmt: skip
    VB: gl.constexpr = 8 + ST  # named barriers: K empty at 8, V empty, then the turns
    PB: gl.constexpr = 8 + (2 * ST if EB else 0)
    SL: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BN, 16])
    OL: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, DV, 16])
    OL2: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, V2 if V2 else 16, 16]
    )
    PL: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=OL, k_width=2)
    SKIP: gl.constexpr = LEFT or (RIGHT and (SHIFTED or NC * BM > BN))
    dt: gl.constexpr = q_s.dtype
    it = 0
    if PING and c == NC - 1:  # warpgroup 0 has the first turn
        bar_arrive(gl.to_tensor(PB), gl.to_tensor(256))
    for r in range(rounds_of(total)):
        place, m0 = tile_at(r, NT, HG, BM * NC)
        row0 = m0 + c * BM
        first, last = key_tiles(m0, BM * NC, len_k, shift, left, right, BN, LEFT, RIGHT)
        lo = first
        hi = last
        if SKIP:
            lo, hi = key_tiles(row0, BM, len_k, shift, left, right, BN, LEFT, RIGHT)
            lo = gl.minimum(lo, last - 1)
            hi = gl.minimum(hi, last)
        z = gl.zeros([BM, BN], gl.float32, SL)
        o = gl.zeros([BM, DV], gl.float32, OL)
        o2 = gl.zeros([BM, V2 if V2 else 16], gl.float32, OL2)
        mbarrier.wait(qf, r & 1)
        q = q_s.index(c).reshape([BM, DQ])
        q2 = q
        if Q2:
            q2 = q_s2.index(c).reshape([BM, Q2])
        if SKIP:
            hand_back(it, last - hi, kf, vf, ke, ve, c, ST, NC, PING, EB, PB)
            it += last - hi
        # the first tile: diagonal or ragged edge
        st = it % ST
        mbarrier.wait(kf.index(st), (it // ST) & 1)
        take_turn(c, PB, PING)
        s = warpgroup_mma(q, k_s.index(st).reshape([BN, DQ]).permute((1, 0)), z, use_acc=False, is_async=True)
        if Q2:
            s = warpgroup_mma(q2, k_s2.index(st).reshape([BN, Q2]).permute((1, 0)), s, is_async=True)
        pass_turn(c, NC, PB, PING)
        s = warpgroup_mma_wait(0, deps=[s])
        release(ke, st, 8, EB, NC)
        s = capped(s, cap_in, cap_out, SOFTCAP)
        s = hide(s, hi - 1, row0, len_k, shift, left, right, BM, BN, SL, LEFT, RIGHT, RAG)
        m = gl.maximum(gl.max(s, axis=1) * scale, LEAST)  # finite even for a row without keys
        p = gl.exp2(s * scale - gl.expand_dims(m, 1))
        l = gl.sum(p, axis=1)
        p16 = gl.convert_layout(p.to(dt), PL, assert_trivial=True)
        n = hi - lo
        clear = 1  # tiles from here on have every key right of no row's reach
        if RIGHT and SHIFTED:
            clear = gl.minimum(gl.maximum(hi - gl.maximum(row0 + shift + right + 1, 0) // BN, 1), n)
            for i in range(1, clear):
                o, o2, m, l, p16 = step(q, q2, k_s, v_s, k_s2, v_s2, kf, ke, vf, ve, it + i, hi - 1 - i, o, o2, m, l, p16, row0, len_k, shift, left,
                                    right, scale, cap_in, cap_out, c, BM, BN, DQ, DV, ST, NC, LEFT, RIGHT, PING, EB, PB,
                                    SOFTCAP, Q2, V2, SL, OL, OL2, PL)  # fmt: skip
        edge = n
        if LEFT:
            edge = gl.minimum(gl.maximum(hi - (gl.maximum(row0 + BM - 1 + shift - left, 0) + BN - 1) // BN, clear), n)
        for i in range(clear, edge):
            o, o2, m, l, p16 = step(q, q2, k_s, v_s, k_s2, v_s2, kf, ke, vf, ve, it + i, hi - 1 - i, o, o2, m, l, p16, row0, len_k, shift, left, right,
                                scale, cap_in, cap_out, c, BM, BN, DQ, DV, ST, NC, False, False, PING, EB, PB, SOFTCAP,
                                Q2, V2, SL, OL, OL2, PL)  # fmt: skip
        if LEFT:
            for i in range(edge, n):
                o, o2, m, l, p16 = step(q, q2, k_s, v_s, k_s2, v_s2, kf, ke, vf, ve, it + i, hi - 1 - i, o, o2, m, l, p16, row0, len_k, shift, left,
                                    right, scale, cap_in, cap_out, c, BM, BN, DQ, DV, ST, NC, LEFT, False, PING, EB, PB,
                                    SOFTCAP, Q2, V2, SL, OL, OL2, PL)  # fmt: skip
        it += n
        if OSEP and not LEFT:  # Q may be overwritten: the next tile's loads start now
            mbarrier.arrive(qe, count=1)
        pst = (it - 1) % ST
        mbarrier.wait(vf.index(pst), ((it - 1) // ST) & 1)
        ot = warpgroup_mma(p16, v_s.index(pst).reshape([BN, DV]), o, is_async=True)
        if V2:
            ot2 = warpgroup_mma(p16, v_s2.index(pst).reshape([BN, V2]), o2, is_async=True)
        alive = l > 0.0
        linv = gl.where(alive, 1.0 / l, 0.0)
        if V2:
            o, o2, p16 = warpgroup_mma_wait(0, deps=[ot, ot2, p16])
        else:
            o, p16 = warpgroup_mma_wait(0, deps=[ot, p16])
        release(ve, pst, VB, EB, NC)
        if LEFT:
            hand_back(it, lo - first, kf, vf, ke, ve, c, ST, NC, PING, EB, PB)
            it += lo - first
            if OSEP:
                mbarrier.arrive(qe, count=1)
        o = o * gl.expand_dims(gl.convert_layout(linv, gl.SliceLayout(1, OL)), 1)
        tma.store_wait(0)  # the last tile's store has read this buffer
        o_s.index(c).reshape([BM, DV]).store(o.to(dt))
        if V2:
            o2 = o2 * gl.expand_dims(gl.convert_layout(linv, gl.SliceLayout(1, OL2)), 1)
            o_s2.index(c).reshape([BM, V2]).store(o2.to(dt))
        fence_async_shared()
        tma.async_copy_shared_to_global(od, [place // heads, place % heads, row0, 0], o_s.index(c))
        if V2:
            tma.async_copy_shared_to_global(od2, [place // heads, place % heads, row0, DV], o_s2.index(c))
        if LSE:
            rows = row0 + gl.arange(0, BM, gl.SliceLayout(1, SL))
            gl.store(lse + place.to(gl.int64) * len_q + rows, gl.where(alive, (m + gl.log2(l)) * LN2, float("-inf")),
                     mask=rows < len_q)  # fmt: skip
        if not OSEP:
            tma.store_wait(0)
            mbarrier.arrive(qe, count=1)
    tma.store_wait(0)
    if c == 0:
        take_turn(c, PB, PING)  # leave no arrival pending


@gluon.jit
def body(qd, kd, vd, od, qd2, kd2, vd2, od2, lse, total, NT, HG, heads, len_q, len_k, shift, left, right, scale, cap_in, cap_out,
         GROUP: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, DQ: gl.constexpr, DV: gl.constexpr, Q2: gl.constexpr,
         V2: gl.constexpr, ST: gl.constexpr, NC: gl.constexpr, LEFT: gl.constexpr, RIGHT: gl.constexpr, SHIFTED: gl.constexpr,
         RAG: gl.constexpr, SOFTCAP: gl.constexpr, LSE: gl.constexpr, PING: gl.constexpr, EB: gl.constexpr,
         OSEP: gl.constexpr):  # fmt: skip
    q_s = gl.allocate_shared_memory(qd.dtype, [NC, 1, 1, BM, DQ], qd.layout)
    k_s = gl.allocate_shared_memory(kd.dtype, [ST, 1, 1, BN, DQ], kd.layout)
    v_s = gl.allocate_shared_memory(vd.dtype, [ST, 1, 1, BN, DV], vd.layout)
    q_s2, k_s2, v_s2 = q_s, k_s, v_s
    if Q2:
        q_s2 = gl.allocate_shared_memory(qd.dtype, [NC, 1, 1, BM, Q2], qd2.layout)
        k_s2 = gl.allocate_shared_memory(kd.dtype, [ST, 1, 1, BN, Q2], kd2.layout)
    if V2:
        v_s2 = gl.allocate_shared_memory(vd.dtype, [ST, 1, 1, BN, V2], vd2.layout)
    o_s, o_s2 = q_s, q_s2
    if OSEP:
        o_s = gl.allocate_shared_memory(od.dtype, [NC, 1, 1, BM, DV], od.layout)
        if V2:
            o_s2 = gl.allocate_shared_memory(od.dtype, [NC, 1, 1, BM, V2], od2.layout)
    qf = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    qe = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    kf = gl.allocate_shared_memory(gl.int64, [ST, 1], mbarrier.MBarrierLayout())
    vf = gl.allocate_shared_memory(gl.int64, [ST, 1], mbarrier.MBarrierLayout())
    ke = gl.allocate_shared_memory(gl.int64, [ST, 1], mbarrier.MBarrierLayout())
    ve = gl.allocate_shared_memory(gl.int64, [ST, 1], mbarrier.MBarrierLayout())
    mbarrier.init(qf, count=1)
    mbarrier.init(qe, count=NC)
    for i in gl.static_range(ST):
        mbarrier.init(kf.index(i), count=1)
        mbarrier.init(vf.index(i), count=1)
        mbarrier.init(ke.index(i), count=NC)
        mbarrier.init(ve.index(i), count=NC)
    fence_async_shared()
    if NC == 2:
        gl.warp_specialize([
            (producer, (qd, kd, vd, qd2, kd2, vd2, q_s, k_s, v_s, q_s2, k_s2, v_s2, qf, qe, kf, ke, vf, ve, total, NT, HG, heads, len_k, shift, left, right, BM, BN, ST, NC, GROUP, LEFT, RIGHT, EB, Q2, V2, DQ, DV)),
            (consumer, (od, od2, lse, q_s, k_s, v_s, o_s, q_s2, k_s2, v_s2, o_s2, qf, qe, kf, ke, vf, ve, total, NT, HG, heads, len_q, len_k, shift, left, right, scale, cap_in, cap_out, gl.constexpr(0), BM, BN, DQ, DV, ST, NC, LEFT, RIGHT, SHIFTED, RAG, SOFTCAP, LSE, PING, EB, OSEP, Q2, V2)),
            (consumer, (od, od2, lse, q_s, k_s, v_s, o_s, q_s2, k_s2, v_s2, o_s2, qf, qe, kf, ke, vf, ve, total, NT, HG, heads, len_q, len_k, shift, left, right, scale, cap_in, cap_out, gl.constexpr(1), BM, BN, DQ, DV, ST, NC, LEFT, RIGHT, SHIFTED, RAG, SOFTCAP, LSE, PING, EB, OSEP, Q2, V2)),
        ], [4, 4], [240, 240])  # fmt: skip
    else:
        gl.warp_specialize([
            (producer, (qd, kd, vd, qd2, kd2, vd2, q_s, k_s, v_s, q_s2, k_s2, v_s2, qf, qe, kf, ke, vf, ve, total, NT, HG, heads, len_k, shift, left, right, BM, BN, ST, NC, GROUP, LEFT, RIGHT, EB, Q2, V2, DQ, DV)),
            (consumer, (od, od2, lse, q_s, k_s, v_s, o_s, q_s2, k_s2, v_s2, o_s2, qf, qe, kf, ke, vf, ve, total, NT, HG, heads, len_q, len_k, shift, left, right, scale, cap_in, cap_out, gl.constexpr(0), BM, BN, DQ, DV, ST, NC, LEFT, RIGHT, SHIFTED, RAG, SOFTCAP, LSE, PING, EB, OSEP, Q2, V2)),
            (consumer, (od, od2, lse, q_s, k_s, v_s, o_s, q_s2, k_s2, v_s2, o_s2, qf, qe, kf, ke, vf, ve, total, NT, HG, heads, len_q, len_k, shift, left, right, scale, cap_in, cap_out, gl.constexpr(1), BM, BN, DQ, DV, ST, NC, LEFT, RIGHT, SHIFTED, RAG, SOFTCAP, LSE, PING, EB, OSEP, Q2, V2)),
            (consumer, (od, od2, lse, q_s, k_s, v_s, o_s, q_s2, k_s2, v_s2, o_s2, qf, qe, kf, ke, vf, ve, total, NT, HG, heads, len_q, len_k, shift, left, right, scale, cap_in, cap_out, gl.constexpr(2), BM, BN, DQ, DV, ST, NC, LEFT, RIGHT, SHIFTED, RAG, SOFTCAP, LSE, PING, EB, OSEP, Q2, V2)),
        ], [4, 4, 4], [160, 160, 160])  # fmt: skip


@gluon.jit
def forward(qd, kd, vd, od, lse, total, NT, HG, heads, len_q, len_k, shift, left, right, scale, cap_in, cap_out,
            GROUP: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, DQ: gl.constexpr, DV: gl.constexpr, Q2: gl.constexpr,
            V2: gl.constexpr, ST: gl.constexpr, NC: gl.constexpr, LEFT: gl.constexpr, RIGHT: gl.constexpr,
            SHIFTED: gl.constexpr, RAG: gl.constexpr, SOFTCAP: gl.constexpr, LSE: gl.constexpr, PING: gl.constexpr,
            EB: gl.constexpr, OSEP: gl.constexpr):  # fmt: skip
    """Grid: one program a multiprocessor (persistent) or one a tile of NC * BM rows; heads in groups of HG for L2.

    Descriptors are [batch, heads, length, dim] with blocks [1, 1, rows, D]. lse: float32 [batch, heads, len_q]. total: tiles.
    NT: row tiles of a head. scale: of the scores, in base-2 units (1 with SOFTCAP). Row i reads keys i + shift - left to
    i + shift + right. SHIFTED: the diagonal is not on a multiple of BM, so a warpgroup meets it in more than one tile.
    """
    body(qd, kd, vd, od, qd, kd, vd, od, lse, total, NT, HG, heads, len_q, len_k, shift, left, right, scale, cap_in, cap_out,
         GROUP, BM, BN, DQ, DV, 0, 0, ST, NC, LEFT, RIGHT, SHIFTED, RAG, SOFTCAP, LSE, PING, EB, OSEP)  # fmt: skip


@gluon.jit
def forward_split(qd, kd, vd, od, qd2, kd2, vd2, od2, lse, total, NT, HG, heads, len_q, len_k, shift, left, right, scale,
                  cap_in, cap_out, GROUP: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, DQ: gl.constexpr, DV: gl.constexpr,
                  Q2: gl.constexpr, V2: gl.constexpr, ST: gl.constexpr, NC: gl.constexpr, LEFT: gl.constexpr,
                  RIGHT: gl.constexpr, SHIFTED: gl.constexpr, RAG: gl.constexpr, SOFTCAP: gl.constexpr, LSE: gl.constexpr,
                  PING: gl.constexpr, EB: gl.constexpr, OSEP: gl.constexpr):  # fmt: skip
    """`forward` for head sizes between powers of two: DQ + Q2 of query and key, DV + V2 of value; V2 may be 0.

    qd2 and the rest are descriptors of the same tensors with blocks of the second part.
    """
    body(qd, kd, vd, od, qd2, kd2, vd2, od2, lse, total, NT, HG, heads, len_q, len_k, shift, left, right, scale, cap_in, cap_out,
         GROUP, BM, BN, DQ, DV, Q2, V2, ST, NC, LEFT, RIGHT, SHIFTED, RAG, SOFTCAP, LSE, PING, EB, OSEP)  # fmt: skip
