"""Attention with both products on the optics: scale, softcap, masks, softmax and sums are digital.

QK^T: keys are held as weights, queries stream. PV: values are held, softmax weights stream. The weights exp(s - max)
reach the optics unnormalised, between 0 and 1, and the sum that divides them is exact.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hal_core.plugin_api import AttentionOutput, AttentionRequest, MaskKind, dense_mask, visible_keys

#: inputs [batch, M, K], weights [batch, N, K], window of the keys along K or None -> [batch, M, N]
Product = Callable[[Tensor, Tensor, Any], Tensor]
#: Scores worked on at once: what stays in a processor's cache.
_CHUNK = 1 << 20


def exact_product(inputs: Tensor, weights: Tensor, window: Any = None) -> Tensor:
    return inputs @ weights.transpose(-1, -2)


def attend(
    product: Product,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    request: AttentionRequest,
    tile_size: int | None = None,
) -> AttentionOutput:
    """Attention by a product.

    Args:
        query: [batch, heads_q, len_q, dim_qk]. key, value: [batch, heads_kv, len_k, ...]. Any float dtype and strides.
        mask: 4-dimensional, boolean or additive. tile_size: query rows at once; None for what fits.

    Returns:
        out in the query's dtype, lse float32. A row that reads no key gives 0 and -inf.
    """
    batch, heads_q, len_q, _ = query.shape
    heads_kv, len_k, dim_v = value.shape[1:]
    share = heads_q // heads_kv
    visible = dense_mask(request, len_q, len_k, device=query.device)
    outs, lses = [], []
    for part in _parts(batch, heads_kv, share, len_q, len_k, tile_size):
        heads = slice(part.heads.start * share, part.heads.stop * share)
        seen = _seen(request, part.rows, len_q, len_k)
        q = query[part.batch, heads, part.rows].float()
        k, v = (t[part.batch, part.heads, seen].float().flatten(0, 1) for t in (key, value))
        lead, rows, keys = q.shape[:2], q.shape[2], seen.stop - seen.start
        scores = product(q.reshape(len(k), share * rows, -1), k, None).view(*lead, rows, keys)
        pairs = None if visible is None else visible[part.rows, seen]
        scores = _masked(scores * request.effective_scale, _cut(mask, part, heads, seen), pairs, request)
        peak = scores.detach().amax(-1, keepdim=True)
        dead = peak == -torch.inf
        weights = torch.exp(scores - peak.masked_fill(dead, 0))
        total = weights.sum(-1, keepdim=True).masked_fill(dead, 1)
        mixed = product(weights.view(len(k), share * rows, keys), v.transpose(1, 2), request.window)
        mixed = mixed.view(*lead, rows, dim_v)
        outs.append((part, (mixed / total).masked_fill(dead, 0)))
        lses.append((part, (peak + total.log()).masked_fill(dead, -torch.inf).squeeze(-1)))
    out = _joined(outs, batch, heads_kv, dim=2).to(query.dtype)
    return AttentionOutput(out, _joined(lses, batch, heads_kv, dim=2) if request.lse else None)


class _Part(NamedTuple):
    batch: slice
    heads: slice
    rows: slice


def _parts(batch: int, heads_kv: int, share: int, len_q: int, len_k: int, tile_size: int | None) -> Iterator[_Part]:
    """Batch entries, key heads and rows that are worked on together, in order."""
    head = max(share * len_q * len_k, 1)
    rows = min(len_q, max(_CHUNK // max(share * len_k, 1), 1)) if head > _CHUNK else len_q
    rows = min(rows, tile_size or rows)
    heads = heads_kv if head * heads_kv <= _CHUNK else max(_CHUNK // head, 1)
    batches = batch if head * heads_kv * batch <= _CHUNK else max(_CHUNK // (head * heads_kv), 1)
    for b in range(0, batch, batches):
        for h in range(0, heads_kv, heads):
            for r in range(0, len_q, rows):
                yield _Part(
                    slice(b, min(b + batches, batch)),
                    slice(h, min(h + heads, heads_kv)),
                    slice(r, min(r + rows, len_q)),
                )


def _joined(parts: list[tuple[_Part, Tensor]], batch: int, heads_kv: int, dim: int) -> Tensor:
    """Rows, then heads, then batch entries put together again."""
    by_head: dict[tuple[int, int], list[Tensor]] = {}
    for part, tensor in parts:
        by_head.setdefault((part.batch.start, part.heads.start), []).append(tensor)
    by_batch: dict[int, list[Tensor]] = {}
    for (b, _), rows in by_head.items():
        by_batch.setdefault(b, []).append(rows[0] if len(rows) == 1 else torch.cat(rows, dim))
    heads = [tensors[0] if len(tensors) == 1 else torch.cat(tensors, 1) for tensors in by_batch.values()]
    return heads[0] if len(heads) == 1 else torch.cat(heads, 0)


def _seen(request: AttentionRequest, rows: slice, len_q: int, len_k: int) -> slice:
    """The keys that some of these rows see, at least one: the others are not loaded."""
    start, _ = visible_keys(request, rows.start, len_q, len_k)
    _, stop = visible_keys(request, rows.stop - 1, len_q, len_k)
    start = min(start, len_k - 1)
    return slice(start, max(min(stop, len_k), start + 1))


def _cut(mask: Tensor | None, part: _Part, heads: slice, seen: slice) -> Tensor | None:
    """The part of a 4-dimensional mask; dimensions of size 1 stay."""
    if mask is None:
        return None
    places = (part.batch, heads, part.rows, seen)
    return mask[tuple(slice(None) if size == 1 else place for size, place in zip(mask.shape, places, strict=True))]


def _masked(scores: Tensor, mask: Tensor | None, visible: Tensor | None, request: AttentionRequest) -> Tensor:
    if request.softcap is not None:
        scores = request.softcap * torch.tanh(scores / request.softcap)
    if request.mask is MaskKind.BOOLEAN and mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    elif mask is not None:
        hidden = mask == -torch.inf
        scores = (scores + mask.float().masked_fill(hidden, 0)).masked_fill(hidden, -torch.inf)
    return scores if visible is None else scores.masked_fill(~visible, -torch.inf)
