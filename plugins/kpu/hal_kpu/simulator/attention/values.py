"""Attention as the array and the vector unit compute it: QK^T, online softmax and PV, one tile of keys after the other.

Scores and weights never leave the chip. A row of queries carries three things from key tile to key tile: the largest
score so far, the sum of its weights, and the unnormalised output. Products take operands in the request's dtype and
accumulate in float32, and everything between them is float32: weights are rounded to the dtype before PV, as the array
reads them.

Rows do not depend on each other, so all rows that see a key tile are computed in one batched product, which does not
change the values. What the host needs for that is one workspace of `workspace_size`.

Source: Milakov & Gimelshein 2018, algorithm 3 (online softmax); Dao et al. 2022, algorithms 1 and 4 (tiles, and
gradients from the output and the log-sum-exp).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from hal_core.plugin_api import AttentionOutput, AttentionRequest, Grads, MaskKind

from .block_plans import Listed
from .workspace import areas_of, part_of, workspace_size

#: A log-sum-exp below this says a row's weights too coarsely in float32: its sum is computed again.
LOWEST_EXACT_LSE = -256.0


class Operands(NamedTuple):
    """The tensors of one call, [batch, heads, length, dim], and what they mean. `mask` is 4-dimensional or None.

    `listed` is the table of a block plan; None for a dense call.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    request: AttentionRequest
    listed: Listed | None = None


class Place(NamedTuple):
    """Where a tile of scores lies: batch entries, key heads, query heads, query rows and keys.

    `reading`: which query blocks of a plan read the tile, bool [batch or 1, heads_q or 1, query blocks]; None where all
    rows do.
    """

    batch: slice
    heads: slice
    query_heads: slice
    rows: slice
    keys: slice
    reading: Tensor | None = None


def described(call: Operands) -> AttentionRequest:
    """The request with the lengths of the tensors and the sizes of the mask, from which the workspace follows."""
    r, query, key = call.request, call.query, call.key
    batch, heads = (1, 1) if call.mask is None else call.mask.shape[:2]
    found = (query.shape[0], query.shape[2], key.shape[2], batch, heads)
    if found == (r.batch, r.len_q, r.len_k, r.mask_batch, r.mask_heads):
        return r
    return replace(r, batch=found[0], len_q=found[1], len_k=found[2], mask_batch=batch, mask_heads=heads)


