"""Attention along a tile plan: which rows meet which tiles of keys, in which order, and where the results go."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from hal_core.plugin_api import AttentionOutput, AttentionRequest, TilePlan, visible_keys

from ..simulator.attention import ExactProducts, Part, Products, attend_part, part_of_mask
from ..tiling import heads_at_once


def attend(
    products: Products,
    query: Tensor,
    mask: Tensor | None,
    request: AttentionRequest,
    plan: TilePlan,
    out: Tensor,
    lse: Tensor | None,
) -> None:
    """Attention part by part.

    Args:
        query: [batch, heads_q, len_q, dim_qk], finite, any float dtype and strides.
        mask: 4-dimensional, boolean or additive, or None. request, plan: of the tensors' exact lengths.
        out: [batch, heads_q, len_q, dim_v], written. lse: [batch, heads_q, len_q], float32, written; or None.
    """
    for part in parts(request, plan):
        heads = query_heads(request, part)
        rows = query[part.batch, heads, part.rows]
        found = attend_part(products, rows, part, part_of_mask(mask, part, heads), plan.band, request)
        out[part.batch, heads, part.rows] = found[0]
        if lse is not None:
            lse[part.batch, heads, part.rows] = found[1]


def attend_exactly(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, request: AttentionRequest, plan: TilePlan
) -> AttentionOutput:
    """The same attention with exact float32 products, differentiable; arguments as for `attend`.

    Args:
        key, value: [batch, heads_kv, len_k, dim].

    Returns:
        out in the query's dtype, lse float32.
    """
    products = ExactProducts(key, value)
    outs: list[tuple[Part, Tensor]] = []
    lses: list[tuple[Part, Tensor]] = []
    for part in parts(request, plan):
        heads = query_heads(request, part)
        rows = query[part.batch, heads, part.rows]
        out, lse = attend_part(products, rows, part, part_of_mask(mask, part, heads), plan.band, request)
        outs.append((part, out))
        lses.append((part, lse))
    return AttentionOutput(_joined(outs).to(query.dtype), _joined(lses) if request.lse else None)


def query_heads(request: AttentionRequest, part: Part) -> slice:
    """The query heads that read the part's key heads."""
    group_size = request.heads_q // request.heads_kv
    return slice(part.heads.start * group_size, part.heads.stop * group_size)


def parts(request: AttentionRequest, plan: TilePlan) -> Iterator[Part]:
    """The parts of a call in order: batch entries, then key heads, then the row ranges of the plan."""
    batches, heads = heads_at_once(request)
    for b in range(0, request.batch, batches):
        for h in range(0, request.heads_kv, heads):
            places = slice(b, min(b + batches, request.batch)), slice(h, min(h + heads, request.heads_kv))
            for start, stop, spans in plan.rows():
                yield Part(*places, slice(start, stop), _seen(request, start, stop, spans))


def _seen(
    request: AttentionRequest, start: int, stop: int, spans: tuple[tuple[int, int], ...]
) -> tuple[tuple[int, int], ...]:
    """The tiles up to the last key that some row sees; one key, which is masked, where no row sees any."""
    len_q, len_k = request.len_q, request.len_k
    first, last = visible_keys(request, start, len_q, len_k)[0], visible_keys(request, stop - 1, len_q, len_k)[1]
    seen = tuple((k_start, min(k_stop, last)) for k_start, k_stop in spans if k_start < last)
    key = min(first, len_k - 1)
    return seen or ((key, key + 1),)


def _joined(found: list[tuple[Part, Tensor]]) -> Tensor:
    """Row ranges, then heads, then batch entries put together again, each along its dimension."""
    by_head: dict[tuple[int, int], list[Tensor]] = {}
    for part, tensor in found:
        by_head.setdefault((part.batch.start, part.heads.start), []).append(tensor)
    by_batch: dict[int, list[Tensor]] = {}
    for (b, _), rows in by_head.items():
        by_batch.setdefault(b, []).append(torch.cat(rows, 2))
    return torch.cat([torch.cat(heads, 1) for heads in by_batch.values()], 0)
