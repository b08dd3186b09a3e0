"""Packed and paged calls as dense ones, one sequence after the other."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import NamedTuple

from torch import Tensor

from hal_core.plugin_api import AttentionRequest, BlockPlan, SequenceMetadata


class Sequence(NamedTuple):
    """One sequence of a packed or paged call.

    Attributes:
        number: its place in the call.
        request: a dense request of batch 1 with this sequence's lengths.
        batch, rows: where it lies in query and output. keys, columns: batch entry and keys, where there are no pages.
        pages: int64 [pages], or None for packed.
        mask, plan, key_scale, value_scale: this sequence's part.
    """

    number: int
    request: AttentionRequest
    batch: slice
    rows: slice
    keys: slice
    columns: slice
    pages: Tensor | None
    mask: Tensor | None
    plan: BlockPlan | None
    key_scale: Tensor | None
    value_scale: Tensor | None


def sequences(
    request: AttentionRequest, query: Tensor, mask: Tensor | None, plan: BlockPlan | None, tables: SequenceMetadata
) -> Iterator[Sequence]:
    """The sequences in order. Reads the tables' contents."""
    paged = request.page_size is not None
    if not request.packed:
        ends_k, len_q = tables.cache_seqlens.tolist(), query.shape[2]
        places = [(slice(s, s + 1), slice(0, len_q), slice(0, held)) for s, held in enumerate(ends_k)]
    elif request.used:
        ends_q, firsts, counts = (t.tolist() for t in (tables.cu_seqlens_q, tables.cu_seqlens_k, tables.cache_seqlens))
        places = [
            (slice(0, 1), slice(ends_q[s], ends_q[s + 1]), slice(firsts[s], firsts[s] + counts[s]))
            for s in range(len(counts))
        ]
    else:
        ends_q, ends_k = tables.cu_seqlens_q.tolist(), tables.cu_seqlens_k.tolist()
        places = [
            (slice(0, 1), slice(ends_q[s], ends_q[s + 1]), slice(ends_k[s], ends_k[s + 1]))
            for s in range(len(ends_q) - 1)
        ]
    for number, (batch, rows, columns) in enumerate(places):
        len_q, len_k = rows.stop - rows.start, columns.stop - columns.start
        pages = None
        if paged:
            pages = tables.page_table[number, : -(-len_k // (request.page_size or 1))].long()
        yield Sequence(
            number,
            replace(request, batch=1, len_q=len_q, len_k=len_k, packed=False, used=False),
            batch,
            rows,
            batch,
            columns,
            pages,
            _cut(of_sequence(mask, number), len_q, len_k),
            None if plan is None else _plan_of(plan, number),
            of_sequence(tables.key_scale, number),
            _of_keys(tables.value_scale, batch, columns, paged, number),
        )


def longest_first(parts: Iterable[Sequence]) -> list[Sequence]:
    """The sequences by the number of their pairs, so that the scratch memory of the first serves all others."""
    return sorted(parts, key=lambda part: -part.request.len_q * part.request.len_k)


def of_sequence(tensor: Tensor | None, number: int) -> Tensor | None:
    """A four-dimensional tensor's part for one sequence; a first dimension of 1, or a smaller rank, serves all."""
    if tensor is None or tensor.dim() < 4 or tensor.shape[0] == 1:
        return tensor
    return tensor[number : number + 1]


def _of_keys(scale: Tensor | None, batch: slice, columns: slice, paged: bool, number: int) -> Tensor | None:
    """A sequence's part of value scales; those of keys lie where the keys lie."""
    if scale is None or scale.dim() < 2 or scale.shape[-2] == 1:
        return of_sequence(scale, number)
    if paged:
        return scale
    scale = scale[(None,) * (4 - scale.dim())]
    return scale[batch if scale.shape[0] > 1 else slice(0, 1), :, columns]


def _cut(mask: Tensor | None, len_q: int, len_k: int) -> Tensor | None:
    """A mask for the longest sequence, cut to this one's lengths."""
    if mask is None:
        return None
    mask = mask if mask.shape[-2] == 1 else mask[..., :len_q, :]
    return mask if mask.shape[-1] == 1 else mask[..., :len_k]


def _plan_of(plan: BlockPlan, number: int) -> BlockPlan:
    if plan.indices.shape[0] == 1:
        return plan
    return plan._replace(indices=plan.indices[number : number + 1], counts=plan.counts[number : number + 1])
