"""Attention tile by tile with a running maximum and sum: memory grows with the lengths, never with their product.

Source: Milakov & Gimelshein 2018 (online softmax); Rabe & Staats 2021; Dao et al. 2022 (FlashAttention), algorithm 1.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..memory import ScratchMemory, Workspace
from .dropout import keep_mask
from .keyvalue import Columns, Room, runs, width
from .problem import Problem, Tile, column_chunks, head_groups, row_tiles
from .scores import HiddenPairs, apply_mask, mask_tile
from .workspace import TiledParts


class Scratch:
    """Flat memory for one tile, reused by every tile. Parts as in `TiledParts`, in the dtype that sums are made in."""

    def __init__(self, problem: Problem, memory: Tensor, parts: TiledParts) -> None:
        self.scores, self.query, self.out, key, value, pages, self.statistics, hidden, self.mask, *random = (
            memory.split(list(parts))
        )
        self.random, self.row_words = random
        stored = pages.view(torch.uint8)
        self.key, self.value = Room(key, stored), Room(value, stored)
        self.hidden = HiddenPairs(problem.band, hidden.view(torch.bool))


def forward(problem: Problem, memory: ScratchMemory, out: Tensor, lse: Tensor | None) -> None:
    """Attention of a dense batch.

    Args:
        memory: where the scratch of one tile comes from; its limit is checked before anything is computed.
        out: [batch, heads_q, len_q, dim_v], written. lse: [batch, heads_q, len_q], written; None: not asked for.
    """
    parts = TiledParts.of(problem.request, problem.sizes())
    with Workspace(memory) as workspace:
        _run(problem, Scratch(problem, workspace.take((sum(parts),), problem.source.dtype), parts), out, lse)


def _run(problem: Problem, scratch: Scratch, out: Tensor, lse: Tensor | None) -> None:
    for batch, heads in head_groups(problem):
        for tile in row_tiles(problem, batch, heads):
            result, top, total = attend_rows(problem, scratch, tile)
            place = (batch, tile.query_heads(problem.group), tile.rows)
            shape = (batch.stop - batch.start, -1, tile.row_count)
            out[place] = result.view(*shape, result.shape[-1])
            if lse is not None:
                lse[place] = problem.rule.log_sum_exp(top, total).view(shape)


def attend_rows(problem: Problem, scratch: Scratch, tile: Tile) -> tuple[Tensor, Tensor, Tensor]:
    """One block of query rows against all its keys.

    Returns:
        (out, top, total) in scratch memory: [pairs, group * rows, dim_v], and the scores' maximum (in the rule's unit)
        and the sum of exponentials below it, [pairs, group * rows, 1]. A row without a key has -inf and 0.
    """
    query = scaled_query(problem, tile, scratch.query)
    many, rows = query.shape[:2]
    dim_v = problem.source.dim_v
    out = scratch.out[: many * rows * dim_v].view(many, rows, dim_v).zero_()
    top, new_top, anchor, shrink, total, part = scratch.statistics[: 6 * many * rows].view(6, many, rows, 1)
    top.fill_(-math.inf)
    total.zero_()
    for columns, absent in column_chunks(problem, tile):
        scores = tile_scores(problem, tile, columns, absent, query, scratch)
        torch.amax(scores, -1, keepdim=True, out=new_top)
        torch.maximum(top, new_top, out=new_top)
        _finite(new_top, anchor)
        weights = problem.rule.exponentials(scores, anchor)
        problem.rule.exponentials(shrink.copy_(top), anchor)
        torch.sum(weights, -1, keepdim=True, out=part)
        total.mul_(shrink).add_(part)
        if problem.request.dropout:
            weights.mul_(kept(problem, tile, columns, scratch))
        value = problem.source.values(tile.batch, tile.heads, columns, scratch.value)
        out.mul_(shrink).baddbmm_(weights, value)
        top, new_top = new_top, top
    torch.add(total, (total == 0), out=part)
    out.div_(part)
    return out, top, total


def sums_of_rows(problem: Problem, scratch: Scratch, tile: Tile, query: Tensor) -> tuple[Tensor, Tensor]:
    """The maximum of a tile's scores and the sum of exponentials below it, as in `attend_rows`, without the values."""
    many, rows = query.shape[:2]
    top, new_top, anchor, shrink, total, part = scratch.statistics[: 6 * many * rows].view(6, many, rows, 1)
    top.fill_(-math.inf)
    total.zero_()
    for columns, absent in column_chunks(problem, tile):
        scores = tile_scores(problem, tile, columns, absent, query, scratch)
        torch.amax(scores, -1, keepdim=True, out=new_top)
        torch.maximum(top, new_top, out=new_top)
        _finite(new_top, anchor)
        problem.rule.exponentials(scores, anchor)
        problem.rule.exponentials(shrink.copy_(top), anchor)
        torch.sum(scores, -1, keepdim=True, out=part)
        total.mul_(shrink).add_(part)
        top, new_top = new_top, top
    return top, total


