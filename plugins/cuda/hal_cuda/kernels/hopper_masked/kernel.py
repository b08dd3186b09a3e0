# ruff: noqa: N803
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
"""Flash-attention forward for Hopper in Gluon under masks and block plans: bf16 and fp16, causal, window, softcap.

The Hopper kernel with the tiles of keys taken from a list, and with masks of keys, or of rows and keys, whose tiles the
copy engine brings with those of the keys. It has code of its own so that the kernel without masks keeps its registers.

Source: Shah et al. 2024 (FlashAttention-3) for warp specialisation and turns between warpgroups.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

from ..hopper.config import Barriers, Scaling, Work
from .config import Inputs, Lists, Output, Staged
from .consumer import consumer
from .pipeline import producer


@gluon.jit
def forward_masked(
    qd,
    kd,
    vd,
    od,
    md,
    lse,
    mask,
    indices,
    counts,
    mask_b,
    mask_h,
    index_b,
    index_h,
    index_m,
    count_b,
    count_h,
    block_tiles,
    blocks,
    total,
    row_tiles,
    together,
    heads,
    len_q,
    len_k,
    shift,
    left,
    right,
    scale,
    cap_in,
    cap_out,
    C: gl.constexpr,
):
    """Grid: one program a multiprocessor (persistent) or one a tile of C.rows * C.consumers rows.

    qd to md: tensor maps of [batch, heads, length, dim] with blocks [1, 1, rows or keys, dim], md of the mask with
    blocks [1, 1, rows, keys] where C.tiled. lse: float32 [batch, heads, len_q]. mask to blocks: see `Lists`. The rest:
    see `Work` and `Scaling`; under an additive mask scale and cap_out are in natural units. C: a `Config`.
    """
    ST: gl.constexpr = C.stages
    QS: gl.constexpr = C.query_stages
    NC: gl.constexpr = C.consumers
    inputs = Inputs(qd, kd, vd, md)
    output = Output(od, od, lse)
    work = Work(lse, total, row_tiles, together, heads, len_q, len_k, shift, left, right)
    lists = Lists(
        mask, mask_b, mask_h, indices, counts, index_b, index_h, index_m, count_b, count_h, block_tiles, blocks
    )
    scaling = Scaling(scale, cap_in, cap_out)
    q_s = gl.allocate_shared_memory(qd.dtype, [QS * NC, 1, 1, C.rows, C.dim_qk], qd.layout)
    k_s = gl.allocate_shared_memory(kd.dtype, [ST, 1, 1, C.keys, C.dim_qk], kd.layout)
    v_s = gl.allocate_shared_memory(vd.dtype, [ST, 1, 1, C.keys, C.dim_v], vd.layout)
    m_s, o_s = q_s, q_s
    if C.tiled:
        m_s = gl.allocate_shared_memory(md.dtype, [ST * NC, 1, 1, C.rows, C.keys], md.layout)
    if C.own_output:
        o_s = gl.allocate_shared_memory(od.dtype, [NC, 1, 1, C.rows, C.dim_v], od.layout)
    qf = gl.allocate_shared_memory(gl.int64, [QS, 1], mbarrier.MBarrierLayout())
    qe = gl.allocate_shared_memory(gl.int64, [QS, 1], mbarrier.MBarrierLayout())
    kf = gl.allocate_shared_memory(gl.int64, [ST, 1], mbarrier.MBarrierLayout())
    ke = gl.allocate_shared_memory(gl.int64, [ST, 1], mbarrier.MBarrierLayout())
    vf = gl.allocate_shared_memory(gl.int64, [ST, 1], mbarrier.MBarrierLayout())
    ve = gl.allocate_shared_memory(gl.int64, [ST, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(QS):
        mbarrier.init(qf.index(i), count=1)
        mbarrier.init(qe.index(i), count=NC)
    for i in gl.static_range(ST):
        mbarrier.init(kf.index(i), count=1)
        mbarrier.init(ke.index(i), count=NC)
        mbarrier.init(vf.index(i), count=1)
        mbarrier.init(ve.index(i), count=NC)
    fence_async_shared()
    staged = Staged(q_s, k_s, v_s, m_s, o_s, o_s)
    barriers = Barriers(qf, qe, kf, ke, vf, ve)
    if NC == 1:
        gl.warp_specialize(
            [
                (producer, (inputs, staged, barriers, work, lists, C)),
                (consumer, (output, staged, barriers, work, lists, scaling, gl.constexpr(0), C)),
            ],
            [4],
            [216],
        )
    else:
        gl.warp_specialize(
            [
                (producer, (inputs, staged, barriers, work, lists, C)),
                (consumer, (output, staged, barriers, work, lists, scaling, gl.constexpr(0), C)),
                (consumer, (output, staged, barriers, work, lists, scaling, gl.constexpr(1), C)),
            ],
            [4, 4],
            [240, 240],
        )
