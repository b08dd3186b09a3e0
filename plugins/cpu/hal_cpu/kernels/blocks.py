"""Attention by a block plan: the blocks that a plan lists are gathered, and many query blocks are multiplied at once.

A query block's keys are all in one product, so a row's softmax needs no running maximum. Query blocks are taken in the
order of how many key blocks they read, so that those that are multiplied together read about as many.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from hal_core.plugin_api import BlockPlan

from ..memory import ScratchMemory, Workspace
from ..tiling import BlockSizes
from .problem import Problem
from .scores import Band, HiddenPairs
from .workspace import BlockParts


class Scratch(NamedTuple):
    """Flat memory of a call; parts as in `BlockParts`, in the dtype that sums are made in."""

    scores: Tensor
    key: Tensor
    value: Tensor
    query: Tensor
    out: Tensor
    whole_query: Tensor
    whole_out: Tensor
    whole_key: Tensor
    whole_value: Tensor
    statistics: Tensor
    listed: Tensor
    hidden: Tensor
    grad_scores: Tensor
    slope: Tensor
    grad_out: Tensor
    whole_grad_out: Tensor
    key_sum: Tensor
    value_sum: Tensor

    @classmethod
    def take(cls, problem: Problem, workspace: Workspace, *, backward: bool = False) -> Scratch:
        sizes = BlockSizes.of(problem.request, torch.get_num_threads())
        parts = BlockParts.of(problem.request, sizes, backward=backward)
        return cls(*workspace.take((sum(parts),), problem.source.dtype).split(list(parts)))


class Listed(NamedTuple):
    """What the query blocks of one pattern read, ascending and each block once.

    Attributes:
        blocks: int64 [query blocks, max_blocks]; entries past the count repeat the last one, or hold the number of key
            blocks where there is none.
        counts: int64 [query blocks]. order: query blocks by their counts.
        partial: bool [query blocks, max_blocks]: blocks of which causal, window or the end of the keys hide a part.
    """

    blocks: Tensor
    counts: Tensor
    order: Tensor
    partial: Tensor


class Chunk(NamedTuple):
    """Query blocks that are multiplied at once.

    Attributes:
        units: int64 [n], numbers of query blocks. counts: how many key blocks each reads.
        picked: int64 [n, most], key blocks; past the count the last one again.
        partial: pairs (unit's place, entry's place).
    """

    units: Tensor
    counts: list[int]
    picked: Tensor
    partial: list[list[int]]

    @property
    def most(self) -> int:
        return self.picked.shape[1]


class Heads(NamedTuple):
    """One pattern's heads of one batch entry: a query head, or all that share a key head where they share a pattern.

    Attributes:
        batch, head_kv: numbers. queries: query heads. key, value: [key blocks, block_k, dim]. listed: the pattern.
    """

    batch: int
    head_kv: int
    queries: slice
    key: Tensor
    value: Tensor
    listed: Listed

    @property
    def many(self) -> int:
        return int(self.queries.stop - self.queries.start)


def forward(problem: Problem, plan: BlockPlan, memory: ScratchMemory, out: Tensor, lse: Tensor | None) -> None:
    """Attention of a dense batch by a block plan.

    Args:
        memory: where scratch comes from. out: [batch, heads_q, len_q, dim_v], written. lse: [batch, heads_q, len_q],
            written; None: not asked for.
    """
    plan = plan._replace(block_q=max(min(plan.block_q, problem.query.shape[2]), 1))
    with Workspace(memory) as workspace:
        _run(problem, plan, Scratch.take(problem, workspace), out, lse)


def _run(problem: Problem, plan: BlockPlan, scratch: Scratch, out: Tensor, lse: Tensor | None) -> None:
    block_q, blocks_q = plan.block_q, -(-problem.query.shape[2] // plan.block_q)
    dim_v = problem.source.value.shape[-1]
    hidden = hidden_pairs(problem, scratch)
    for heads in walk(problem, plan, scratch):
        rows = heads.many * block_q
        query = to_blocks(problem.query[heads.batch, heads.queries], block_q, scratch.whole_query)
        query.mul_(problem.rule.factor)
        result = scratch.whole_out[: blocks_q * rows * dim_v].view(blocks_q, rows, dim_v)
        levels = scratch.statistics[: blocks_q * rows].view(blocks_q, rows, 1)
        for chunk in chunks(problem, plan, heads):
            n, most = len(chunk.counts), chunk.most
            if not most:
                result[chunk.units], levels[chunk.units] = 0, -math.inf
                continue
            key = gathered(heads.key, chunk, scratch.key)
            scores = scores_of(
                problem, plan, chunk, heads, picked_rows(query, chunk.units, scratch.query), key, scratch
            )
            hide(problem, plan, chunk, scores, heads.many, hidden)
            top, anchor, total = scratch.statistics[blocks_q * rows :][: 3 * n * rows].view(3, n, rows, 1)
            torch.amax(scores, -1, keepdim=True, out=top)
            anchor.copy_(top).masked_fill_(top == -math.inf, 0)
            weights = problem.rule.exponentials(scores, anchor)
            torch.sum(weights, -1, keepdim=True, out=total)
            part = scratch.out[: n * rows * dim_v].view(n, rows, dim_v)
            torch.bmm(weights, gathered(heads.value, chunk, scratch.value), out=part)
            part.div_(torch.add(total, total == 0, out=anchor))
            result.index_copy_(0, chunk.units, part)
            levels.index_copy_(0, chunk.units, problem.rule.log_sum_exp(top, total))
        from_blocks(result, block_q, out[heads.batch, heads.queries])
        if lse is not None:
            from_blocks(levels, block_q, lse[heads.batch, heads.queries].unsqueeze(-1))


def walk(problem: Problem, plan: BlockPlan, scratch: Scratch) -> Iterator[Heads]:
    """Every pattern's heads of every batch entry, those of one key head one after another."""
    batches, patterns = plan.indices.shape[:2]
    of, listed = -1, None
    for batch in range(problem.query.shape[0]):
        number = batch if batches > 1 else 0
        for head in range(problem.heads_kv):
            key = key_blocks(problem.source.key[batch, head], plan.block_k, scratch.whole_key)
            value = key_blocks(problem.source.value[batch, head], plan.block_k, scratch.whole_value)
            first = head * problem.group
            if patterns == 1:
                if listed is None or of != number:
                    of, listed = number, listed_blocks(problem, plan, number, 0, scratch)
                yield Heads(batch, head, slice(first, first + problem.group), key, value, listed)
                continue
            for query_head in range(first, first + problem.group):
                own = listed_blocks(problem, plan, number, query_head, scratch)
                yield Heads(batch, head, slice(query_head, query_head + 1), key, value, own)


