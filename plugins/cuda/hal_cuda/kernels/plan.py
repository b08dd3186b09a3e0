# ruff: noqa: N803
"""Block plans as the attention kernel reads them: each block of a row once, entries side by side."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def list_once(
    index,
    count,
    out,
    out_count,
    index_b,
    index_h,
    index_m,
    index_n,
    count_b,
    count_h,
    count_m,
    most,
    BLOCK: tl.constexpr,
    AGAINST: tl.constexpr,
):
    """Copy the blocks that each row of a plan lists, leaving out those listed before, in their order.

    Grid: (query blocks, heads, batch entries) of the plan. out: [batch, heads, query blocks, most], out_count without
    the last dimension, both contiguous. Entries are compared with all before them: few, next to the products of one
    block.
    """
    row, head, batch = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    source = index + batch * index_b + head * index_h + row.to(tl.int64) * index_m
    listed = tl.minimum(tl.load(count + batch * count_b + head * count_h + row.to(tl.int64) * count_m), most)
    target = (batch * tl.num_programs(1) + head) * tl.num_programs(0) + row
    lane, kept = tl.arange(0, BLOCK), 0
    for start in tl.range(0, listed, BLOCK):
        place = start + lane
        block = tl.load(source + place.to(tl.int64) * index_n, mask=place < listed, other=-1)
        seen = tl.zeros([BLOCK], tl.int32)
        for before in tl.range(0, tl.minimum(start + BLOCK, listed), AGAINST):
            earlier = before + tl.arange(0, AGAINST)
            other = tl.load(source + earlier.to(tl.int64) * index_n, mask=earlier < listed, other=-2)
            same = (block[:, None] == other[None, :]) & (earlier[None, :] < place[:, None])
            seen = tl.maximum(seen, tl.max(same.to(tl.int32), 1))
        fresh = ((place < listed) & (seen == 0)).to(tl.int32)
        tl.store(out + target * most + kept + tl.cumsum(fresh, 0) - fresh, block, mask=fresh != 0)
        kept += tl.sum(fresh, 0)
    tl.store(out_count + target, kept)
