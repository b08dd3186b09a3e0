"""Where key and value chunks come from: plain tensors, an 8-bit cache with scales, or the pages of a paged cache."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

#: Key positions of a chunk: a range, or int64 [count] where a block plan picks them.
Columns = slice | Tensor


class KeyValue(NamedTuple):
    """One batch of keys and values, read chunk by chunk in the dtype that sums are made in.

    Attributes:
        key, value: [batch, heads_kv, len_k, dim]; with `pages`, [pages, heads_kv, page_size, dim] and batch is 1.
        dtype: of the chunks, float32 or float64.
        length: len_k.
        key_scale, value_scale: float32, broadcastable to [batch, heads_kv, 1, 1], or None.
        pages: int64 [pages of this sequence], in order, or None.
    """

    key: Tensor
    value: Tensor
    dtype: torch.dtype
    length: int
    key_scale: Tensor | None = None
    value_scale: Tensor | None = None
    pages: Tensor | None = None

    @property
    def direct(self) -> bool:
        """Whether chunks are views of the tensors, with nothing converted."""
        return self.key.dtype == self.dtype and self.pages is None and self.key_scale is None

    def keys(self, batch: slice, heads: slice, columns: Columns, out: Tensor | None = None) -> Tensor:
        """Keys [batch * heads, columns, dim]: a view where possible, else written to `out` where that fits."""
        return self._chunk(self.key, self.key_scale, batch, heads, columns, out)

    def values(self, batch: slice, heads: slice, columns: Columns, out: Tensor | None = None) -> Tensor:
        return self._chunk(self.value, self.value_scale, batch, heads, columns, out)

    def _chunk(
        self, whole: Tensor, scale: Tensor | None, batch: slice, heads: slice, columns: Columns, out: Tensor | None
    ) -> Tensor:
        part = self._gather(whole, heads, columns) if self.pages is not None else _pick(whole[batch, heads], columns)
        many, count, dim = part.shape[0] * part.shape[1], part.shape[2], part.shape[3]
        if part.dtype == self.dtype and scale is None:
            part = part if part.stride(-1) == 1 else part.contiguous()  # a product would copy it anyhow, less well
            return part.reshape(many, count, dim)
        if out is None:
            out = torch.empty(many * count * dim, dtype=self.dtype)
        chunk = out[: many * count * dim].view(part.shape)
        chunk.copy_(part)
        if scale is not None:
            chunk.mul_(scale.expand(self._scales_shape(whole), whole.shape[1], 1, 1)[batch, heads])
        return chunk.view(many, count, dim)

    def _scales_shape(self, whole: Tensor) -> int:
        return 1 if self.pages is not None else whole.shape[0]

    def _gather(self, whole: Tensor, heads: slice, columns: Columns) -> Tensor:
        """Tokens of a paged cache, [1, heads, columns, dim]; only the pages that hold them are touched."""
        assert self.pages is not None
        size = whole.shape[2]
        if isinstance(columns, Tensor):
            tokens = whole[self.pages[columns // size], :, columns % size]  # [columns, heads, dim]
            return tokens[:, heads].transpose(0, 1).unsqueeze(0)
        first = columns.start // size
        pages = whole[self.pages[first : -(-columns.stop // size)], heads]  # [pages, heads, page_size, dim]
        run = pages.transpose(0, 1).flatten(1, 2)
        return run[:, columns.start - first * size : columns.stop - first * size].unsqueeze(0)


def _pick(tensor: Tensor, columns: Columns) -> Tensor:
    if isinstance(columns, slice):
        return tensor[:, :, columns]
    return tensor.index_select(2, columns)
