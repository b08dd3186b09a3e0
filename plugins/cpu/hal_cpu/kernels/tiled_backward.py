"""Gradients tile by tile from a given (out, lse): weights are made again, never kept.

Source: Dao et al. 2022 (FlashAttention), algorithm 4; the log-sum-exp's own gradient joins the row sums.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from hal_core.plugin_api import Grads, MemoryManager

from ..tiling import TileSizes
from .keyvalue import Columns
from .problem import Problem, Tile, column_chunks, head_groups, row_tiles
from .scores import LOG2E, mask_tile
from .tiled import Scratch, choose_sizes, kept, scaled_query, tile_scores, tile_shape
from .workspace import backward_scratch, tiled_scratch


class Given(NamedTuple):
    """What the forward pass gave and what flows back, [batch, heads_q, len_q, (dim_v)]."""

    out: Tensor
    lse: Tensor
    grad_out: Tensor
    grad_lse: Tensor | None


class Sums(NamedTuple):
    """Flat memory of the backward pass beside the forward's scratch; see paths.backward_scratch."""

    grad_scores: Tensor
    grad_rows: Tensor
    grad_out: Tensor
    dropped: Tensor
    slope: Tensor
    key: Tensor
    value: Tensor


class Rows(NamedTuple):
    """One block of query rows, [pairs, group * rows, ...]: what its chunks share."""

    query: Tensor
    grad_out: Tensor
    delta: Tensor
    level: Tensor
    sums: Tensor


def backward(problem: Problem, memory: MemoryManager, given: Given, tile_size: int | None = None) -> Grads:
    """Gradients of what the request asks for; of query, key and value where it does not say.

    A row that read no key gives 0 to all of them.
    """
    wanted = problem.request.grads or frozenset("qkv")
    sizes = choose_sizes(problem, tile_size)
    forward_parts = tiled_scratch(problem.request, sizes)
    parts = backward_scratch(problem.request, sizes)
    source, mask = problem.source, problem.mask
    grads = Grads(
        torch.zeros_like(problem.query) if "q" in wanted else None,
        torch.zeros_like(source.key) if "k" in wanted else None,
        torch.zeros_like(source.value) if "v" in wanted else None,
        torch.zeros(mask.shape, dtype=source.dtype) if "mask" in wanted and mask is not None else None,
    )
    total = sum(forward_parts) + sum(parts)
    buffer = memory.allocate((total,), str(source.dtype).removeprefix("torch."))
    try:
        scratch, sums = buffer.tensor.split([sum(forward_parts), sum(parts)])
        _run(problem, sizes, Scratch.carve(scratch, forward_parts), Sums(*sums.split(parts)), given, grads)
        del scratch, sums
    finally:
        memory.free(buffer)
    return grads


def _run(problem: Problem, sizes: TileSizes, scratch: Scratch, sums: Sums, given: Given, grads: Grads) -> None:
    source, group, rule = problem.source, problem.group, problem.rule
    for batch, heads in head_groups(problem, sizes):
        pairs = (batch.stop - batch.start) * (heads.stop - heads.start)
        key_sum, value_sum = (
            memory[: pairs * source.length * whole.shape[-1]].view(pairs, source.length, -1).zero_()
            for memory, whole in ((sums.key, source.key), (sums.value, source.value))
        )
        for tile in row_tiles(problem, sizes, batch, heads):
            rows = _rows(problem, tile, scratch, sums, given)
            for columns, hidden in column_chunks(problem, sizes, tile):
                _chunk(problem, tile, columns, hidden, rows, scratch, sums, (key_sum, value_sum), grads)
            if grads.query is not None:
                shape = (batch.stop - batch.start, (heads.stop - heads.start) * group, tile.row_count, -1)
                query_heads = slice(heads.start * group, heads.stop * group)
                grads.query[batch, query_heads, tile.rows] = rows.sums.mul_(rule.scale).view(shape)
        if grads.key is not None:
            key_sum.mul_(rule.scale / rule.factor if rule.factor else 0.0)
            grads.key[batch, heads] = key_sum.view(batch.stop - batch.start, -1, *key_sum.shape[1:])
        if grads.value is not None:
            grads.value[batch, heads] = value_sum.view(batch.stop - batch.start, -1, *value_sum.shape[1:])


