# ruff: noqa: N803
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
"""Block plans as the attention kernels read them: each block of a row once, entries side by side in memory; for the
gradients of keys also turned around, the rows that read each block.

They are made ready on the device, without waiting for it.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from hal_core.plugin_api import BlockPlan

from ...discovery import Chip
from ...memory import Borrowed
from ...runtime.launch import Launcher, launcher

_POINTERS = ("index", "count", "out", "out_count")
#: Entries of a list taken at a time, and how many of those before them they are compared with at a time. Small: lists
#: are short as a rule, and then a row waits for memory and little else.
TILE = {"BLOCK": 32, "AGAINST": 64}
#: Entries of a list that `mark_blocks` takes at a time, and query blocks that `list_rows` does.
BLOCKS = (128, 256)


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


@triton.jit
def mark_blocks(
    index,
    count,
    listed,
    index_b,
    index_h,
    index_m,
    index_n,
    count_b,
    count_h,
    count_m,
    most,
    blocks_k,
    BLOCK: tl.constexpr,
):
    """Set the byte listed[batch, head, key block, query block] of every pair that the plan names; the others are 0.

    Grid: (query blocks, heads, batch entries) of the plan. Numbers of no block are left out.
    """
    row, head, batch = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    source = index + batch * index_b + head * index_h + row.to(tl.int64) * index_m
    named = tl.minimum(tl.load(count + batch * count_b + head * count_h + row.to(tl.int64) * count_m), most)
    target = listed + (batch * tl.num_programs(1) + head) * blocks_k * tl.num_programs(0) + row
    for start in tl.range(0, named, BLOCK):
        place = start + tl.arange(0, BLOCK)
        block = tl.load(source + place.to(tl.int64) * index_n, mask=place < named, other=-1)
        at = target + block.to(tl.int64) * tl.num_programs(0)
        tl.store(at, tl.full([BLOCK], 1, tl.uint8), mask=(block >= 0) & (block < blocks_k))


@triton.jit
def list_rows(listed, out, out_count, rows, BLOCK: tl.constexpr):
    """out[key block]: the query blocks that name it, rising, and out_count how many. Grid: all key blocks.

    listed: bytes of `mark_blocks`, [key blocks of all heads, rows], as out is.
    """
    block = tl.program_id(0).to(tl.int64)
    lane, kept = tl.arange(0, BLOCK), 0
    for start in tl.range(0, rows, BLOCK):
        row = start + lane
        there = (tl.load(listed + block * rows + row, mask=row < rows, other=0) != 0).to(tl.int32)
        tl.store(out + block * rows + kept + tl.cumsum(there, 0) - there, row, mask=there != 0)
        kept += tl.sum(there, 0)
    tl.store(out_count + block, kept)


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


class RowLists(NamedTuple):
    """A plan turned around. Sizes of 1 are those of the plan.

    listed: bool [batch or 1, heads or 1, key blocks, query blocks]. indices, counts: int32, for each key block the
    query blocks that name it, [batch or 1, heads or 1, key blocks, query blocks], and how many, without the last.
    """

    listed: Tensor
    indices: Tensor
    counts: Tensor


def rows_of_blocks(plan: BlockPlan, len_k: int, chip: Chip, borrow: Borrowed) -> RowLists:
    """Which query blocks name each key block of len_k keys, made on the device without waiting for it."""
    batch, heads, rows, most = plan.indices.shape
    blocks_k = -(-len_k // plan.block_k)
    shape = (batch, heads, blocks_k, rows)
    turned = RowLists(borrow(shape, torch.bool), borrow(shape, torch.int32), borrow(shape[:3], torch.int32))
    turned.listed.zero_()
    mark, list_all = _row_launchers(chip)
    if plan.indices.numel() and blocks_k:
        arguments = [*plan.indices.stride(), *plan.counts.stride(), most, blocks_k]
        mark((rows, heads, batch), (plan.indices, plan.counts, turned.listed), arguments)
    if turned.counts.numel():
        list_all((batch * heads * blocks_k, 1, 1), turned, [rows])
    return turned


def row_signatures() -> tuple[dict[str, str], dict[str, str]]:
    """Triton types of the run-time arguments of `mark_blocks` and `list_rows`."""
    marking = dict.fromkeys(mark_blocks.arg_names, "i64") | dict.fromkeys(("index", "count"), "*i32")
    marking |= {"listed": "*u8", "most": "i32", "blocks_k": "i32"}
    return marking, {"listed": "*u8", "out": "*i32", "out_count": "*i32", "rows": "i32"}


@lru_cache(maxsize=64)
def _row_launchers(chip: Chip) -> tuple[Launcher, Launcher]:
    marking, listing = row_signatures()
    return (
        launcher(chip, mark_blocks, marking, {"BLOCK": BLOCKS[0]}, num_warps=4),
        launcher(chip, list_rows, listing, {"BLOCK": BLOCKS[1]}, num_warps=4),
    )


def list_once_signature() -> dict[str, str]:
    """Triton types of `list_once`'s run-time arguments."""
    return dict.fromkeys(list_once.arg_names, "i64") | dict.fromkeys(_POINTERS, "*i32") | {"most": "i32"}


@lru_cache(maxsize=64)
def _launcher(chip: Chip) -> Launcher:
    return launcher(chip, list_once, list_once_signature(), TILE, num_warps=4)
