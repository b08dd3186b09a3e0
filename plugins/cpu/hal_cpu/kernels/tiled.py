"""Attention tile by tile with a running maximum and sum: memory grows with the lengths, never with their product.

Source: Milakov & Gimelshein 2018 (online softmax); Rabe & Staats 2021; Dao et al. 2022 (FlashAttention), algorithm 1.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from hal_core.plugin_api import AttentionOutput, MemoryManager

from ..tiling import TileSizes
from .dropout import keep_mask
from .keyvalue import Columns
from .problem import Problem, Tile, column_chunks, head_groups, heads_differ, row_tiles
from .scores import LN2, hide, mask_tile
from .workspace import tiled_scratch


class Scratch(NamedTuple):
    """Flat memory for one tile, reused by every tile."""

    scores: Tensor
    query: Tensor
    key: Tensor
    value: Tensor
    out: Tensor
    words: Tensor | None

    @classmethod
    def carve(cls, block: Tensor, sizes: list[int]) -> Scratch:
        scores, query, key, value, out, words = block.split(sizes)
        return cls(scores, query, key, value, out, words.view(torch.int32) if sizes[5] else None)


def forward(problem: Problem, memory: MemoryManager, out: Tensor, tile_size: int | None = None) -> AttentionOutput:
    """Attention of a dense batch.

    Args:
        memory: where the scratch of one tile comes from; its limit is checked before anything is computed.
        out: [batch, heads_q, len_q, dim_v], written.

    Returns:
        (out, lse), lse where the request asks for it.
    """
    sizes = choose_sizes(problem, tile_size)
    parts = tiled_scratch(problem.request, sizes)
    dtype = problem.source.dtype
    lse = torch.empty(problem.query.shape[:3], dtype=dtype) if problem.request.lse else None
    buffer = memory.allocate((sum(parts),), str(dtype).removeprefix("torch."))
    try:
        _run(problem, sizes, Scratch.carve(buffer.tensor, parts), out, lse)
    finally:
        memory.free(buffer)
    return AttentionOutput(out, lse)


def choose_sizes(problem: Problem, tile_size: int | None) -> TileSizes:
    return TileSizes.choose(problem.request, torch.get_num_threads(), one_head=heads_differ(problem), tile=tile_size)


def _run(problem: Problem, sizes: TileSizes, scratch: Scratch, out: Tensor, lse: Tensor | None) -> None:
    group = problem.group
    for batch, heads in head_groups(problem, sizes):
        query_heads = slice(heads.start * group, heads.stop * group)
        for tile in row_tiles(problem, sizes, batch, heads):
            result, level = attend_rows(problem, sizes, scratch, tile)
            shape = (batch.stop - batch.start, query_heads.stop - query_heads.start, tile.row_count)
            out[batch, query_heads, tile.rows] = result.view(*shape, -1)
            if lse is not None:
                lse[batch, query_heads, tile.rows] = level.view(shape)


def attend_rows(problem: Problem, sizes: TileSizes, scratch: Scratch, tile: Tile) -> tuple[Tensor, Tensor]:
    """One block of query rows against all its keys.

    Returns:
        (out, lse): [pairs, group * rows, dim_v], in scratch memory, and natural log-sum-exp [pairs, group * rows, 1].
    """
    query = scaled_query(problem, tile, scratch.query)
    many, rows = query.shape[:2]
    dim_v = problem.source.value.shape[-1]
    out = scratch.out[: many * rows * dim_v].view(many, rows, dim_v).zero_()
    top = query.new_full((many, rows, 1), -math.inf)
    total = query.new_zeros((many, rows, 1))
    for columns, hidden in column_chunks(problem, sizes, tile):
        scores = tile_scores(problem, tile, columns, hidden, query, scratch)
        new_top = torch.maximum(top, scores.amax(-1, keepdim=True))
        anchor = new_top.masked_fill(new_top == -math.inf, 0)  # rows without a key so far: exp2(-inf - 0) = 0
        weights = scores.sub_(anchor).exp2_()
        shrink = torch.exp2(top - anchor)
        total.mul_(shrink).add_(weights.sum(-1, keepdim=True))
        if problem.request.dropout:
            weights.mul_(kept(problem, tile, columns, scratch))
        value = problem.source.values(tile.batch, tile.heads, columns, scratch.value)
        out.mul_(shrink).baddbmm_(weights, value)
        top = new_top
    out.div_(torch.where(total == 0, 1, total))
    return out, (top + total.log2()) * LN2


def scaled_query(problem: Problem, tile: Tile, memory: Tensor) -> Tensor:
    """The tile's query rows times the rule's factor, [pairs, group * rows, dim_qk], heads of a group one after
    another.
    """
    group = problem.group
    part = problem.query[tile.batch, tile.heads.start * group : tile.heads.stop * group, tile.rows]
    query = memory[: part.numel()].view(part.shape)
    query.copy_(part).mul_(problem.rule.factor)
    return query.view(tile.pairs, group * tile.row_count, -1)


def tile_scores(
    problem: Problem,
    tile: Tile,
    columns: Columns,
    hidden: Tensor | None,
    query: Tensor,
    scratch: Scratch,
    slope: Tensor | None = None,
) -> Tensor:
    """Base-2 scores [pairs, group * rows, columns] in scratch memory, -inf where hidden."""
    key = problem.source.keys(tile.batch, tile.heads, columns, scratch.key)
    shape = (*query.shape[:2], key.shape[1])
    scores = scratch.scores[: math.prod(shape)].view(shape)
    torch.bmm(query, key.mT, out=scores)
    problem.rule.apply_cap(scores, slope)
    if problem.mask is not None or hidden is not None:
        mask = None
        if problem.mask is not None:
            mask = mask_tile(problem.mask, tile.batch, tile.heads, tile.rows, columns)
        hide(scores.view(*tile_shape(problem, tile), shape[2]), mask, hidden)
    return scores


def tile_shape(problem: Problem, tile: Tile) -> tuple[int, int, int, int]:
    """(batch, heads_kv, group, rows) of a tile."""
    return (
        tile.batch.stop - tile.batch.start,
        tile.heads.stop - tile.heads.start,
        problem.group,
        tile.row_count,
    )


def kept(problem: Problem, tile: Tile, columns: Columns, scratch: Scratch) -> Tensor:
    """What dropout multiplies weights [pairs, group * rows, columns] with: 0, or 1 / (1 - probability)."""
    assert problem.rng is not None
    assert scratch.words is not None
    probability = problem.request.dropout
    batch = slice(tile.batch.start + problem.first_batch, tile.batch.stop + problem.first_batch)
    heads = slice(tile.heads.start * problem.group, tile.heads.stop * problem.group)
    keep = keep_mask(problem.rng, probability, batch, heads, tile.rows, columns, scratch.words)
    factors = keep.to(problem.source.dtype).mul_(1 / (1 - probability) if probability < 1 else 0)
    return factors.view(tile.pairs, problem.group * tile.row_count, -1)