class _Workspace:
    """Hands out tensors of one flat buffer. `rewind` takes back all that were taken since a mark."""

    def __init__(self, buffer: Tensor, areas: list[tuple[str, int]]) -> None:
        memory = buffer.view(torch.uint8)
        self._areas: dict[torch.dtype, Tensor] = {}
        self._used: dict[torch.dtype, int] = {}
        start = 0
        for name, count in areas:
            dtype = getattr(torch, name)
            size = count * dtype.itemsize
            self._areas[dtype] = memory[start : start + size].view(dtype)
            self._used[dtype] = 0
            start += size

    def take(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """An uninitialised tensor."""
        count, used = math.prod(shape), self._used[dtype]
        self._used[dtype] = used + count
        return self._areas[dtype][used : used + count].view(shape)

    def mark(self) -> dict[torch.dtype, int]:
        return dict(self._used)

    def rewind(self, mark: dict[torch.dtype, int]) -> None:
        self._used = dict(mark)


def forward(call: Operands, block_k: int, workspace: Tensor | None = None) -> AttentionOutput:
    """Attention tile by tile.

    Args:
        block_k: keys in a tile.
        workspace: float32 [workspace_size(described(call), block_k)] on the host, overwritten; None: allocated here.

    Returns:
        out [batch, heads_q, len_q, dim_v] in the query's dtype; lse [batch, heads_q, len_q] float32, always. A row that
        reads no key gives 0 and -inf.
    """
    query, request = call.query, described(call)
    out = torch.zeros((*query.shape[:3], call.value.shape[-1]), dtype=query.dtype)
    lse = torch.full(query.shape[:3], -torch.inf)
    if workspace is None:
        workspace = torch.empty(workspace_size(request, block_k), dtype=torch.float32)
    areas = areas_of(request, part_of(request, block_k))
    for batch, heads, rows in _parts(request, block_k):
        space, query_heads = _Workspace(workspace, areas), _query_heads(call, heads)
        peak, weight, mixed = _running(call, batch, heads, rows, block_k, space)
        hidden = peak == -torch.inf
        weight.masked_fill_(hidden, 1)
        out[batch, query_heads, rows] = mixed.div_(weight).masked_fill_(hidden, 0)
        lse[batch, query_heads, rows] = peak.add_(weight.log_()).squeeze(-1)
    return AttentionOutput(out, lse)


def _running(
    call: Operands, batch: slice, heads: slice, rows: slice, block_k: int, space: _Workspace
) -> tuple[Tensor, Tensor, Tensor]:
    """What the vector unit carries from key tile to key tile, after the last one: the largest score and the sum of the
    weights, float32 [batch, heads_q, rows, 1], and the unnormalised output, float32 [batch, heads_q, rows, dim_v].
    """
    query_heads = _query_heads(call, heads)
    given = call.query[batch, query_heads, rows]
    lead, dim, dim_v = given.shape[:3], given.shape[3], call.value.shape[-1]
    kv, group = lead[0] * (heads.stop - heads.start), lead[1] // (heads.stop - heads.start)
    queries = space.take(*given.shape).copy_(given)
    peak, weight = space.take(*lead, 1).fill_(-torch.inf), space.take(*lead, 1).zero_()
    mixed = space.take(*lead, dim_v).zero_()
    before_tiles = space.mark()
    for place in _key_tiles(call, batch, heads, rows, block_k):
        space.rewind(before_tiles)
        here, keys = slice(place.rows.start - rows.start, place.rows.stop - rows.start), _size(place.keys)
        seen = (*lead[:2], _size(place.rows))
        left = space.take(*seen, dim).copy_(queries[:, :, here])
        key, value = (_loaded(tensor, place, space) for tensor in (call.key, call.value))
        scores = space.take(*seen, keys)
        products = (kv, group * seen[2])
        torch.bmm(left.view(*products, dim), key.transpose(1, 2), out=scores.view(*products, keys))
        _finish_scores(call, place, scores, space)
        before = peak[:, :, here]
        highest, fade = space.take(*seen, 1), space.take(*seen, 1)
        torch.maximum(before, torch.amax(scores, -1, keepdim=True, out=highest), out=highest)
        # Of a row without a key so far all weights are 0: their difference from any finite level is -inf.
        level = fade.copy_(highest).masked_fill_(highest == -torch.inf, 0)
        weights = scores.sub_(level).exp_()
        torch.sub(before, level, out=fade).exp_()
        before.copy_(highest)
        weight[:, :, here].mul_(fade).add_(torch.sum(weights, -1, keepdim=True, out=highest))
        if call.query.dtype != torch.float32:
            weights.copy_(space.take(*seen, keys, dtype=call.query.dtype).copy_(weights))
        update = space.take(*seen, dim_v)
        torch.bmm(weights.view(*products, keys), value, out=update.view(*products, dim_v))
        mixed[:, :, here].mul_(fade).add_(update)
    return peak, weight, mixed


def _size(place: slice) -> int:
    return int(place.stop - place.start)


def _loaded(tensor: Tensor, place: Place, space: _Workspace) -> Tensor:
    """A tile of keys or values in float32, [batch x heads_kv, keys, dim]."""
    tile = _tile(tensor, place)
    return space.take(*tile.shape).copy_(tile).flatten(0, 1)


def _finish_scores(call: Operands, place: Place, scores: Tensor, space: _Workspace) -> None:
    """Scale, cap and mask the products of a tile in place."""
    request = call.request
    scores.mul_(request.effective_scale)
    if request.softcap is not None:
        scores.div_(request.softcap).tanh_().mul_(request.softcap)
    if call.mask is not None:
        mask = _cut(call.mask, place)
        hidden = space.take(*mask.shape, dtype=torch.bool)
        if request.mask is MaskKind.BOOLEAN:
            torch.logical_not(mask, out=hidden)
        else:
            torch.eq(mask, -torch.inf, out=hidden)  # also where a score is infinite or NaN
            scores.add_(mask if mask.dtype == torch.float32 else space.take(*mask.shape).copy_(mask))
        scores.masked_fill_(hidden, -torch.inf)
    if place.reading is not None and call.listed is not None:
        scores.masked_fill_(_unread_rows(place, place.reading, call.listed.block_q, space), -torch.inf)
    low, high = call.request.band(call.query.shape[2], call.key.shape[2])
    rows, keys = place.rows, place.keys
    if (high is None or keys.stop - 1 <= rows.start + high) and (low is None or keys.start >= rows.stop - 1 + low):
        return
    offset = rows.start - keys.start
    visible = space.take(_size(rows), _size(keys), dtype=torch.bool).fill_(True)
    if high is not None:
        visible.tril_(high + offset)
    if low is not None:
        visible.triu_(low + offset)
    scores.masked_fill_(visible.logical_not_(), -torch.inf)


def _unread_rows(place: Place, reading: Tensor, block_q: int, space: _Workspace | None = None) -> Tensor:
    """Rows of a tile whose query block does not read it, bool [batch or 1, heads_q or 1, rows, 1]."""
    first, last = place.rows.start // block_q, -(-place.rows.stop // block_q)
    shape = (*reading.shape[:2], last - first, block_q)
    hidden = torch.empty(shape, dtype=torch.bool) if space is None else space.take(*shape, dtype=torch.bool)
    hidden.copy_(reading[:, :, first:last, None]).logical_not_()
    start = place.rows.start - first * block_q
    return hidden.flatten(2).narrow(2, start, _size(place.rows)).unsqueeze(-1)


def backward(
    call: Operands, block_k: int, out: Tensor, lse: Tensor, grad_out: Tensor, grad_lse: Tensor | None = None
) -> Grads:
    """Gradients from a given (out, lse), the weights recomputed tile by tile.

    Args:
        out, grad_out: [batch, heads_q, len_q, dim_v]. lse: float32 [batch, heads_q, len_q]. grad_lse: of it; None for
            zero.

    Returns:
        Gradients of what the request names (query, key and value where it names nothing), each in its tensor's shape
        and dtype. A row that reads no key adds 0.
    """
    wanted = call.request.grads or frozenset("qkv")
    query, key, value = (torch.zeros(t.shape) for t in call[:3])
    mask = torch.zeros(call.mask.shape) if "mask" in wanted and call.mask is not None else None
    delta = (out.float() * grad_out.float()).sum(-1, keepdim=True)
    if grad_lse is not None:
        delta = delta - grad_lse.float().unsqueeze(-1)
    unread = (lse == -torch.inf).unsqueeze(-1)
    level = lse.float().unsqueeze(-1).masked_fill(unread, 0)
    rest = None
    if call.request.mask is MaskKind.ADDITIVE and bool((level < LOWEST_EXACT_LSE).any()):
        level, rest = _in_two(call, block_k, level)
    sums, flowing = Grads(query, key, value, mask), _Flowing(grad_out, delta, level, rest, unread)
    for batch, heads, rows in _parts(described(call), block_k):
        for place in _key_tiles(call, batch, heads, rows, block_k):
            _add_tile(call, place, flowing, sums)
    return Grads(
        query.to(call.query.dtype) if "q" in wanted else None,
        key.to(call.key.dtype) if "k" in wanted else None,
        value.to(call.value.dtype) if "v" in wanted else None,
        mask.to(call.mask.dtype) if mask is not None and call.mask is not None else None,
    )


class _Flowing(NamedTuple):
    """What the backward of every tile reads beside the operands, [batch, heads_q, len_q, ...].

    Attributes:
        grad_out: of the output. delta: sum(out * grad_out) - grad_lse. level: the log-sum-exp, 0 where `unread`.
        rest: what `level` lacks of it, see `_in_two`; None for nothing. unread: rows that read no key.
    """

    grad_out: Tensor
    delta: Tensor
    level: Tensor
    rest: Tensor | None
    unread: Tensor


def _in_two(call: Operands, block_k: int, lse: Tensor) -> tuple[Tensor, Tensor]:
    """Two numbers of each row whose sum is the log-sum-exp: the largest score and the logarithm of the sum for rows
    with a very low mask everywhere, where one float32 number holds the mask's value alone; else `lse` and 0.

    Where the keys are a part of those that `lse` is about, it is kept.
    """
    peak, weight = torch.full_like(lse, -torch.inf), torch.zeros_like(lse)
    for batch, heads, rows in _parts(described(call), block_k):
        for place in _key_tiles(call, batch, heads, rows, block_k):
            at = (place.batch, place.query_heads, place.rows)
            scores, _ = _scores(call, place, call.query[at].float())
            highest = torch.maximum(peak[at], scores.amax(-1, keepdim=True))
            base = highest.masked_fill(highest == -torch.inf, 0)
            weight[at] = weight[at] * (peak[at] - base).exp_() + scores.sub_(base).exp_().sum(-1, keepdim=True)
            peak[at] = highest
    rest = weight.log_()
    whole = (peak + rest - lse).abs_() <= -4 * torch.finfo(torch.float32).eps * lse
    low = whole.logical_and_(lse < LOWEST_EXACT_LSE)
    return torch.where(low, peak, lse), rest.masked_fill_(low.logical_not_(), 0)


def _add_tile(call: Operands, place: Place, flowing: _Flowing, sums: Grads) -> None:
    """Add a tile's part to the float32 gradients. What it holds meanwhile is counted by `workspace.backward_bytes`."""
    at, held = (place.batch, place.query_heads, place.rows), (place.batch, place.heads, place.keys)
    dtype, scale = call.query.dtype, call.request.effective_scale
    scores, slope = _scores(call, place, call.query[at].float())
    scores.sub_(flowing.level[at])
    weights = (scores if flowing.rest is None else scores.sub_(flowing.rest[at])).exp_()
    arriving = flowing.grad_out[at].to(dtype)
    grad = _product(arriving, _tile(call.value, place).transpose(-1, -2)).sub_(flowing.delta[at]).mul_(weights)
    grad.masked_fill_(flowing.unread[at], 0)  # also where a hidden value is infinite or NaN
    sums.value[held].add_(_gathered(weights.to(dtype), arriving, call))
    if sums.mask is not None:
        _add_broadcast(_cut(sums.mask, place), grad)
    grad = (grad if slope is None else grad.mul_(slope)).to(dtype)
    sums.query[at].add_(_product(grad, _tile(call.key, place)).mul_(scale))
    sums.key[held].add_(_gathered(grad, call.query[at], call).mul_(scale))


# Tiles


def _parts(request: AttentionRequest, block_k: int) -> Iterator[tuple[slice, slice, slice]]:
    """Batch entries, key heads and rows that are computed together."""
    r, part = request, part_of(request, block_k)
    if not part.rows:
        return
    for b in range(0, r.batch, part.batch):
        for h in range(0, r.heads_kv, part.heads):
            for row in range(0, r.len_q, part.rows):
                yield (
                    slice(b, min(b + part.batch, r.batch)),
                    slice(h, min(h + part.heads, r.heads_kv)),
                    slice(row, min(row + part.rows, r.len_q)),
                )


def _key_tiles(call: Operands, batch: slice, heads: slice, rows: slice, block_k: int) -> Iterator[Place]:
    """Tiles of keys in order, each with the rows that read some of it; tiles that no row reads are left out."""
    len_q, len_k = call.query.shape[2], call.key.shape[2]
    low, high = call.request.band(len_q, len_k)
    query_heads = _query_heads(call, heads)
    for start, stop, key_block in _key_ranges(call, len_k, block_k):
        first = rows.start if high is None else max(rows.start, start - high)
        last = rows.stop if low is None else min(rows.stop, stop - low)  # row i sees keys from i + low on
        reading = None
        if call.listed is not None:
            reading, size = call.listed.of(batch, query_heads, key_block), call.listed.block_q
            blocks = reading.flatten(0, 1).any(0).nonzero().flatten().tolist()
            blocks = [block for block in blocks if block * size < last and (block + 1) * size > first]
            first, last = (max(first, blocks[0] * size), min(last, (blocks[-1] + 1) * size)) if blocks else (0, 0)
        if first < last:
            yield Place(batch, heads, query_heads, slice(first, last), slice(start, stop), reading)


def _key_ranges(call: Operands, len_k: int, block_k: int) -> Iterator[tuple[int, int, int]]:
    """(first key, last key + 1, block of the plan) of each tile; tiles of a plan start anew with each of its blocks."""
    size = len_k if call.listed is None else call.listed.block_k
    for block in range(-(-len_k // max(size, 1))):
        end = min((block + 1) * size, len_k)
        for start in range(block * size, end, block_k):
            yield start, min(start + block_k, end), block


def _query_heads(call: Operands, heads: slice) -> slice:
    group = call.query.shape[1] // call.key.shape[1]
    return slice(heads.start * group, heads.stop * group)


def _tile(tensor: Tensor, place: Place) -> Tensor:
    """[batch, heads_kv, keys, dim] of keys or values."""
    return tensor[place.batch, place.heads, place.keys]


def _cut(mask: Tensor, place: Place) -> Tensor:
    """The part of a 4-dimensional mask; dimensions of size 1 stay."""
    places = (place.batch, place.query_heads, place.rows, place.keys)
    return mask[tuple(slice(None) if size == 1 else part for size, part in zip(mask.shape, places, strict=True))]


# What the array and the vector unit do with a tile


def _product(left: Tensor, right: Tensor) -> Tensor:
    """left [batch, heads_q, rows, k] @ right [batch, heads_kv, k, n], query heads sharing a key head; float32 sums."""
    batch, heads_q, rows, depth = left.shape
    heads_kv = right.shape[1]
    packed = left.float().reshape(batch, heads_kv, heads_q // heads_kv * rows, depth)
    return torch.matmul(packed, right.float()).view(batch, heads_q, rows, right.shape[-1])


def _gathered(weights: Tensor, rows: Tensor, call: Operands) -> Tensor:
    """weights^T @ rows, summed over the query heads that share a key head: [batch, heads_kv, keys, n]."""
    batch, _, _, keys = weights.shape
    heads_kv = call.key.shape[1] * weights.shape[1] // call.query.shape[1]
    left = weights.float().reshape(batch, heads_kv, -1, keys)
    return torch.matmul(left.transpose(-1, -2), rows.float().reshape(batch, heads_kv, left.shape[2], -1))


def _scores(call: Operands, place: Place, query: Tensor) -> tuple[Tensor, Tensor | None]:
    """Scaled, capped and masked scores of a tile, float32 and new, and the cap's derivative (None without a cap)."""
    request, slope = call.request, None
    scores = _product(query, _tile(call.key, place).transpose(-1, -2)).mul_(request.effective_scale)
    if request.softcap is not None:
        scores.div_(request.softcap).tanh_()
        slope = scores.square().neg_().add_(1)
        scores.mul_(request.softcap)
    if call.mask is not None:
        mask = _cut(call.mask, place)
        if request.mask is MaskKind.BOOLEAN:
            scores.masked_fill_(~mask, -torch.inf)
        else:
            hidden = mask == -torch.inf  # also where a score is infinite or NaN
            scores.add_(mask.float().masked_fill(hidden, 0)).masked_fill_(hidden, -torch.inf)
    if place.reading is not None and call.listed is not None:
        scores.masked_fill_(_unread_rows(place, place.reading, call.listed.block_q), -torch.inf)
    visible = _visible(call, place)
    return (scores if visible is None else scores.masked_fill_(~visible, -torch.inf)), slope


def _visible(call: Operands, place: Place) -> Tensor | None:
    """Which pairs of a tile causal and window leave, [rows, keys]; None where all."""
    low, high = call.request.band(call.query.shape[2], call.key.shape[2])
    rows, keys = place.rows, place.keys
    whole_above = high is None or keys.stop - 1 <= rows.start + high
    whole_below = low is None or keys.start >= rows.stop - 1 + low
    if whole_above and whole_below:
        return None
    distance = torch.arange(keys.start, keys.stop) - torch.arange(rows.start, rows.stop).unsqueeze(1)
    visible = torch.ones_like(distance, dtype=torch.bool) if high is None else distance <= high
    return visible if low is None else visible & (distance >= low)


def _add_broadcast(total: Tensor, part: Tensor) -> None:
    """total += part, summed over the dimensions along which total has size 1."""
    broadcast = [d for d in range(4) if total.shape[d] == 1 and part.shape[d] > 1]
    total += part.sum(broadcast, keepdim=True) if broadcast else part
