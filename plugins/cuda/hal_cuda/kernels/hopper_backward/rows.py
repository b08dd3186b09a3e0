# ruff: noqa: N803
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
"""Before and after the Hopper backward: what it reads of each query row, and the query's gradient in its own order."""

import triton
import triton.language as tl

from ..portable.dropout import row_words


@triton.jit
def prepare(out, grad_out, lse, grad_lse, statistics, sums, arrivals, o_b, o_h, o_m, g_b, g_h, g_m, l_b, l_h, l_m, seed,
            offset, heads, len_q, tiles, DV: tl.constexpr, BDV: tl.constexpr, SUMS: tl.constexpr, BM: tl.constexpr,
            GRAD_LSE: tl.constexpr,
            ORDERED: tl.constexpr, NATURAL: tl.constexpr, WORDS: tl.constexpr):  # fmt: skip
    """Write statistics, float32 [batch * heads, tiles, 2, BM], or 4 numbers of a row where NATURAL or WORDS: the
    log-sum-exp in base 2 or natural, infinity for rows that read no key and rows behind the last, which gives weights
    of 0; delta = sum(out * grad_out) - grad_lse; and 0, for `normalise` to change, or the row's words of dropout. Set
    to 0 the sums, float32 [batch * heads, tiles, SUMS], and where ORDERED arrivals, int32 [batch * heads, tiles].

    Grid: batch * heads * tiles. lse: contiguous [batch, heads, len_q]; l_b to l_m: strides of grad_lse.
    """
    number = tl.program_id(0).to(tl.int64)
    tile, place = (number % tiles).to(tl.int32), number // tiles
    batch, head = place // heads, place % heads
    row = tile * BM + tl.arange(0, BM)
    column = tl.arange(0, BDV)
    row64 = row.to(tl.int64)
    there = (row < len_q)[:, None] & (column < DV)[None, :]
    o_at = out + batch * o_b + head * o_h + row64[:, None] * o_m + column[None, :]
    g_at = grad_out + batch * g_b + head * g_h + row64[:, None] * g_m + column[None, :]
    product = tl.load(o_at, mask=there, other=0.0).to(tl.float32) * tl.load(g_at, mask=there, other=0.0).to(tl.float32)
    delta = tl.sum(product, 1)
    if GRAD_LSE:
        delta -= tl.load(grad_lse + batch * l_b + head * l_h + row64 * l_m, mask=row < len_q, other=0.0)
    level = tl.load(lse + place * len_q + row, mask=row < len_q, other=float("inf"))
    if not NATURAL:
        level *= 1.4426950408889634
    level = tl.where(level == float("-inf"), float("inf"), level)
    at = statistics + number * ((4 if NATURAL or WORDS else 2) * BM) + tl.arange(0, BM)
    tl.store(at, level)
    tl.store(at + BM, delta)
    if WORDS:
        step, base = row_words(seed, offset, row * 0 + place.to(tl.int32), row)
        tl.store(at + 2 * BM, step.to(tl.float32, bitcast=True))
        tl.store(at + 3 * BM, base.to(tl.float32, bitcast=True))
    if NATURAL:
        tl.store(at + 2 * BM, tl.zeros([BM], tl.float32))
    tl.store(sums + number * SUMS + tl.arange(0, SUMS), tl.zeros([SUMS], tl.float32))
    if ORDERED:
        tl.store(arrivals + number, 0)


@triton.jit
def finish(sums, grad_query, g_b, g_h, g_m, heads, len_q, tiles, scale, D: tl.constexpr, BD: tl.constexpr,
           BM: tl.constexpr):  # fmt: skip
    """The query's gradient: the sums of a tile put in order (see `pipeline.in_order`), scaled and rounded.

    Grid: batch * heads * tiles. BD: head size of the sums, D: that of the gradient, whose last stride is 1.
    """
    number = tl.program_id(0).to(tl.int64)
    tile, place = (number % tiles).to(tl.int32), number // tiles
    batch, head = place // heads, place % heads
    x = tl.load(sums + number * (BM * BD) + tl.arange(0, BM * BD)) * scale
    x = x.reshape(2, BM * BD // 1024, 4, 8, 4, 2, 2)  # warpgroup, 8 columns, warp, row, 2 columns, 8 rows, column
    if BM == 64:  # noqa: SIM108
        x = x.permute(2, 5, 3, 0, 1, 4, 6).reshape(BM, BD)
    else:
        x = x.permute(0, 2, 5, 3, 1, 4, 6).reshape(BM, BD)
    row = tile * BM + tl.arange(0, BM)
    column = tl.arange(0, BD)
    to = grad_query + batch * g_b + head * g_h + row.to(tl.int64)[:, None] * g_m + column[None, :]
    tl.store(to, x.to(grad_query.dtype.element_ty), mask=(row < len_q)[:, None] & (column < D)[None, :])
