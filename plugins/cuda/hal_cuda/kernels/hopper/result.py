# ruff: noqa: N803, E741, SIM102
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
"""The end of a row tile in the Hopper kernels: its rows normalised and written, with their log-sum-exp."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma

from .layouts import accumulator

LN2 = gl.constexpr(0.6931471805599453)


@gluon.jit
def put_rows(out, o, row0, end, step, COLUMNS: gl.constexpr, OL: gl.constexpr):
    # Rows before the end of their sequence alone: the next sequence's follow in memory, as other heads do behind the
    # columns.
    BM: gl.constexpr = o.shape[0]
    D: gl.constexpr = o.shape[1]
    rows = row0 + gl.arange(0, BM, gl.SliceLayout(1, OL))
    columns = gl.arange(0, D, gl.SliceLayout(0, OL))
    at = gl.expand_dims(rows.to(gl.int64) * step, 1) + gl.expand_dims(columns, 0)
    there = gl.expand_dims(rows < end, 1)
    if COLUMNS < D:
        there = there & gl.expand_dims(columns < COLUMNS, 0)
    gl.store(out + at, o.to(out.dtype.element_ty), mask=there)


@gluon.jit
def finish(output, shared, query_empty, o, o2, m, l, qst, row0, tile, work, c: gl.constexpr, C: gl.constexpr):
    # Normalise a tile of rows and write it. o, o2: the result's parts; m, l: the rows' maxima and sums; qst: the query
    # tile's stage.
    BM: gl.constexpr = C.rows
    SL: gl.constexpr = accumulator(C.keys)
    OL: gl.constexpr = accumulator(C.dim_v)
    OL2: gl.constexpr = accumulator(C.dim_v2)
    dt: gl.constexpr = shared.out.dtype
    batch, head, length, first_query = tile.batch, tile.head, tile.len_q, tile.first_query
    oat = qst * C.consumers + c
    if C.own_output:
        oat = c
    alive = l > 0.0
    linv = gl.where(alive, 1.0 / l, 0.0)
    o = o * gl.expand_dims(gl.convert_layout(linv, gl.SliceLayout(1, OL)), 1)
    if C.dim_v2:
        o2 = o2 * gl.expand_dims(gl.convert_layout(linv, gl.SliceLayout(1, OL2)), 1)
    whole = True
    if C.packed:
        whole = row0 + BM <= length
    if whole:
        tma.store_wait(0)  # the last tile's store has read this buffer
        shared.out.index(oat).reshape([BM, C.dim_v]).store(o.to(dt))
        if C.dim_v2:
            shared.out2.index(oat).reshape([BM, C.dim_v2]).store(o2.to(dt))
        fence_async_shared()
        tma.async_copy_shared_to_global(output.map, [batch, head, first_query + row0, 0], shared.out.index(oat))
        if C.dim_v2:
            tma.async_copy_shared_to_global(
                output.map2, [batch, head, first_query + row0, C.dim_v], shared.out2.index(oat)
            )
    if C.packed:
        if not whole:
            out = output.pointer + head.to(gl.int64) * output.head_stride
            at = first_query + row0
            end = first_query + length
            put_rows(out, o, at, end, output.row_stride, C.value_columns, OL)
            if C.dim_v2:
                columns2: gl.constexpr = C.value_columns - C.dim_v
                put_rows(out + C.dim_v, o2, at, end, output.row_stride, columns2, OL2)
    if C.lse:
        rows = row0 + gl.arange(0, BM, gl.SliceLayout(1, SL))
        place = (batch * work.heads + head).to(gl.int64) * work.len_q + first_query
        at = output.lse + place + rows
        gl.store(at, gl.where(alive, (m + gl.log2(l)) * LN2, float("-inf")), mask=rows < length)
    if not C.own_output:
        tma.store_wait(0)
        mbarrier.arrive(query_empty.index(qst), count=1)
