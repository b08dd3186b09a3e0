# ruff: noqa: N803
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
"""Block plans as the attention kernel reads them: each block of a row once, entries side by side in memory.

They are made ready on the device, without waiting for it.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl

from hal_core.plugin_api import BlockPlan

from ...discovery import Chip
from ...memory import Borrowed
from ...runtime.launch import Launcher, launcher

_POINTERS = ("index", "count", "out", "out_count")
#: Entries of a list taken at a time, and how many of those before them they are compared with at a time. Small: lists
#: are short as a rule, and then a row waits for memory and little else.
TILE = {"BLOCK": 32, "AGAINST": 64}


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


def listed_once(plan: BlockPlan, chip: Chip, borrow: Borrowed) -> BlockPlan:
    """The same plan with each row's blocks named once and side by side in memory: int32 of the given sizes, contiguous.

    A row that lists a block twice means it once, as `hal_core.expand_block_plan` has it.
    """
    indices, counts = plan.indices, plan.counts
    if indices.shape[3] <= 1 and counts.is_contiguous():
        return plan
    once = BlockPlan(
        plan.block_q,
        plan.block_k,
        borrow(indices.shape, torch.int32),
        borrow(counts.shape, torch.int32),
    )
    batch, heads, rows, most = indices.shape
    if indices.numel():
        _launcher(chip)(
            (rows, heads, batch),
            (indices, counts, once.indices, once.counts),
            [*indices.stride(), *counts.stride(), most],
        )
    return once


def list_once_signature() -> dict[str, str]:
    """Triton types of `list_once`'s run-time arguments."""
    return dict.fromkeys(list_once.arg_names, "i64") | dict.fromkeys(_POINTERS, "*i32") | {"most": "i32"}


@lru_cache(maxsize=64)
def _launcher(chip: Chip) -> Launcher:
    return launcher(chip, list_once, list_once_signature(), TILE, num_warps=4)
