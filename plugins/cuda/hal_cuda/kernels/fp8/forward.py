# ruff: noqa: N803
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
"""Flash-attention forward in FP8 (e4m3) for Hopper in Gluon: full and causal, of unequal lengths, with grouped heads.

As in the Hopper kernel of 16-bit types, whose barriers and tile order it shares, a producer warpgroup loads tiles and
consumer warpgroups own 64 query rows each. What differs: values come transposed, as FP8 products read both operands
along the keys; the product P V of a tile of keys is added to the result in float32, because the tensor cores keep 14
bits of an FP8 sum; and scores and values have scales.

Source: Shah et al. 2024 (FlashAttention-3), section 3.3, for FP8; DeepSeek-AI 2024 (DeepSeek-V3), section 3.3.2, for
sums in two levels.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

from ..hopper.config import Barriers, Work
from .config import Scales, Shared
from .consumer import consumer
from .producer import producer
from .wide import consumer_wide


@gluon.jit
def forward_fp8(
    qd,
    kd,
    vd,
    od,
    lse,
    q_scale,
    k_scale,
    v_scale,
    q_mean,
    q_blocks,
    k_blocks,
    total,
    row_tiles,
    together,
    heads,
    len_q,
    len_k,
    shift,
    right,
    scale,
    C: gl.constexpr,
):
    """Grid: one program a multiprocessor (persistent) or one a tile of C.rows * C.consumers rows.

    Tensor maps: qd, kd of e4m3 [batch, heads, length, dim]; vd of e4m3 [batch, heads, blocks * C.dim_v, 128] (see
    `quantise_values`); od of the result. lse: float32 [batch, heads, len_q]. The scales: see `Scales`; the rest: see
    `Work` of the Hopper kernel. scale: of the scores, in base-2 units. C: a `Config`.
    """
    BM: gl.constexpr = C.rows
    NC: gl.constexpr = C.consumers
    NB: gl.constexpr = C.barriers
    QS: gl.constexpr = C.query_stages
    q_s = gl.allocate_shared_memory(qd.dtype, [QS * NC, 1, 1, BM, C.dim_qk], qd.layout)
    k_s = gl.allocate_shared_memory(kd.dtype, [C.stages, 1, 1, C.keys, C.dim_qk], kd.layout)
    v_s = gl.allocate_shared_memory(vd.dtype, [C.stages, 1, 1, C.dim_v, C.keys], vd.layout)
    o_s = gl.allocate_shared_memory(od.dtype, [NC, 1, 1, BM, C.dim_v], od.layout)
    qf = gl.allocate_shared_memory(gl.int64, [QS, 1], mbarrier.MBarrierLayout())
    qe = gl.allocate_shared_memory(gl.int64, [QS, 1], mbarrier.MBarrierLayout())
    kf = gl.allocate_shared_memory(gl.int64, [NB, 1], mbarrier.MBarrierLayout())
    ke = gl.allocate_shared_memory(gl.int64, [NB, 1], mbarrier.MBarrierLayout())
    vf = gl.allocate_shared_memory(gl.int64, [NB, 1], mbarrier.MBarrierLayout())
    ve = gl.allocate_shared_memory(gl.int64, [NB, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(QS):
        mbarrier.init(qf.index(i), count=1)
        mbarrier.init(qe.index(i), count=NC)
    for i in gl.static_range(NB):
        mbarrier.init(kf.index(i), count=1)
        mbarrier.init(ke.index(i), count=NC)
        mbarrier.init(vf.index(i), count=1)
        mbarrier.init(ve.index(i), count=NC)
    fence_async_shared()
    work = Work(
        lse, total, row_tiles, together, heads, len_q, len_k, shift, right, right
    )  # nothing begins at a diagonal
    scales = Scales(q_scale, k_scale, v_scale, q_mean, q_blocks, k_blocks)
    shared = Shared(q_s, k_s, v_s, o_s)
    barriers = Barriers(qf, qe, kf, ke, vf, ve)
    if C.apart and NC == 2:
        gl.warp_specialize(
            [
                (producer, (qd, kd, vd, shared, barriers, work, C)),
                (consumer_wide, (od, lse, shared, barriers, work, scales, scale, gl.constexpr(0), C)),
                (consumer_wide, (od, lse, shared, barriers, work, scales, scale, gl.constexpr(1), C)),
            ],
            [4, 4],
            [240, 240],
        )
    elif C.apart:
        gl.warp_specialize(
            [
                (producer, (qd, kd, vd, shared, barriers, work, C)),
                (consumer_wide, (od, lse, shared, barriers, work, scales, scale, gl.constexpr(0), C)),
                (consumer_wide, (od, lse, shared, barriers, work, scales, scale, gl.constexpr(1), C)),
                (consumer_wide, (od, lse, shared, barriers, work, scales, scale, gl.constexpr(2), C)),
            ],
            [4, 4, 4],
            [160, 160, 160],
        )
    elif NC == 2:
        gl.warp_specialize(
            [
                (producer, (qd, kd, vd, shared, barriers, work, C)),
                (consumer, (od, lse, shared, barriers, work, scales, scale, gl.constexpr(0), C)),
                (consumer, (od, lse, shared, barriers, work, scales, scale, gl.constexpr(1), C)),
            ],
            [4, 4],
            [240, 240],
        )
    else:
        gl.warp_specialize(
            [
                (producer, (qd, kd, vd, shared, barriers, work, C)),
                (consumer, (od, lse, shared, barriers, work, scales, scale, gl.constexpr(0), C)),
                (consumer, (od, lse, shared, barriers, work, scales, scale, gl.constexpr(1), C)),
                (consumer, (od, lse, shared, barriers, work, scales, scale, gl.constexpr(2), C)),
            ],
            [4, 4, 4],
            [160, 160, 160],
        )
