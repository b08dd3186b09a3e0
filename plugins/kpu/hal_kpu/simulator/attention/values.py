"""Attention as the array and the vector unit compute it: QK^T, online softmax and PV, one tile of keys after the other.

Scores and weights never leave the chip. A row of queries carries three things from key tile to key tile: the largest
score so far, the sum of its weights, and the unnormalised output. Products take operands in the request's dtype and add
up in float32,
everything between them is float32: weights are rounded to the dtype before PV, as the array reads them.

Rows do not depend on each other, so all rows that see a key tile are computed in one batched product. That changes no
value.

Source: Milakov & Gimelshein 2018, algorithm 3 (online softmax); Dao et al. 2022, algorithms 1 and 4 (tiles, and
gradients from the output and the log-sum-exp).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from hal_core.plugin_api import AttentionOutput, AttentionRequest, Grads, MaskKind

#: Scores worked on at once on the host: what stays in a processor core's cache.
_CHUNK = 1 << 20


class Operands(NamedTuple):
    """The tensors of one call, [batch, heads, length, dim], and what they mean. `mask` is 4-dimensional or None."""

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    request: AttentionRequest


class Place(NamedTuple):
    """Where a tile of scores lies: batch entries, key heads, query heads, query rows and keys."""

    batch: slice
    heads: slice
    query_heads: slice
    rows: slice
    keys: slice


def forward(call: Operands, block_k: int) -> AttentionOutput:
    """Attention tile by tile.

    Args:
        block_k: keys in a tile.

    Returns:
        out [batch, heads_q, len_q, dim_v] in the query's dtype; lse [batch, heads_q, len_q] float32, always. A row that
        reads no key gives 0 and -inf.
    """
    query, value = call.query, call.value
    out = torch.zeros((*query.shape[:3], value.shape[-1]), dtype=query.dtype)
    lse = torch.full(query.shape[:3], -torch.inf)
    for batch, heads, rows in _parts(call, block_k):
        total = _running(call, batch, heads, rows, block_k)
        query_heads = _query_heads(call, heads)
        dead = total.peak == -torch.inf
        weight = total.weight.masked_fill(dead, 1)
        out[batch, query_heads, rows] = (total.mixed / weight).to(out.dtype)
        lse[batch, query_heads, rows] = (total.peak + weight.log()).squeeze(-1)
    return AttentionOutput(out, lse)


class _Running(NamedTuple):
    """What the vector unit carries from key tile to key tile, float32 [batch, heads_q, rows, ...]."""

    peak: Tensor
    weight: Tensor
    mixed: Tensor


def _running(call: Operands, batch: slice, heads: slice, rows: slice, block_k: int) -> _Running:
    """The rows after their last key tile."""
    query_heads = _query_heads(call, heads)
    queries = call.query[batch, query_heads, rows].float().contiguous()
    lead, dim_v = queries.shape[:3], call.value.shape[-1]
    peak = torch.full((*lead, 1), -torch.inf)
    weight, mixed = torch.zeros(*lead, 1), torch.zeros(*lead, dim_v)
    for place in _key_tiles(call, batch, heads, rows, block_k):
        here = slice(place.rows.start - rows.start, place.rows.stop - rows.start)
        scores = _scores(call, place, queries[:, :, here])[0]
        before = peak[:, :, here]
        highest = torch.maximum(before, scores.amax(-1, keepdim=True))
        level = highest.masked_fill(highest == -torch.inf, 0)  # of a row without a key so far: all its weights are 0
        weights = scores.sub_(level).exp_()
        fade = torch.exp(before - level)
        weight[:, :, here].mul_(fade).add_(weights.sum(-1, keepdim=True))
        mixed[:, :, here].mul_(fade).add_(_product(weights.to(call.query.dtype), _tile(call.value, place)))
        before.copy_(highest)
    return _Running(peak, weight, mixed)


def backward(
    call: Operands, block_k: int, out: Tensor, lse: Tensor, grad_out: Tensor, grad_lse: Tensor | None = None
) -> Grads:
    """Gradients from a given (out, lse), weights made again tile by tile.

    Args:
        out, grad_out: [batch, heads_q, len_q, dim_v]. lse: float32 [batch, heads_q, len_q]. grad_lse: of it; None for
            zero.

    Returns:
        Gradients of what the request names (query, key and value where it names nothing), each in its tensor's shape
        and dtype. A row that reads no key adds 0.
    """
    request, scale = call.request, call.request.effective_scale
    wanted = request.grads or frozenset("qkv")
    query, key, value = (torch.zeros(t.shape) for t in call[:3])
    mask = torch.zeros(call.mask.shape) if "mask" in wanted and call.mask is not None else None
    delta = (out.float() * grad_out.float()).sum(-1, keepdim=True)
    if grad_lse is not None:
        delta = delta - grad_lse.float().unsqueeze(-1)
    dead = lse == -torch.inf
    level = lse.float().masked_fill(dead, 0).unsqueeze(-1)
    for batch, heads, rows in _parts(call, block_k):
        for place in _key_tiles(call, batch, heads, rows, block_k):
            at = (place.batch, place.query_heads, place.rows)
            scores, slope = _scores(call, place, call.query[at].float())
            weights = scores.sub_(level[at]).exp_()
            arriving = grad_out[at].to(call.query.dtype)
            grad = weights * (_product(arriving, _tile(call.value, place).transpose(-1, -2)) - delta[at])
            held, tile = (place.batch, place.heads, place.keys), weights.to(call.query.dtype)
            value[held] += _gathered(tile, arriving, call)
            if mask is not None:
                _add_broadcast(_cut(mask, place), grad)
            grad = (grad if slope is None else grad * slope).to(call.query.dtype)
            query[at] += scale * _product(grad, _tile(call.key, place))
            key[held] += scale * _gathered(grad, call.query[at], call)
    return Grads(
        query.to(call.query.dtype) if "q" in wanted else None,
        key.to(call.key.dtype) if "k" in wanted else None,
        value.to(call.value.dtype) if "v" in wanted else None,
        mask.to(call.mask.dtype) if mask is not None and call.mask is not None else None,
    )


# Tiles


def _parts(call: Operands, block_k: int) -> Iterator[tuple[slice, slice, slice]]:
    """Batch entries, key heads and rows that are computed together, so that their scores stay in the host's cache."""
    batch, heads_q, len_q, _ = call.query.shape
    heads_kv = call.key.shape[1]
    if 0 in (batch, heads_q, len_q, call.key.shape[2]):
        return
    share = heads_q // heads_kv
    rows = min(len_q, max(_CHUNK // (share * block_k), 1))
    heads = min(heads_kv, max(_CHUNK // (share * block_k * rows), 1))
    batches = min(batch, max(_CHUNK // (share * block_k * rows * heads), 1))
    for b in range(0, batch, batches):
        for h in range(0, heads_kv, heads):
            for r in range(0, len_q, rows):
                yield (
                    slice(b, min(b + batches, batch)),
                    slice(h, min(h + heads, heads_kv)),
                    slice(r, min(r + rows, len_q)),
                )


def _key_tiles(call: Operands, batch: slice, heads: slice, rows: slice, block_k: int) -> Iterator[Place]:
    """Tiles of keys in order, each with those of the rows that see some of it; tiles that nobody sees are left out."""
    len_q, len_k = call.query.shape[2], call.key.shape[2]
    low, high = call.request.band(len_q, len_k)
    query_heads = _query_heads(call, heads)
    for start in range(0, len_k, block_k):
        stop = min(start + block_k, len_k)
        first = rows.start if high is None else max(rows.start, start - high)
        last = rows.stop if low is None else min(rows.stop, stop - low)  # row i sees keys from i + low on
        if first < last:
            yield Place(batch, heads, query_heads, slice(first, last), slice(start, stop))


def _query_heads(call: Operands, heads: slice) -> slice:
    share = call.query.shape[1] // call.key.shape[1]
    return slice(heads.start * share, heads.stop * share)


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
        capped = torch.tanh(scores / request.softcap)
        scores, slope = request.softcap * capped, 1 - capped.square()
    if call.mask is not None:
        mask = _cut(call.mask, place)
        if request.mask is MaskKind.BOOLEAN:
            scores.masked_fill_(~mask, -torch.inf)
        else:
            hidden = mask == -torch.inf  # also where a score is infinite or NaN
            scores.add_(mask.float().masked_fill(hidden, 0)).masked_fill_(hidden, -torch.inf)
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
