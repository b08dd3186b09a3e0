"""Few query rows against many keys: bound by reading the cache once, so the work is arranged around that read.

The query heads that share a key head become rows of one product, all scores of a few heads are held at once (they are
small next to the keys), and keys in a narrow dtype are widened chunk by chunk inside the cache.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from hal_core.plugin_api import AttentionOutput, MemoryManager

from ..discovery import this_machine
from ..tiling import DecodeSizes
from .keyvalue import KeyValue
from .problem import Problem, Tile
from .scores import LN2, hide, mask_tile
from .tiled import scaled_query, tile_shape
from .workspace import decode_scratch

#: Keys of one partial product of weights and values: long enough for the product, short enough to share among threads.
VALUE_RUN = 1024


def forward(problem: Problem, memory: MemoryManager, out: Tensor) -> AttentionOutput:
    """Attention of a dense batch with few query rows; arguments and result as in tiled.forward."""
    batch, _, len_q, _ = problem.query.shape
    heads, source = problem.heads_kv, problem.source
    lse = torch.empty(problem.query.shape[:3], dtype=source.dtype) if problem.request.lse else None
    sizes = DecodeSizes.choose(problem.request, direct=source.direct, one_batch=_one_batch(source))
    parts = decode_scratch(problem.request, sizes, direct=source.direct)
    buffer = memory.allocate((sum(parts),), str(source.dtype).removeprefix("torch."))
    try:
        scratch = buffer.tensor.split(parts)
        for first in range(0, batch, sizes.batch):
            tile = Tile(slice(first, min(first + sizes.batch, batch)), slice(0, heads), slice(0, len_q))
            result, level = _attend(problem, tile, scratch, sizes.columns)
            shape = (tile.batch.stop - first, problem.query.shape[1], len_q)
            out[tile.batch] = result.view(*shape, -1)
            if lse is not None and level is not None:
                lse[tile.batch] = level.view(shape)
        del scratch
    finally:
        memory.free(buffer)
    return AttentionOutput(out, lse)


def _one_batch(source: KeyValue) -> bool:
    """Whether key heads of two batch entries have no common stride, so that a view cannot hold both."""
    tensors = (source.key, source.value)
    return source.pages is not None or (source.direct and any(t.stride(0) != t.shape[1] * t.stride(1) for t in tensors))


def _attend(problem: Problem, tile: Tile, scratch: tuple[Tensor, ...], chunk: int) -> tuple[Tensor, Tensor | None]:
    """(out [pairs, rows, dim_v], log-sum-exp [pairs, rows, 1] where asked for) of one tile."""
    query_memory, score_memory, product_memory, wide_memory = scratch
    start, stop = problem.band.range(tile.rows, problem.source.length)
    if start >= stop:
        return _nothing(problem, tile)
    hidden = problem.band.hidden(tile.rows, slice(start, stop))
    # One operator for maximum, powers and sum where nothing is hidden; its powers are of e, so it wants natural scores.
    plain = problem.mask is None and hidden is None and not problem.request.lse
    query = scaled_query(problem, tile, query_memory)
    if plain and problem.rule.cap is None:
        query.mul_(LN2)
    many, rows, _ = query.shape
    scores = score_memory[: many * rows * (stop - start)].view(many, rows, stop - start)
    for columns in _chunks(start, stop, chunk):
        key = problem.source.keys(tile.batch, tile.heads, columns, wide_memory)
        # key @ query^T reads the keys row by row; query @ key^T would be half as fast with few rows.
        products = product_memory[: many * key.shape[1] * rows].view(many, key.shape[1], rows)
        torch.bmm(key, query.mT, out=products)
        scores[:, :, columns.start - start : columns.stop - start].copy_(products.mT)
    problem.rule.apply_cap(scores)
    if plain:
        weights = torch.softmax(scores if problem.rule.cap is None else scores.mul_(LN2), -1)
        return _weigh(problem, tile, weights, slice(start, stop), wide_memory, chunk), None
    if problem.mask is not None or hidden is not None:
        mask = None
        if problem.mask is not None:
            mask = mask_tile(problem.mask, tile.batch, tile.heads, tile.rows, slice(start, stop))
        hide(scores.view(*tile_shape(problem, tile), stop - start), mask, hidden)
    top = scores.amax(-1, keepdim=True)
    anchor = top.masked_fill(top == -math.inf, 0)
    weights = scores.sub_(anchor).exp2_()
    total = weights.sum(-1, keepdim=True)
    result = _weigh(problem, tile, weights, slice(start, stop), wide_memory, chunk)
    result.div_(torch.where(total == 0, 1, total))
    return result, (top + total.log2()) * LN2


def _nothing(problem: Problem, tile: Tile) -> tuple[Tensor, Tensor]:
    shape, dtype = (tile.pairs, problem.group * tile.row_count), problem.source.dtype
    return torch.zeros(*shape, problem.source.value.shape[-1], dtype=dtype), torch.full(
        (*shape, 1), -math.inf, dtype=dtype
    )


def _chunks(start: int, stop: int, count: int) -> Iterator[slice]:
    for first in range(start, stop, count):
        yield slice(first, min(first + count, stop))


def _weigh(problem: Problem, tile: Tile, weights: Tensor, keys: slice, wide_memory: Tensor, chunk: int) -> Tensor:
    """weights [pairs, rows, keys] @ value, [pairs, rows, dim_v] in the source's dtype."""
    source = problem.source
    if source.direct:
        return _product(weights, source.values(tile.batch, tile.heads, keys))
    if _multiplies_narrow(source):
        # Rounding the weights costs what torch's own kernel pays too, and saves widening the values.
        value = source.value[tile.batch, :, keys].flatten(0, 1)
        return torch.bmm(weights.to(value.dtype), value).to(source.dtype)
    result = weights.new_zeros(*weights.shape[:2], source.value.shape[-1])
    for columns in _chunks(keys.start, keys.stop, chunk):
        part = weights[:, :, columns.start - keys.start : columns.stop - keys.start]
        result.baddbmm_(part, source.values(tile.batch, tile.heads, columns, wide_memory))
    return result


def _multiplies_narrow(source: KeyValue) -> bool:
    """Whether values can be multiplied as they lie: plain bfloat16 on a processor with products of it."""
    narrow = source.value.dtype == torch.bfloat16 and source.pages is None and source.value_scale is None
    return narrow and this_machine().multiplies_bfloat16


def _product(weights: Tensor, value: Tensor) -> Tensor:
    """weights @ value; with fewer pairs than threads, keys are shared out among them."""
    runs = value.shape[1] // VALUE_RUN
    if len(value) >= torch.get_num_threads() or runs < 2 or value.stride(0) != value.shape[1] * value.stride(1):
        return torch.bmm(weights, value)
    even = runs * VALUE_RUN
    parts = weights[:, :, :even].unflatten(2, (runs, VALUE_RUN)).transpose(1, 2)
    result = torch.matmul(parts, value[:, :even].unflatten(1, (runs, VALUE_RUN))).sum(1)
    if even < value.shape[1]:
        result.baddbmm_(weights[:, :, even:], value[:, even:])
    return result
