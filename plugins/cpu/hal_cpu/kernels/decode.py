"""Few query rows against many keys: bound by reading the cache once, so the work is arranged around that read.

The query heads that share a key head become rows of one product, all scores of a few heads are held at once (they are
small next to the keys), and keys in a narrow dtype are converted chunk by chunk inside the cache.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from ..discovery import this_machine
from ..memory import ScratchMemory, Workspace
from ..tiling import DecodeSizes
from .keyvalue import KeyValue, Room
from .problem import Problem, Tile
from .scores import LN2, HiddenPairs, apply_mask, mask_tile
from .tiled import scaled_query
from .workspace import VALUE_RUN, DecodeParts


class Scratch:
    """Flat memory for the batch entries at work. Parts as in `DecodeParts`."""

    def __init__(self, problem: Problem, memory: Tensor, parts: DecodeParts) -> None:
        self.query, self.scores, self.out, self.products, key, pages, self.statistics, hidden, self.mask, *rest = (
            memory.split(list(parts))
        )
        narrow, self.parts = rest
        self.narrow = narrow.view(torch.bfloat16)
        self.room = Room(key, pages.view(torch.uint8))
        self.hidden = HiddenPairs(problem.band, hidden.view(torch.bool))


def forward(problem: Problem, memory: ScratchMemory, out: Tensor, lse: Tensor | None) -> None:
    """Attention of a dense batch with few query rows; arguments as in tiled.forward."""
    source = problem.source
    sizes = DecodeSizes.choose(problem.request, direct=source.direct, one_batch=_one_batch(source))
    sizes = sizes._replace(columns=min(sizes.columns, max(problem.plan.block_k, 1)))
    parts = DecodeParts.of(problem.request, sizes, direct=source.direct, narrow=multiplies_narrow(source))
    with Workspace(memory) as workspace:
        block = workspace.take((sum(parts),), source.dtype)
        _run(problem, sizes, Scratch(problem, block, parts), out, lse)
        del block


def _run(problem: Problem, sizes: DecodeSizes, scratch: Scratch, out: Tensor, lse: Tensor | None) -> None:
    batch, _, len_q, _ = problem.query.shape
    for first in range(0, batch, sizes.batch):
        tile = Tile(slice(first, min(first + sizes.batch, batch)), slice(0, problem.heads_kv), slice(0, len_q))
        result, level = _attend(problem, tile, scratch, sizes.columns)
        shape = (tile.batch.stop - first, problem.query.shape[1], len_q)
        out[tile.batch] = result.view(*shape, -1)
        if lse is not None:
            lse[tile.batch] = -math.inf if level is None else level.view(shape)


def _one_batch(source: KeyValue) -> bool:
    """Whether key heads of two batch entries have no common stride, so that a view cannot hold both."""
    tensors = (source.key, source.value)
    return source.pages is not None or (source.direct and any(t.stride(0) != t.shape[1] * t.stride(1) for t in tensors))


def _attend(problem: Problem, tile: Tile, scratch: Scratch, chunk: int) -> tuple[Tensor, Tensor | None]:
    """(out [pairs, rows, dim_v], log-sum-exp [pairs, rows, 1] where it is asked for) of one tile, in scratch memory."""
    start, stop = problem.band.range(tile.rows, problem.source.length)
    many, rows = tile.pairs, problem.group * tile.row_count
    out = scratch.out[: many * rows * problem.source.dim_v].view(many, rows, -1)
    if start >= stop:
        return out.zero_(), None
    keys = slice(start, stop)
    hidden = scratch.hidden.of(tile.rows, keys)
    # One operator for maximum, powers and sum where nothing is hidden; its powers are of e, so it wants natural scores.
    plain = problem.mask is None and hidden is None and not problem.request.lse
    query = scaled_query(problem, tile, scratch.query)
    if plain and problem.rule.cap is None:
        query.mul_(LN2)
    scores = scratch.scores[: many * rows * (stop - start)].view(many, rows, stop - start)
    for columns in _chunks(start, stop, chunk):
        key = problem.source.keys(tile.batch, tile.heads, columns, scratch.room)
        # key @ query^T reads the keys row by row; query @ key^T would be half as fast with few rows.
        products = scratch.products[: many * key.shape[1] * rows].view(many, key.shape[1], rows)
        torch.bmm(key, query.mT, out=products)
        scores[:, :, columns.start - start : columns.stop - start].copy_(products.mT)
    problem.rule.apply_cap(scores)
    if plain:
        torch.softmax(scores if problem.rule.cap is None else scores.mul_(LN2), -1, out=scores)
        return _weigh(problem, tile, scores, keys, scratch, chunk, out), None
    whole = scores.view(*tile.shape(problem.group), stop - start)
    if problem.mask is not None:
        mask = mask_tile(problem.mask, tile.batch, tile.heads, tile.rows, keys)
        apply_mask(whole, mask, problem.rule.unit, scratch.mask)
    if hidden is not None:
        whole.masked_fill_(hidden, -math.inf)
    top, anchor, total, divisor = scratch.statistics[: 4 * many * rows].view(4, many, rows, 1)
    torch.amax(scores, -1, keepdim=True, out=top)
    anchor.copy_(top).masked_fill_(top == -math.inf, 0)
    weights = problem.rule.exponentials(scores, anchor)
    torch.sum(weights, -1, keepdim=True, out=total)
    _weigh(problem, tile, weights, keys, scratch, chunk, out)
    out.div_(torch.add(total, (total == 0), out=divisor))
    return out, problem.rule.log_sum_exp(top, total)


def _chunks(start: int, stop: int, count: int) -> Iterator[slice]:
    for first in range(start, stop, count):
        yield slice(first, min(first + count, stop))


def _weigh(
    problem: Problem, tile: Tile, weights: Tensor, keys: slice, scratch: Scratch, chunk: int, out: Tensor
) -> Tensor:
    """out = weights [pairs, rows, keys] @ value."""
    source = problem.source
    if source.direct:
        return _product(weights, source.values(tile.batch, tile.heads, keys, scratch.room), scratch.parts, out)
    if multiplies_narrow(source):
        # Rounding the weights costs what torch's own kernel pays too, and saves converting the values.
        rounded = scratch.narrow[: weights.numel()].view(weights.shape).copy_(weights)
        result = scratch.narrow[weights.numel() : weights.numel() + out.numel()].view(out.shape)
        many = source.value[tile.batch, :, keys]
        for entry, value in enumerate(many):
            place = slice(entry * many.shape[1], (entry + 1) * many.shape[1])
            torch.bmm(rounded[place], value, out=result[place])
        return out.copy_(result)
    out.zero_()
    for columns in _chunks(keys.start, keys.stop, chunk):
        part = weights[:, :, columns.start - keys.start : columns.stop - keys.start]
        out.baddbmm_(part, source.values(tile.batch, tile.heads, columns, scratch.room))
    return out


def multiplies_narrow(source: KeyValue) -> bool:
    """Whether values can be multiplied as they lie: plain bfloat16 on a processor with products of it."""
    narrow = source.value.dtype == torch.bfloat16 and source.pages is None and source.value_scale is None
    return narrow and source.value.stride(-1) == 1 and this_machine().multiplies_bfloat16


def _product(weights: Tensor, value: Tensor, memory: Tensor, out: Tensor) -> Tensor:
    """out = weights @ value; with fewer pairs than threads, keys are shared out among them."""
    runs = value.shape[1] // VALUE_RUN
    if len(value) >= torch.get_num_threads() or runs < 2:
        return torch.bmm(weights, value, out=out)
    even = runs * VALUE_RUN
    rows, dim = out.shape[1:]
    parts = memory[: runs * rows * dim].view(runs, rows, dim)
    for pair in range(len(value)):
        left = weights[pair, :, :even].unflatten(1, (runs, VALUE_RUN)).transpose(0, 1)
        torch.bmm(left, value[pair, :even].unflatten(0, (runs, VALUE_RUN)), out=parts)
        torch.sum(parts, 0, out=out[pair])
    if even < value.shape[1]:
        out.baddbmm_(weights[:, :, even:], value[:, even:])
    return out
