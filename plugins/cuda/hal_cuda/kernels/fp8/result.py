# ruff: noqa: N803, E741
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
"""The end of a row tile in the FP8 kernel: its rows normalised and written, with their log-sum-exp."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, tma

from ..hopper.result import LN2
from .config import Scales
from .layouts import accumulator


@gluon.jit
def finish(od, lse, shared, o, o2, level, l, unit, row0, tile, work, scales: Scales, c: gl.constexpr, C: gl.constexpr):
    # Normalise a tile of rows and write it, with its log-sum-exp. o2: the second half of the columns with C.halves.
    BM: gl.constexpr = C.rows
    SL: gl.constexpr = accumulator(C.keys)
    COLUMNS: gl.constexpr = C.dim_v // 2 if C.halves else C.dim_v
    OL: gl.constexpr = accumulator(COLUMNS)
    alive = l > 0.0
    linv = gl.where(alive, unit / l, 0.0)
    linv = gl.expand_dims(gl.convert_layout(linv, gl.SliceLayout(1, OL)), 1)
    tma.store_wait(0)  # the last tile's store has read this buffer
    out = shared.out.index(c).reshape([BM, C.dim_v])
    if C.halves:
        out.slice(0, COLUMNS, dim=1).store((o * linv).to(out.dtype))
        out.slice(COLUMNS, COLUMNS, dim=1).store((o2 * linv).to(out.dtype))
    else:
        out.store((o * linv).to(out.dtype))
    fence_async_shared()
    tma.async_copy_shared_to_global(od, [tile.batch, tile.head, row0, 0], shared.out.index(c))
    if C.lse:
        rows = row0 + gl.arange(0, BM, gl.SliceLayout(1, SL))
        place = (tile.batch * work.heads + tile.head).to(gl.int64) * work.len_q + rows
        total = (level + gl.log2(l)) * LN2
        if C.mean:
            total += gl.load(scales.mean + place, mask=rows < work.len_q)
        gl.store(lse + place, gl.where(alive, total, float("-inf")), mask=rows < work.len_q)
