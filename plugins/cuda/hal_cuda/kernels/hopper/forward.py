# ruff: noqa: N803
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
"""Flash-attention forward for Hopper in Gluon: bf16 and fp16, full, causal, window, softcap, packed.

One producer warpgroup feeds Q, K and V tiles by the tensor memory accelerator; the consumer warpgroups own 64 query
rows each and share the K and V tiles. Keys are walked from the last tile backwards; tiles on an edge (diagonal, window,
last key) are masked and come in loops of their own, so the loop in the middle has no mask. The softmax of tile i runs
beside the product P V of tile i - 1.

Source: Shah et al. 2024 (FlashAttention-3) for warp specialisation and turns between warpgroups.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

from .config import Barriers, Inputs, Output, Scaling, Shared, Staged, Work
from .consumer import consumer
from .producer import producer


@gluon.jit
def body(inputs: Inputs, output: Output, work: Work, scaling: Scaling, C: gl.constexpr):
    qd, kd, vd, qd2, kd2, vd2 = inputs
    od, od2, _lse, _pointer, _head_stride, _row_stride = output
    BM: gl.constexpr = C.rows
    BN: gl.constexpr = C.keys
    ST: gl.constexpr = C.stages
    S2: gl.constexpr = C.stages2
    QS: gl.constexpr = C.query_stages
    NC: gl.constexpr = C.consumers
    NB: gl.constexpr = C.barriers
    q_s = gl.allocate_shared_memory(qd.dtype, [QS * NC, 1, 1, BM, C.dim_qk], qd.layout)
    k_s = gl.allocate_shared_memory(kd.dtype, [ST, 1, 1, BN, C.dim_qk], kd.layout)
    v_s = k_s
    if not C.shared_ring:
        v_s = gl.allocate_shared_memory(vd.dtype, [ST, 1, 1, BN, C.dim_v], vd.layout)
    q_s2, k_s2, v_s2 = q_s, k_s, v_s
    if C.dim_qk2:
        q_s2 = gl.allocate_shared_memory(qd.dtype, [QS * NC, 1, 1, BM, C.dim_qk2], qd2.layout)
        k_s2 = gl.allocate_shared_memory(kd.dtype, [S2, 1, 1, BN, C.dim_qk2], kd2.layout)
    if C.shared_ring:
        v_s2 = k_s2
    elif C.dim_v2:
        v_s2 = gl.allocate_shared_memory(vd.dtype, [S2, 1, 1, BN, C.dim_v2], vd2.layout)
    o_s, o_s2 = q_s, q_s2
    if C.own_output:
        o_s = gl.allocate_shared_memory(od.dtype, [NC, 1, 1, BM, C.dim_v], od.layout)
        if C.dim_v2:
            o_s2 = gl.allocate_shared_memory(od.dtype, [NC, 1, 1, BM, C.dim_v2], od2.layout)
    qf = gl.allocate_shared_memory(gl.int64, [QS, 1], mbarrier.MBarrierLayout())
    qe = gl.allocate_shared_memory(gl.int64, [QS, 1], mbarrier.MBarrierLayout())
    kf = gl.allocate_shared_memory(gl.int64, [NB, 1], mbarrier.MBarrierLayout())
    ke = gl.allocate_shared_memory(gl.int64, [NB, 1], mbarrier.MBarrierLayout())
    vf, ve = kf, ke
    if not C.shared_ring:
        vf = gl.allocate_shared_memory(gl.int64, [NB, 1], mbarrier.MBarrierLayout())
        ve = gl.allocate_shared_memory(gl.int64, [NB, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(QS):
        mbarrier.init(qf.index(i), count=1)
        mbarrier.init(qe.index(i), count=NC)
    for i in gl.static_range(NB):
        mbarrier.init(kf.index(i), count=1)
        mbarrier.init(ke.index(i), count=NC)
        if not C.shared_ring:
            mbarrier.init(vf.index(i), count=1)
            mbarrier.init(ve.index(i), count=NC)
    fence_async_shared()
    staged = Staged(q_s, k_s, v_s, q_s2, k_s2, v_s2)
    shared = Shared(q_s, k_s, v_s, o_s, q_s2, k_s2, v_s2, o_s2)
    barriers = Barriers(qf, qe, kf, ke, vf, ve)
    if NC == 2:
        gl.warp_specialize(
            [
                (producer, (inputs, staged, barriers, work, C)),
                (consumer, (output, shared, barriers, work, scaling, gl.constexpr(0), C)),
                (consumer, (output, shared, barriers, work, scaling, gl.constexpr(1), C)),
            ],
            [4, 4],
            [240, 240],
        )
    else:
        gl.warp_specialize(
            [
                (producer, (inputs, staged, barriers, work, C)),
                (consumer, (output, shared, barriers, work, scaling, gl.constexpr(0), C)),
                (consumer, (output, shared, barriers, work, scaling, gl.constexpr(1), C)),
                (consumer, (output, shared, barriers, work, scaling, gl.constexpr(2), C)),
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

    Tensor maps qd, kd, vd and od are of [batch, heads, length, dim] with blocks [1, 1, rows, dim_qk or dim_v]. lse:
    float32 [batch, heads, len_q]. The rest: see `Work` and `Scaling`. C: a `Config`.
    """
    body(
        Inputs(qd, kd, vd, qd, kd, vd),
        Output(od, od, lse, lse, 0, 0),
        Work(lse, total, row_tiles, together, heads, len_q, len_k, shift, left, right),
        Scaling(scale, cap_in, cap_out),
        C,
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
    """`forward` for head sizes between powers of two: dim_qk + dim_qk2 of query and key, dim_v + dim_v2 of value.

    qd2 and the rest are tensor maps of the same tensors with blocks of the second part; dim_v2 may be 0.
    """
    body(
        Inputs(qd, kd, vd, qd2, kd2, vd2),
        Output(od, od2, lse, lse, 0, 0),
        Work(lse, total, row_tiles, together, heads, len_q, len_k, shift, left, right),
        Scaling(scale, cap_in, cap_out),
        C,
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
    together,
    heads,
    len_q,
    shift,
    left,
    right,
    scale,
    cap_in,
    cap_out,
    C: gl.constexpr,
):
    """`forward` for sequences packed along the length, whose tiles are in `table` (see `tile_table`), longest first.

    Tensor maps are of [1, heads, all tokens, dim]; out_head, out_row: strides of the output, of which the last rows of
    a sequence are written one by one. lse: float32 [heads, len_q]; len_q: all tokens. With C.bottom shift counts from
    the diagonal that ends in a sequence's last row and key.
    """
    body(
        Inputs(qd, kd, vd, qd, kd, vd),
        Output(od, od, lse, out, out_head, out_row),
        Work(table, 0, 0, together, heads, len_q, 0, shift, left, right),
        Scaling(scale, cap_in, cap_out),
        C,
    )