def _rows(problem: Problem, tile: Tile, scratch: Scratch, sums: Sums, given: Given) -> Rows:
    query = scaled_query(problem, tile, scratch.query)
    many, count, dim_qk = query.shape
    heads = slice(tile.heads.start * problem.group, tile.heads.stop * problem.group)
    place = (tile.batch, heads, tile.rows)
    part = given.grad_out[place]
    grad_out = sums.grad_out[: part.numel()].view(part.shape).copy_(part)
    out = scratch.out[: part.numel()].view(part.shape).copy_(given.out[place])
    delta = out.mul_(grad_out).sum(-1)
    if given.grad_lse is not None:
        delta -= given.grad_lse[place]
    lse = given.lse[place].to(query.dtype)
    # A row without a key: its scores are all -inf, so any finite level makes its weights 0.
    level = lse.masked_fill(lse == -torch.inf, 0) * LOG2E
    return Rows(
        query,
        grad_out.view(many, count, -1),
        delta.reshape(many, count, 1),
        level.reshape(many, count, 1),
        sums.grad_rows[: many * count * dim_qk].view(many, count, dim_qk).zero_(),
    )


def _chunk(
    problem: Problem,
    tile: Tile,
    columns: Columns,
    hidden: Tensor | None,
    rows: Rows,
    scratch: Scratch,
    sums: Sums,
    totals: tuple[Tensor, Tensor],
    grads: Grads,
) -> None:
    """Add what one chunk of keys gives to the sums of query rows, keys, values and mask."""
    shape = _score_shape(problem, tile, columns, rows)
    size = shape.numel()
    slope = sums.slope[:size].view(shape) if problem.request.softcap is not None else None
    scores = tile_scores(problem, tile, columns, hidden, rows.query, scratch, slope)
    weights = scores.sub_(rows.level).exp2_()
    keep = kept(problem, tile, columns, scratch) if problem.request.dropout else None
    if grads.value is not None:
        used = weights
        if keep is not None:
            used = torch.mul(weights, keep, out=sums.dropped[:size].view(shape))
        _add(totals[1], columns, used.mT, rows.grad_out)
    if grads.query is None and grads.key is None and grads.mask is None:
        return
    value = problem.source.values(tile.batch, tile.heads, columns, scratch.value)
    grad = torch.bmm(rows.grad_out, value.mT, out=sums.grad_scores[:size].view(shape))
    if keep is not None:
        grad.mul_(keep)
    grad.sub_(rows.delta).mul_(weights)
    if grads.mask is not None:
        _add_mask(problem, tile, columns, grad, grads.mask)
    if slope is not None:
        grad.mul_(slope)
    if grads.query is not None:
        rows.sums.baddbmm_(grad, problem.source.keys(tile.batch, tile.heads, columns, scratch.key))
    if grads.key is not None:
        _add(totals[0], columns, grad.mT, rows.query)


def _score_shape(problem: Problem, tile: Tile, columns: Columns, rows: Rows) -> torch.Size:
    count = columns.stop - columns.start if isinstance(columns, slice) else len(columns)
    return torch.Size((*rows.query.shape[:2], count))


def _add(total: Tensor, columns: Columns, left: Tensor, right: Tensor) -> None:
    """total[:, columns] += left @ right."""
    if isinstance(columns, slice):
        total[:, columns].baddbmm_(left, right)
    else:
        total.index_add_(1, columns, torch.bmm(left, right))


def _add_mask(problem: Problem, tile: Tile, columns: Columns, grad: Tensor, total: Tensor) -> None:
    """Add gradients of scores to the mask's, summed over the dimensions along which the mask broadcasts."""
    whole = grad.view(*tile_shape(problem, tile), grad.shape[-1])
    broadcast = [d for d in range(5) if total.shape[d] == 1 and whole.shape[d] > 1]
    part = whole.sum(broadcast, keepdim=True) if broadcast else whole
    if isinstance(columns, slice) or total.shape[4] == 1:
        mask_tile(total, tile.batch, tile.heads, tile.rows, columns).add_(part)
    else:
        mask_tile(total, tile.batch, tile.heads, tile.rows, slice(None)).index_add_(4, columns, part)
