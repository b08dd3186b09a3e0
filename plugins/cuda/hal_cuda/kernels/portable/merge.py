# ruff: noqa: N803
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
"""Partial results of split keys, joined: by the last program of a tile in `attend`, or by a kernel of its own.

Source: Dao et al. 2023 (Flash-Decoding).
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def gathered(part, lse_part, numbers, place, ok, first, splits, DV: tl.constexpr, BDV: tl.constexpr,
             PARTS: tl.constexpr, TOTALS: tl.constexpr):  # fmt: skip
    """Sum the partial results number first to first + PARTS of rows.

    Gives (largest lse [rows], total weight [rows], sums [rows, BDV]). part: float32 [..., splits, DV]; lse_part:
    natural, [..., splits]. TOTALS: it holds the largest scores instead, and `numbers` numbers behind them the sums of
    weights. place: of the rows among the leading dimensions; ok: which of them exist. They are read past the
    first-level cache: other programs of this launch may have written them.
    """
    d = tl.arange(0, BDV)[None, None, :]
    some = first + tl.arange(0, PARTS)[None, :]
    there = ok[:, None] & (some < splits)
    at = place[:, None] * splits + some
    each = tl.load(lse_part + at, mask=there, other=float("-inf"), cache_modifier=".cg")
    parts = tl.load(part + at[:, :, None] * DV + d, mask=there[:, :, None] & (d < DV), other=0.0, cache_modifier=".cg")
    most = tl.max(each, 1)
    weight = tl.exp2((each - tl.where(most == float("-inf"), 0.0, most)[:, None]) * LOG2E)
    if TOTALS:
        weight *= tl.load(lse_part + numbers + at, mask=there, other=0.0, cache_modifier=".cg")
    return most, tl.sum(weight, 1), tl.sum(parts * weight[:, :, None], 1)


@triton.jit
def settled(most, total, sums):
    """(result, natural lse) of rows; 0 and -inf where no part has a key."""
    dead = total == 0.0
    whole_lse = tl.where(dead, float("-inf"), most + tl.log2(tl.where(dead, 1.0, total)) * LN2)
    return sums / tl.where(dead, 1.0, total)[:, None], whole_lse


@triton.jit
def merge(
    part,
    out,
    lse,
    o_b,
    o_h,
    o_m,
    splits,
    heads,
    len_q,
    count,
    DV: tl.constexpr,
    BDV: tl.constexpr,
    LSE: tl.constexpr,
    PDL: tl.constexpr,
    TOTALS: tl.constexpr,
    ROWS: tl.constexpr,
    PARTS: tl.constexpr,
):
    """Join the partial results of `attend`, those of ROWS rows in a program, PARTS of each at a time.

    Grid: (row groups,). count: rows of all heads and batch entries.
    """
    place = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    ok = place < count
    d = tl.arange(0, BDV)[None, :]
    if PDL:
        tl.extra.cuda.gdc_wait()
    numbers = count.to(tl.int64) * splits
    lse_part = part + numbers * DV
    most, total = tl.full([ROWS], float("-inf"), tl.float32), tl.zeros([ROWS], tl.float32)
    sums = tl.zeros([ROWS, BDV], tl.float32)
    for start in range(0, splits, PARTS):
        some_most, some_total, some_sums = gathered(
            part, lse_part, numbers, place, ok, start, splits, DV, BDV, PARTS, TOTALS
        )
        raised = tl.maximum(most, some_most)
        anchor = tl.where(raised == float("-inf"), 0.0, raised)
        shrink, grow = tl.exp2((most - anchor) * LOG2E), tl.exp2((some_most - anchor) * LOG2E)
        total = total * shrink + some_total * grow
        sums = sums * shrink[:, None] + some_sums * grow[:, None]
        most = raised
    joined, whole_lse = settled(most, total, sums)
    batch, head, row = place // (heads * len_q), place // len_q % heads, place % len_q
    at = (out + batch * o_b + head * o_h + row * o_m)[:, None] + d
    tl.store(at, joined.to(out.dtype.element_ty), mask=ok[:, None] & (d < DV))
    if LSE:
        tl.store(lse + place, whole_lse, mask=ok)
