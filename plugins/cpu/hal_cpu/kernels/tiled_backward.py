"""Gradients tile by tile from a given (out, lse): weights are computed again, never kept.

Source: Dao et al. 2022 (FlashAttention), algorithm 4; the log-sum-exp's own gradient joins the row sums.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from hal_core.plugin_api import Grads, MaskKind

from ..memory import ScratchMemory, Workspace
from .keyvalue import Columns, runs
from .problem import Problem, Tile, column_chunks, head_groups, row_tiles
from .scores import mask_tile
from .tiled import Scratch, kept, scaled_query, sums_of_rows, tile_scores
from .workspace import BackwardParts, TiledParts

#: A log-sum-exp below this says the row's weights too coarsely in float32: they are normalised anew.
LOWEST_EXACT_LSE = -256.0


class Given(NamedTuple):
    """What the forward pass gave and what flows back, [batch, heads_q, len_q, (dim_v)]."""

    out: Tensor
    lse: Tensor
    grad_out: Tensor
    grad_lse: Tensor | None


class Parts(NamedTuple):
    """Flat memory of the backward pass beside the forward's scratch; fields as in `BackwardParts`."""

    grad_scores: Tensor
    grad_query: Tensor
    grad_out: Tensor
    dropped: Tensor
    slope: Tensor
    key: Tensor
    value: Tensor
    chunk: Tensor
    mask: Tensor


class Rows(NamedTuple):
    """One block of query rows, [pairs, group * rows, ...]: what its chunks share.

    Attributes:
        query, grad_out, delta: operands of the products; delta is sum(out * grad_out) - grad_lse.
        level: what scores are reduced by before the exponential, in the rule's unit. norm: what weights are divided by;
            None for 1. grad_query: sum over the chunks.
    """

    query: Tensor
    grad_out: Tensor
    delta: Tensor
    level: Tensor
    norm: Tensor | None
    grad_query: Tensor


def backward(problem: Problem, memory: ScratchMemory, given: Given, mask_shape: Sequence[int] = ()) -> Grads:
    """Gradients of what the request asks for; of query, key and value where it does not say.

    A row that read no key gives 0 to all of them. `mask_shape` is the shape of the mask's gradient.
    """
    wanted = problem.request.grads or frozenset("qkv")
    sizes = problem.sizes()
    forward_parts, parts = TiledParts.of(problem.request, sizes), BackwardParts.of(problem.request, sizes)
    source, mask = problem.source, problem.mask
    grads = Grads(
        torch.zeros_like(problem.query) if "q" in wanted else None,
        torch.zeros_like(source.key) if "k" in wanted else None,
        torch.zeros_like(source.value) if "v" in wanted else None,
        torch.zeros(mask.shape, dtype=mask.dtype) if "mask" in wanted and mask is not None else None,
    )
    with Workspace(memory) as workspace:
        sums = grads
        if mask is not None and grads.mask is not None and mask.dtype != source.dtype:
            sums = grads._replace(mask=workspace.take(mask.shape, source.dtype).zero_())
        block = workspace.take((sum(forward_parts) + sum(parts),), source.dtype)
        _run(problem, block, forward_parts, parts, given, sums)
        if sums.mask is not grads.mask:
            grads.mask.copy_(sums.mask)
        del block, sums
    return grads._replace(mask=None if grads.mask is None else grads.mask.view(mask_shape))


def _run(
    problem: Problem, block: Tensor, forward_parts: TiledParts, parts: BackwardParts, given: Given, grads: Grads
) -> None:
    first, second = block.split([sum(forward_parts), sum(parts)])
    scratch, sums = Scratch(problem, first, forward_parts), Parts(*second.split(list(parts)))
    source, rule = problem.source, problem.rule
    for batch, heads in head_groups(problem):
        entries = batch.stop - batch.start
        pairs = entries * (heads.stop - heads.start)
        key_sum, value_sum = (
            None
            if grad is None
            else memory[: pairs * source.length * grad.shape[-1]].view(pairs, source.length, -1).zero_()
            for memory, grad in ((sums.key, grads.key), (sums.value, grads.value))
        )
        for tile in row_tiles(problem, batch, heads):
            rows = _rows(problem, tile, scratch, sums, given)
            for columns, absent in column_chunks(problem, tile):
                _chunk(problem, tile, columns, absent, rows, scratch, sums, (key_sum, value_sum), grads)
            if grads.query is not None:
                shape = (entries, -1, tile.row_count, rows.grad_query.shape[-1])
                place = (batch, tile.query_heads(problem.group), tile.rows)
                grads.query[place] = rows.grad_query.mul_(rule.scale).view(shape)
        if key_sum is not None:
            key_sum.mul_(rule.scale / rule.factor if rule.factor else 0.0)
            grads.key[batch, heads] = key_sum.view(entries, -1, *key_sum.shape[1:])
        if value_sum is not None:
            grads.value[batch, heads] = value_sum.view(entries, -1, *value_sum.shape[1:])


