# ruff: noqa: N803
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
"""Attention backward for Hopper in Gluon: bf16 and fp16, full, causal, window, softcap, grouped heads, masks, block
plans and dropout.

One program owns a block of keys, which stays in shared memory; a producer warpgroup feeds tiles of queries and of the
output's gradient by the copy engine, and two consumer warpgroups hold dK and dV in registers. The query's gradient is
added up in float32 in global memory, so its last bits depend on the order of programs, unless they are told to take
turns.

Source: Dao 2023 (FlashAttention-2), algorithm 2; Shah et al. 2024 (FlashAttention-3) for warp specialisation.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

from .config import Barriers, Edges, Lists, Maps, Order, Scaling, Shared
from .consumer import consumer
from .pipeline import block_of, producer
from .wide import consumer_of_scores, consumer_of_weights


@gluon.jit
def backward(qd, od, sd, kd, vd, dkd, dvd, dqd, md, sums, arrivals, visible, indices, counts, visible_b, list_b, list_h,
             list_rows, list_blocks, mask_b, mask_h, tiles, blocks, together, heads_kv, len_k, below, above, scale,
             out_scale, cap_in, cap_out, kept, least, C: gl.constexpr):  # fmt: skip
    """Grid: one program a block of C.keys keys and key head.

    qd to md: the tensor maps of `Maps`; md of the mask where C.mask. sums: float32, the query's gradient in the order
    of threads, zero before the launch. arrivals: see `Order`; read where C.ordered, zero before the launch. visible to
    mask_h: see `Lists`. tiles, blocks: tiles of C.rows rows of a query head, blocks of a key head. together: key heads
    worked on at a time, a divisor of all of them. The rest: see `Edges` and `Scaling`. C: a `Config`.
    """
    KIND: gl.constexpr = qd.dtype
    ST: gl.constexpr = C.stages
    NS: gl.constexpr = C.score_stages
    SG: gl.constexpr = C.staging
    edges = Edges(len_k, below, above)
    scaling = Scaling(scale, out_scale, cap_in, cap_out, kept, least)
    order = Order(arrivals, blocks)
    lists = Lists(visible, visible_b, indices, counts, list_b, list_h, list_rows, list_blocks, mask_b, mask_h)
    block = block_of(tiles, blocks, together, heads_kv, lists, edges, C)
    if C.planned:  # keys that nobody reads are hidden by their length
        edges = Edges(gl.where(block.count == 0, 0, len_k), below, above)
    q_s = gl.allocate_shared_memory(KIND, [ST, 1, 1, C.rows, C.space_qk], qd.layout)
    o_s = gl.allocate_shared_memory(KIND, [ST, 1, 1, C.rows, C.space_v], od.layout)
    st_s = gl.allocate_shared_memory(gl.float32, [ST, C.statistics, C.rows], sd.layout)
    k_s = gl.allocate_shared_memory(KIND, [1, 1, 1, C.keys, C.space_qk], kd.layout)
    v_s = gl.allocate_shared_memory(KIND, [1, 1, 1, C.keys, C.space_v], vd.layout)
    scores: gl.constexpr = gl.NVMMASharedLayout.get_default_for([C.keys, C.rows], KIND)
    ds_s = gl.allocate_shared_memory(KIND, [NS, C.keys, C.rows], scores)
    dq_s = gl.allocate_shared_memory(
        gl.float32, [2 * C.staging if C.engine else 1, 16, 256 if C.engine else 16], dqd.layout
    )
    m_s, w_s = q_s, q_s
    if C.wide:
        halves: gl.constexpr = gl.NVMMASharedLayout.get_default_for([C.keys, C.rows], gl.float16)
        w_s = gl.allocate_shared_memory(gl.float16, [2, C.keys, C.rows], halves)
    if C.mask > 0:
        m_s = gl.allocate_shared_memory(md.dtype, [ST, 1, 1, C.rows, C.keys], md.layout)
    kf = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    vf = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    qf = gl.allocate_shared_memory(gl.int64, [ST, 1], mbarrier.MBarrierLayout())
    of = gl.allocate_shared_memory(gl.int64, [ST, 1], mbarrier.MBarrierLayout())
    done = gl.allocate_shared_memory(gl.int64, [ST, 1], mbarrier.MBarrierLayout())
    scored = gl.allocate_shared_memory(gl.int64, [NS, 1], mbarrier.MBarrierLayout())
    mbarrier.init(kf, count=1)
    mbarrier.init(vf, count=1)
    for i in gl.static_range(ST):
        mbarrier.init(qf.index(i), count=1)
        mbarrier.init(of.index(i), count=1)
        mbarrier.init(done.index(i), count=2)
    for i in gl.static_range(NS):
        mbarrier.init(scored.index(i), count=1 if C.wide else 2)
    maps = Maps(qd, od, sd, kd, vd, dkd, dvd, dqd, md if C.mask > 0 else qd)
    shared = Shared(q_s, o_s, st_s, k_s, v_s, ds_s, dq_s, m_s, w_s)
    ready, free, passed = scored, kf, scored
    if C.wide:
        passed = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
        for i in gl.static_range(2):
            mbarrier.init(passed.index(i), count=1)
    if C.ordered:
        ready = gl.allocate_shared_memory(gl.int64, [2 * C.staging, 1], mbarrier.MBarrierLayout())
        free = gl.allocate_shared_memory(gl.int64, [C.staging, 1], mbarrier.MBarrierLayout())
        for i in gl.static_range(SG):
            mbarrier.init(free.index(i), count=1)
        for i in gl.static_range(2 * SG):
            mbarrier.init(ready.index(i), count=1)
    fence_async_shared()
    barriers = Barriers(kf, vf, qf, of, done, scored, ready, free, passed)
    if C.wide:
        gl.warp_specialize(
            [
                (producer, (maps, shared, barriers, block, lists, order, edges, C)),
                (consumer_of_weights, (sums, maps, shared, barriers, block, lists, edges, scaling, C)),
                (consumer_of_scores, (sums, maps, shared, barriers, block, lists, edges, scaling, C)),
            ],
            [4, 4],
            [240, 240],
        )
    else:
        gl.warp_specialize(
            [
                (producer, (maps, shared, barriers, block, lists, order, edges, C)),
                (consumer, (sums, maps, shared, barriers, block, lists, edges, scaling, gl.constexpr(0), C)),
                (consumer, (sums, maps, shared, barriers, block, lists, edges, scaling, gl.constexpr(1), C)),
            ],
            [4, 4],
            [240, 240],
        )
