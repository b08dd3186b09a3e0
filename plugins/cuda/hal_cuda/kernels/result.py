# ruff: noqa: N803, E741, SIM102
"""The end of a row tile in the Hopper kernels: its rows normalised and written, with their log-sum-exp."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma

LN2 = gl.constexpr(0.6931471805599453)


@gluon.jit
def put_rows(out, o, row0, end, step, BM: gl.constexpr, D: gl.constexpr, COLUMNS: gl.constexpr, OL: gl.constexpr):
    # Rows before the end of their sequence alone: the next sequence's follow in memory, as other heads do behind the
    # columns.
    rows = row0 + gl.arange(0, BM, gl.SliceLayout(1, OL))
    columns = gl.arange(0, D, gl.SliceLayout(0, OL))
    at = gl.expand_dims(rows.to(gl.int64) * step, 1) + gl.expand_dims(columns, 0)
    there = gl.expand_dims(rows < end, 1)
    if COLUMNS < D:
        there = there & gl.expand_dims(columns < COLUMNS, 0)
    gl.store(out + at, o.to(out.dtype.element_ty), mask=there)


@gluon.jit
def finish(
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
    l,
    qe,
    qst,
    batch,
    head,
    row0,
    q_at,
    length,
    heads,
    all_rows,
    c: gl.constexpr,
    BM: gl.constexpr,
    DV: gl.constexpr,
    V2: gl.constexpr,
    VC: gl.constexpr,
    NC: gl.constexpr,
    LSE: gl.constexpr,
    OSEP: gl.constexpr,
    TABLE: gl.constexpr,
    SL: gl.constexpr,
    OL: gl.constexpr,
    OL2: gl.constexpr,
):
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
            put_rows(out, o, q_at + row0, q_at + length, out_row, BM, DV, VC, OL)
            if V2:
                put_rows(out + DV, o2, q_at + row0, q_at + length, out_row, BM, V2, VC - DV, OL2)
    if LSE:
        rows = row0 + gl.arange(0, BM, gl.SliceLayout(1, SL))
        place = (batch * heads + head).to(gl.int64) * all_rows + q_at
        gl.store(lse + place + rows, gl.where(alive, (m + gl.log2(l)) * LN2, float("-inf")), mask=rows < length)
    if not OSEP:
        tma.store_wait(0)
        mbarrier.arrive(qe.index(qst), count=1)