def _finite(top: Tensor, anchor: Tensor) -> None:
    """`anchor` = `top`, or 0 for rows without a key so far: exp(-inf - 0) = 0."""
    anchor.copy_(top).masked_fill_(top == -math.inf, 0)


def scaled_query(problem: Problem, tile: Tile, memory: Tensor) -> Tensor:
    """The tile's query rows times the rule's factor, [pairs, group * rows, dim_qk], heads of a group one after
    another.
    """
    group = problem.group
    part = problem.query[tile.batch, tile.query_heads(group), tile.rows]
    query: Tensor = memory[: part.numel()].view(part.shape)
    query.copy_(part).mul_(problem.rule.factor)
    return query.view(tile.pairs, group * tile.row_count, part.shape[-1])


def tile_scores(
    problem: Problem,
    tile: Tile,
    columns: Columns,
    absent: Tensor | None,
    query: Tensor,
    scratch: Scratch,
    slope: Tensor | None = None,
) -> Tensor:
    """Scores [pairs, group * rows, columns] in scratch memory, -inf where hidden."""
    key = problem.source.keys(tile.batch, tile.heads, columns, scratch.key)
    shape = (*query.shape[:2], key.shape[1])
    scores: Tensor = scratch.scores[: math.prod(shape)].view(shape)
    torch.bmm(query, key.mT, out=scores)
    problem.rule.apply_cap(scores, slope)
    hidden = scratch.hidden.of(tile.rows, columns)
    if problem.mask is None and hidden is None and absent is None:
        return scores
    whole = scores.view(*tile.shape(problem.group), shape[2])
    if problem.mask is not None:
        for place, run in runs(columns):
            mask = mask_tile(problem.mask, tile.batch, tile.heads, tile.rows, run)
            apply_mask(whole[..., place], mask, problem.rule.unit, scratch.mask)
    for pairs in (hidden, absent):
        if pairs is not None:
            whole.masked_fill_(pairs, -math.inf)
    return scores


def kept(problem: Problem, tile: Tile, columns: Columns, scratch: Scratch) -> Tensor:
    """What dropout multiplies weights [pairs, group * rows, columns] with: 0, or 1 / (1 - probability)."""
    assert problem.rng is not None
    probability = problem.request.dropout
    batch = slice(tile.batch.start + problem.first_batch, tile.batch.stop + problem.first_batch)
    pairs = tile.pairs * problem.group * tile.row_count * width(columns)
    words = scratch.random.view(torch.int32)
    keep = keep_mask(
        problem.rng,
        probability,
        batch,
        tile.query_heads(problem.group),
        tile.rows,
        columns,
        words,
        scratch.row_words.view(torch.int64),
    )
    # `keep` lies behind the first `pairs` words, so the factors fit before it, or in the second half in float64.
    first = 0 if problem.source.dtype == torch.float32 else pairs
    factors: Tensor = scratch.random[first : first + pairs].view(keep.shape).copy_(keep)
    factors.mul_(1 / (1 - probability) if probability < 1 else 0)
    return factors.view(tile.pairs, problem.group * tile.row_count, -1)