def listed_blocks(problem: Problem, plan: BlockPlan, batch: int, head: int, scratch: Scratch) -> Listed:
    """A pattern's blocks in order, without repetitions and without what causal and window hide as a whole."""
    len_q, len_k = problem.query.shape[2], problem.source.length
    rows, none = -(-len_q // plan.block_q), -(-len_k // plan.block_k)
    given, most = plan.indices[batch, head, :rows], min(plan.indices.shape[-1], none)
    # A list longer than `most` repeats blocks or is for a longer sequence: sorting moves what counts to its front.
    many = given.numel()
    room = scratch.listed.view(torch.uint8)
    first, second, places = room[: 24 * many].view(torch.int64).view(3, *given.shape)
    flags = room[24 * many : 25 * many].view(torch.bool).view(given.shape)
    torch.ge(torch.arange(given.shape[-1]), plan.counts[batch, head, :rows].unsqueeze(-1), out=flags)
    first.copy_(given).masked_fill_(flags, none).clamp_(max=none)
    starts = torch.arange(rows).mul_(plan.block_q).unsqueeze(1)
    lower, upper = problem.band
    if upper is not None:
        last = (starts + plan.block_q).clamp_(max=len_q) - 1 + upper
        first.masked_fill_(torch.gt(first, last.div(plan.block_k, rounding_mode="floor"), out=flags), none)
    if lower is not None:
        before = (starts + lower).div(plan.block_k, rounding_mode="floor")
        first.masked_fill_(torch.lt(first, before, out=flags), none)
    torch.sort(first, -1, out=(second, places))
    if second.shape[1] > 1:
        repeated = torch.eq(second[:, 1:], second[:, :-1], out=flags[:, 1:])
        second[:, 1:].masked_fill_(repeated, none)
    torch.sort(second, -1, out=(first, places))
    counts = torch.lt(first, none, out=flags).sum(-1)
    _partial(problem.band, plan, starts, first, len_k, flags)
    # What is gathered past a list's end has the weight 0; another block's infinity would make it NaN, its own does so
    # anyway.
    if first.shape[1]:
        torch.minimum(first, first.gather(1, (counts - 1).clamp_(min=0).unsqueeze(1)), out=first)
    return Listed(first[:, :most], counts, counts.argsort(stable=True), flags[:, :most])


def _partial(band: Band, plan: BlockPlan, starts: Tensor, blocks: Tensor, len_k: int, listed: Tensor) -> None:
    """Leave True in `listed` where a part of a block is hidden: by causal, window, or the end of the keys."""
    lower, upper = band
    last_row = starts + plan.block_q - 1
    # A block from `low` to `high`, as numbers of blocks, is read whole by every row of the query block.
    low = torch.zeros_like(starts)
    high = torch.full_like(starts, len_k // plan.block_k - 1)
    if upper is not None:
        high = torch.minimum(high, (starts + upper + 1).div(plan.block_k, rounding_mode="floor") - 1)
    if lower is not None:
        low = torch.maximum(low, -(-(last_row + lower)).div(plan.block_k, rounding_mode="floor"))
    step = max((1 << 15) // max(blocks.shape[1], 1), 1)
    for row in range(0, len(blocks), step):
        part = slice(row, row + step)
        listed[part] &= (blocks[part] < low[part]) | (blocks[part] > high[part])


def chunks(problem: Problem, plan: BlockPlan, heads: Heads) -> Iterator[Chunk]:
    """Query blocks that are multiplied at once: as many as there is room for, by how many key blocks they read.

    Those that read none are apart.
    """
    sizes, listed = BlockSizes.of(problem.request, torch.get_num_threads()), heads.listed
    share = problem.group // heads.many
    room, at_most = sizes.at_once * share * sizes.keys // plan.block_k, sizes.at_most * share
    counts = listed.counts[listed.order].tolist()
    start = 0
    while start < len(counts):
        stop = start + 1
        while (
            stop < min(len(counts), start + at_most)
            and (stop + 1 - start) * counts[stop] <= room
            and (counts[start] > 0) == (counts[stop] > 0)
        ):
            stop += 1
        units, most = listed.order[start:stop], counts[stop - 1]
        partial = listed.partial[units, :most].nonzero().tolist()
        yield Chunk(units, counts[start:stop], listed.blocks[units, :most], partial)
        start = stop


def key_blocks(tensor: Tensor, size: int, room: Tensor) -> Tensor:
    """[length, dim] as [blocks, size, dim]: a view where it can be, else a copy that ends with zeros."""
    length, dim = tensor.shape
    if not room.numel():
        view: Tensor = tensor.unflatten(0, (-1, size))
        return view
    blocks = -(-length // size)
    whole = room[: blocks * size * dim].view(blocks * size, dim)
    whole[:length].copy_(tensor)
    whole[length:].zero_()
    return whole.view(blocks, size, dim)


def to_blocks(tensor: Tensor, size: int, room: Tensor) -> Tensor:
    """Rows [heads, length, dim] as [blocks, heads * size, dim], the last one filled up with zeros."""
    heads, length, dim = tensor.shape
    blocks, full = -(-length // size), length // size
    whole = room[: blocks * heads * size * dim].view(blocks, heads, size, dim)
    whole[:full].copy_(tensor[:, : full * size].unflatten(1, (full, size)).transpose(0, 1))
    if full < blocks:
        whole[full, :, : length - full * size].copy_(tensor[:, full * size :])
        whole[full, :, length - full * size :].zero_()
    return whole.view(blocks, heads * size, dim)


def from_blocks(whole: Tensor, size: int, out: Tensor) -> None:
    """What `to_blocks` does, backwards: [blocks, heads * size, dim] to `out` [heads, length, dim]."""
    heads, length, dim = out.shape
    full = length // size
    rows = whole.view(-1, heads, size, dim)
    out[:, : full * size].unflatten(1, (full, size)).copy_(rows[:full].transpose(0, 1))
    if full * size < length:
        out[:, full * size :].copy_(rows[full, :, : length - full * size])


def picked_rows(whole: Tensor, units: Tensor, room: Tensor) -> Tensor:
    """The rows of some query blocks, [n, rows, dim]."""
    shape = (len(units), *whole.shape[1:])
    picked: Tensor = room[: math.prod(shape)].view(shape)
    torch.index_select(whole, 0, units, out=picked)
    return picked


def gathered(blocks: Tensor, chunk: Chunk, room: Tensor) -> Tensor:
    """The keys or values that each query block reads, [n, most * block_k, dim]; past its count the last block again."""
    n, most, (_, size, dim) = len(chunk.counts), chunk.most, blocks.shape
    whole = room[: n * most * size * dim].view(n * most, size, dim)
    torch.index_select(blocks, 0, chunk.picked.flatten(), out=whole)
    return whole.view(n, most * size, dim)


def scores_of(
    problem: Problem,
    plan: BlockPlan,
    chunk: Chunk,
    heads: Heads,
    query: Tensor,
    key: Tensor,
    scratch: Scratch,
    slope: Tensor | None = None,
) -> Tensor:
    """Scores [n, rows, most * block_k], nothing hidden yet."""
    shape = (len(chunk.counts), heads.many * plan.block_q, chunk.most * plan.block_k)
    scores = scratch.scores[: math.prod(shape)].view(shape)
    torch.bmm(query, key.mT, out=scores)
    return problem.rule.apply_cap(scores, slope)


def hidden_pairs(problem: Problem, scratch: Scratch) -> HiddenPairs:
    return HiddenPairs(problem.band, scratch.hidden.view(torch.bool))


def hide(problem: Problem, plan: BlockPlan, chunk: Chunk, scores: Tensor, heads: int, hidden: HiddenPairs) -> None:
    """Write -inf where a list has ended, and where causal, window or the end of the keys hide a pair."""
    block_q, block_k, len_k = plan.block_q, plan.block_k, problem.source.length
    whole = scores.view(len(chunk.counts), heads, block_q, chunk.most, block_k)
    if chunk.counts[0] < chunk.most:
        for place, count in enumerate(chunk.counts):
            if count < chunk.most:
                whole[place, :, :, count:] = -math.inf
    if not chunk.partial:
        return
    units, picked = chunk.units.tolist(), chunk.picked.tolist()
    for place, entry in chunk.partial:
        row, key = units[place] * block_q, picked[place][entry] * block_k
        block = whole[place, :, :, entry]
        if key + block_k > len_k:
            block[..., len_k - key :] = -math.inf
        pairs = hidden.of(slice(row, row + block_q), slice(key, key + block_k))
        if pairs is not None:
            block.masked_fill_(pairs, -math.inf)