def _zeros(memory: Tensor, *shape: int) -> Tensor:
    return memory[: math.prod(shape)].view(shape).zero_()


def _rows(problem: Problem, tile: Tile, scratch: Scratch, sums: Parts, given: Given) -> Rows:
    query = scaled_query(problem, tile, scratch.query)
    many, count, dim_qk = query.shape
    place = (tile.batch, tile.query_heads(problem.group), tile.rows)
    lse = given.lse[place].to(query.dtype).reshape(many, count, 1)
    # A row without a key: its scores are all -inf, so any finite level makes its weights 0.
    level, norm = lse.masked_fill(lse == -torch.inf, 0).mul_(problem.rule.unit), None
    if problem.request.mask is MaskKind.ADDITIVE and bool((level < LOWEST_EXACT_LSE).any()):
        top, total = sums_of_rows(problem, scratch, tile, query)
        # Where the keys are a part of those that `lse` is about, it is kept.
        whole = (top + total.log() - level).abs_() <= -4 * torch.finfo(lse.dtype).eps * level
        low = whole.logical_and_(level < LOWEST_EXACT_LSE)
        level, norm = torch.where(low, top, level), total.masked_fill(low.logical_not_(), 1)
    part = given.grad_out[place]
    grad_out = sums.grad_out[: part.numel()].view(part.shape).copy_(part)
    out = scratch.out[: part.numel()].view(part.shape).copy_(given.out[place])
    delta = out.mul_(grad_out).sum(-1)
    if given.grad_lse is not None:
        delta -= given.grad_lse[place]
    grad_query = sums.grad_query[: many * count * dim_qk].view(many, count, dim_qk).zero_()
    return Rows(query, grad_out.view(many, count, -1), delta.reshape(many, count, 1), level, norm, grad_query)


def _chunk(
    problem: Problem,
    tile: Tile,
    columns: Columns,
    absent: Tensor | None,
    rows: Rows,
    scratch: Scratch,
    sums: Parts,
    totals: tuple[Tensor | None, Tensor | None],
    grads: Grads,
) -> None:
    """Add what one chunk of keys gives to the sums of query rows, keys, values and mask."""
    key_total, value_total = totals
    shape = (*rows.query.shape[:2], sum(run.stop - run.start for _, run in runs(columns)))
    size = shape[0] * shape[1] * shape[2]
    slope = sums.slope[:size].view(shape) if problem.request.softcap is not None else None
    scores = tile_scores(problem, tile, columns, absent, rows.query, scratch, slope)
    weights = problem.rule.exponentials(scores, rows.level)
    if rows.norm is not None:
        weights.div_(rows.norm)
    keep = kept(problem, tile, columns, scratch) if problem.request.dropout else None
    if value_total is not None:
        used = weights
        if keep is not None:
            used = torch.mul(weights, keep, out=sums.dropped[:size].view(shape))
        _add(value_total, columns, used.mT, rows.grad_out, sums.chunk)
    if grads.query is None and key_total is None and grads.mask is None:
        return
    value = problem.source.values(tile.batch, tile.heads, columns, scratch.value)
    grad = torch.bmm(rows.grad_out, value.mT, out=sums.grad_scores[:size].view(shape))
    if keep is not None:
        grad.mul_(keep)
    grad.sub_(rows.delta).mul_(weights)
    if grads.mask is not None:
        _add_mask(problem, tile, columns, grad, grads.mask, sums.mask)
    if slope is not None:
        grad.mul_(slope)
    if grads.query is not None:
        rows.grad_query.baddbmm_(grad, problem.source.keys(tile.batch, tile.heads, columns, scratch.key))
    if key_total is not None:
        _add(key_total, columns, grad.mT, rows.query, sums.chunk)


def _add(total: Tensor, columns: Columns, left: Tensor, right: Tensor, memory: Tensor) -> None:
    """total[:, columns] += left @ right."""
    if isinstance(columns, slice):
        total[:, columns].baddbmm_(left, right)
        return
    shape = (left.shape[0], left.shape[1], right.shape[2])
    part = memory[: shape[0] * shape[1] * shape[2]].view(shape)
    total.index_add_(1, columns.keys, torch.bmm(left, right, out=part))


def _add_mask(problem: Problem, tile: Tile, columns: Columns, grad: Tensor, total: Tensor, memory: Tensor) -> None:
    """Add gradients of scores to the mask's, summed over the dimensions along which the mask broadcasts."""
    whole = grad.view(*tile.shape(problem.group), grad.shape[-1])
    broadcast = [d for d in range(5) if total.shape[d] == 1 and whole.shape[d] > 1]
    for place, run in runs(columns):
        part = whole[..., place]
        if broadcast:
            shape = [1 if d in broadcast else size for d, size in enumerate(part.shape)]
            room = memory[: torch.Size(shape).numel()].view(shape)
            part = torch.sum(part, broadcast, keepdim=True, out=room)
        mask_tile(total, tile.batch, tile.heads, tile.rows, run).add_(part)
