"""How a problem is cut: groups of heads, query blocks, and the key chunks that each one reads."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from hal_core.plugin_api import AttentionRequest, BlockPlan

from ..tiling import TileSizes
from .keyvalue import Columns, KeyValue
from .scores import Band, ScoreRule, split_heads


class Problem(NamedTuple):
    """One dense batch of attention, lengths exact, as the tiled and the decode path see it.

    Attributes:
        request: the call, with exact lengths.
        query: [batch, heads_q, len_q, dim_qk].
        source: key and value.
        mask: split_heads form, or None.
        band, rule: causal and window; scale and softcap.
        visible: bool [batch or 1, heads or 1, query blocks, key blocks] of a block plan, or None.
        rng: (seed, offset) of dropout, or None.
        first_batch: number of the first batch entry in the whole call, for dropout.
    """

    request: AttentionRequest
    query: Tensor
    source: KeyValue
    mask: Tensor | None
    band: Band
    rule: ScoreRule
    visible: Tensor | None = None
    rng: tuple[int, int] | None = None
    first_batch: int = 0

    @property
    def group(self) -> int:
        return self.query.shape[1] // self.source.key.shape[1]

    @property
    def heads_kv(self) -> int:
        return self.source.key.shape[1]


def build_problem(
    request: AttentionRequest,
    query: Tensor,
    source: KeyValue,
    mask: Tensor | None,
    plan: BlockPlan | None = None,
    rng: tuple[int, int] | None = None,
    first_batch: int = 0,
) -> Problem:
    heads_kv = source.key.shape[1]
    return Problem(
        request,
        query,
        source,
        None if mask is None else split_heads(mask, heads_kv, query.shape[1] // heads_kv),
        Band.of(request, query.shape[2], source.length),
        ScoreRule.of(request),
        None if plan is None else visible_blocks(plan, source.length),
        rng,
        first_batch,
    )


def visible_blocks(plan: BlockPlan, len_k: int) -> Tensor:
    """A block plan as bool [batch or 1, heads or 1, query blocks, key blocks]."""
    blocks = -(-len_k // plan.block_k)
    listed = torch.arange(plan.indices.shape[-1]) < plan.counts.unsqueeze(-1)
    # Entries past the count, and blocks past a shorter sequence, go to a column beyond the last, which is cut off
    # again.
    column = torch.where(listed, plan.indices, blocks).clamp_(max=blocks).long()
    visible = torch.zeros((*plan.indices.shape[:-1], blocks + 1), dtype=torch.bool)
    return visible.scatter_(-1, column, True)[..., :blocks]


class Tile(NamedTuple):
    """Key/value heads `heads` of batch entries `batch`; query rows `rows` of each head in their groups."""

    batch: slice
    heads: slice
    rows: slice

    @property
    def pairs(self) -> int:
        """Batch entries times key/value heads."""
        return int((self.batch.stop - self.batch.start) * (self.heads.stop - self.heads.start))

    @property
    def row_count(self) -> int:
        return int(self.rows.stop - self.rows.start)


def heads_differ(problem: Problem) -> bool:
    """Whether a block plan has a pattern of its own for each head or batch entry."""
    return problem.visible is not None and (problem.visible.shape[0] > 1 or problem.visible.shape[1] > 1)


def head_groups(problem: Problem, sizes: TileSizes) -> Iterator[tuple[slice, slice]]:
    """(batch entries, key/value heads) that are worked on together."""
    for b in range(0, problem.query.shape[0], sizes.batch):
        for h in range(0, problem.heads_kv, sizes.heads):
            yield (
                slice(b, min(b + sizes.batch, problem.query.shape[0])),
                slice(h, min(h + sizes.heads, problem.heads_kv)),
            )


def row_tiles(problem: Problem, sizes: TileSizes, batch: slice, heads: slice) -> Iterator[Tile]:
    len_q = problem.query.shape[2]
    for q in range(0, len_q, sizes.rows):
        yield Tile(batch, heads, slice(q, min(q + sizes.rows, len_q)))


def column_chunks(problem: Problem, sizes: TileSizes, tile: Tile) -> Iterator[tuple[Columns, Tensor | None]]:
    """The key chunks that a tile's rows read, each with the hidden pairs.

    Hidden pairs are bool, broadcastable to [batch, heads_kv, group, rows, columns]; None where all are visible.
    """
    start, stop = problem.band.range(tile.rows, problem.source.length)
    if problem.visible is not None:
        yield from _planned_chunks(problem, sizes, tile, start, stop)
        return
    for k in range(start, stop, sizes.columns):
        columns = slice(k, min(k + sizes.columns, stop))
        yield columns, problem.band.hidden(tile.rows, columns)


def _planned_chunks(
    problem: Problem, sizes: TileSizes, tile: Tile, start: int, stop: int
) -> Iterator[tuple[Columns, Tensor | None]]:
    assert problem.visible is not None
    assert problem.request.block_plan is not None
    block_q, block_k, _ = problem.request.block_plan
    visible = problem.visible[:, :, tile.rows.start // block_q]  # [batch or 1, heads or 1, key blocks]
    if visible.shape[0] > 1:
        visible = visible[tile.batch]
    if visible.shape[1] > 1:
        visible = visible[:, tile.heads.start * problem.group : tile.heads.stop * problem.group]
    first, last = start // block_k, -(-stop // block_k)
    wanted = visible.flatten(0, 1)[:, first:last]
    used = wanted.any(0)
    uniform = bool((wanted == used).all())
    for part in (used.nonzero().squeeze(1) + first).split(max(sizes.columns // block_k, 1)):
        columns = (part.unsqueeze(1) * block_k + torch.arange(block_k)).flatten()
        columns = columns[(columns >= start) & (columns < stop)]
        if not len(columns):
            continue
        hidden = problem.band.hidden(tile.rows, columns)
        if not uniform:  # heads of one group with patterns of their own
            absent = ~visible[..., columns // block_k]  # [1, group, columns]
            absent = absent.view(1, 1, -1, 1, len(columns))
            hidden = absent if hidden is None else hidden | absent
        yield columns, hidden
