"""One dense batch of attention as the tiled and the decode kernel see it, and its walk over a plan's tiles."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from hal_core.plugin_api import AttentionRequest, BlockPlan, TilePlan

from ..memory import Workspace
from ..tiling import TileSizes
from .keyvalue import Columns, KeyValue, Picked
from .scores import Band, ScoreRule, split_heads


class Problem(NamedTuple):
    """One dense batch of attention, lengths exact.

    Attributes:
        request: the call, with exact lengths. plan: its cut.
        query: [batch, heads_q, len_q, dim_qk].
        source: key and value.
        mask: split_heads form, or None.
        band, rule: causal and window; scale and softcap.
        visible: bool [batch or 1, heads or 1, query blocks, key blocks] of a block plan, or None.
        rng: (seed, offset) of dropout, or None.
        first_batch: number of the first batch entry in the whole call, for dropout.
    """

    request: AttentionRequest
    plan: TilePlan
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
        """Query heads that share a key head."""
        return self.query.shape[1] // self.source.key.shape[1]

    @property
    def heads_kv(self) -> int:
        return self.source.key.shape[1]

    @property
    def heads_differ(self) -> bool:
        """Whether a block plan has a pattern of its own for each head or batch entry."""
        return self.visible is not None and (self.visible.shape[0] > 1 or self.visible.shape[1] > 1)

    def sizes(self, *, one_head: bool = False) -> TileSizes:
        """How many heads are worked on at once, and the largest tile."""
        return TileSizes.of(self.request, self.plan, torch.get_num_threads(), one_head=one_head)

    @classmethod
    def of(
        cls,
        request: AttentionRequest,
        plan: TilePlan,
        query: Tensor,
        source: KeyValue,
        mask: Tensor | None,
        visible: Tensor | None = None,
        rng: tuple[int, int] | None = None,
        first_batch: int = 0,
    ) -> Problem:
        heads_kv = source.key.shape[1]
        return cls(
            request,
            plan,
            query,
            source,
            None if mask is None else split_heads(mask, heads_kv, query.shape[1] // heads_kv),
            Band(*request.band(query.shape[2], source.length)),
            ScoreRule.of(request),
            visible,
            rng,
            first_batch,
        )


def visible_blocks(plan: BlockPlan, len_k: int, workspace: Workspace) -> Tensor:
    """A block plan as bool [batch or 1, heads or 1, query blocks, key blocks], in the workspace's memory."""
    blocks, shape = -(-len_k // plan.block_k), plan.indices.shape
    column = workspace.copy(plan.indices, torch.int64)
    listed = workspace.take(shape, torch.bool)
    torch.lt(torch.arange(shape[-1]), plan.counts.unsqueeze(-1), out=listed)
    # Entries past the count, and blocks past a shorter sequence, go to a column beyond the last, which is cut off.
    torch.where(listed, column, torch.full((), blocks), out=column)
    visible = workspace.take((*shape[:-1], blocks + 1), torch.bool).zero_()
    return visible.scatter_(-1, column.clamp_(max=blocks), True)[..., :blocks]


class Tile(NamedTuple):
    """Key heads `heads` of batch entries `batch`; query rows `rows` of each query head in their groups.

    `spans` are the key ranges that the plan gives to the rows.
    """

    batch: slice
    heads: slice
    rows: slice
    spans: tuple[tuple[int, int], ...] = ()

    @property
    def pairs(self) -> int:
        """Batch entries times key heads."""
        return int((self.batch.stop - self.batch.start) * (self.heads.stop - self.heads.start))

    @property
    def row_count(self) -> int:
        return int(self.rows.stop - self.rows.start)

    def shape(self, group: int) -> tuple[int, int, int, int]:
        """(batch, heads_kv, group, rows)."""
        return self.batch.stop - self.batch.start, self.heads.stop - self.heads.start, group, self.row_count

    def query_heads(self, group: int) -> slice:
        return slice(self.heads.start * group, self.heads.stop * group)


def head_groups(problem: Problem) -> Iterator[tuple[slice, slice]]:
    """(batch entries, key heads) that are worked on together."""
    sizes = problem.sizes(one_head=problem.heads_differ)
    for b in range(0, problem.query.shape[0], sizes.batch):
        for h in range(0, problem.heads_kv, sizes.heads):
            yield (
                slice(b, min(b + sizes.batch, problem.query.shape[0])),
                slice(h, min(h + sizes.heads, problem.heads_kv)),
            )


def row_tiles(problem: Problem, batch: slice, heads: slice) -> Iterator[Tile]:
    """The plan's row ranges in order."""
    for start, stop, spans in problem.plan.rows():
        yield Tile(batch, heads, slice(start, stop), spans)


def column_chunks(problem: Problem, tile: Tile) -> Iterator[tuple[Columns, Tensor | None]]:
    """The key chunks that a tile's rows read: the plan's key ranges without what causal and window hide from all rows.
    Equal blocks are counted from the first key that is left, so that a window's keys are as few chunks as they can be.

    Each comes with the pairs that a block plan hides, bool, broadcastable to [batch, heads_kv, group, rows, columns];
    None where there are none.
    """
    first, last = problem.band.range(tile.rows, problem.source.length)
    if problem.visible is not None:
        yield from _planned_chunks(problem, problem.visible, tile, first, last)
        return
    if problem.plan.ranges is None:
        for start in range(first, last, problem.plan.block_k):
            yield slice(start, min(start + problem.plan.block_k, last)), None
        return
    for start, stop in tile.spans:
        start, stop = max(start, first), min(stop, last)
        if start < stop:
            yield slice(start, stop), None


def _planned_chunks(
    problem: Problem, whole: Tensor, tile: Tile, start: int, stop: int
) -> Iterator[tuple[Columns, Tensor | None]]:
    assert problem.request.block_plan is not None
    block_q, block_k, _ = problem.request.block_plan
    visible = whole[:, :, tile.rows.start // block_q]  # [batch or 1, heads or 1, key blocks]
    if visible.shape[0] > 1:
        visible = visible[tile.batch]
    if visible.shape[1] > 1:
        visible = visible[:, tile.query_heads(problem.group)]
    first, last = start // block_k, -(-stop // block_k)
    wanted = visible.flatten(0, 1)[:, first:last]
    used = wanted.any(0)
    uniform = bool((wanted == used).all())
    blocks = (used.nonzero().squeeze(1) + first).tolist()
    most = max(problem.plan.block_k // block_k, 1)
    for place in range(0, len(blocks), most):
        columns = _picked(blocks[place : place + most], block_k, start, stop)
        if columns is None:
            continue
        if uniform:
            yield columns, None
            continue
        # Heads of one group have patterns of their own.
        absent = ~visible[..., columns.keys // block_k]  # [1, group, columns]
        yield columns, absent.view(1, 1, -1, 1, len(columns.keys))


def _picked(blocks: list[int], size: int, start: int, stop: int) -> Picked | None:
    """The keys of blocks from `start` to `stop`, neighbouring blocks as one run; None for no key."""
    runs: list[slice] = []
    for block in blocks:
        a, b = max(block * size, start), min((block + 1) * size, stop)
        if a >= b:
            continue
        if runs and runs[-1].stop == a:
            runs[-1] = slice(runs[-1].start, b)
        else:
            runs.append(slice(a, b))
    if not runs:
        return None
    return Picked(torch.cat([torch.arange(run.start, run.stop) for run in runs]), tuple(runs))
