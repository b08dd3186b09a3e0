"""Where key and value chunks come from: plain tensors, an 8-bit cache with scales, or the pages of a paged cache."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .workspace import SMALLEST_COPIED_PAGE


class Picked(NamedTuple):
    """Key positions that a block plan picks, in ascending order.

    Attributes:
        keys: int64 [count]. runs: the same as ranges of consecutive keys.
    """

    keys: Tensor
    runs: tuple[slice, ...]


#: Key positions of a chunk: a range, or what a block plan picks.
Columns = slice | Picked


def width(columns: Columns) -> int:
    """How many keys there are."""
    return columns.stop - columns.start if isinstance(columns, slice) else len(columns.keys)


def bounds(columns: Columns) -> tuple[int, int]:
    """The first key, and the one after the last."""
    if isinstance(columns, slice):
        return columns.start, columns.stop
    return columns.runs[0].start, columns.runs[-1].stop


def runs(columns: Columns) -> Iterator[tuple[slice, slice]]:
    """(place in the chunk, keys) of each range of consecutive keys."""
    if isinstance(columns, slice):
        yield slice(0, columns.stop - columns.start), columns
        return
    place = 0
    for run in columns.runs:
        count = run.stop - run.start
        yield slice(place, place + count), run
        place += count


class KeyValue(NamedTuple):
    """One batch of keys and values, read chunk by chunk in the dtype that sums are made in.

    Attributes:
        key, value: [batch, heads_kv, len_k, dim]; with `pages`, [pages, heads_kv, page_size, dim] and batch is 1.
        dtype: of the chunks, float32 or float64.
        length: len_k.
        key_scale, value_scale: float32, broadcastable to [batch, heads_kv, 1, dim], or of each key, [batch, heads_kv,
            len_k, 1] (with `pages` where the keys lie); or None.
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
    def dim_v(self) -> int:
        return _numbers(self.value)

    @property
    def direct(self) -> bool:
        """Whether chunks of consecutive keys are views of the tensors, with nothing converted or copied."""
        plain = self.key.dtype == self.dtype and self.pages is None and self.key_scale is None
        return plain and self.key.stride(-1) == 1 and self.value.stride(-1) == 1

    def keys(self, batch: slice, heads: slice, columns: Columns, room: Room) -> Tensor:
        """Keys [batch * heads, columns, dim]: a view where possible, else written to `room`."""
        return self._chunk(self.key, self.key_scale, batch, heads, columns, room)

    def values(self, batch: slice, heads: slice, columns: Columns, room: Room) -> Tensor:
        return self._chunk(self.value, self.value_scale, batch, heads, columns, room)

    def _chunk(
        self, whole: Tensor, scale: Tensor | None, batch: slice, heads: slice, columns: Columns, room: Room
    ) -> Tensor:
        if self.pages is not None:
            chunk = self._of_pages(whole, heads, columns, room)
        else:
            part = whole[batch, heads]
            if isinstance(columns, slice):
                part = part[:, :, columns]
                if part.dtype == self.dtype and scale is None and part.stride(-1) == 1 and _merges(part):
                    return part.view(-1, *part.shape[2:])
            chunk = room.chunk[: part.shape[0] * part.shape[1] * width(columns) * _numbers(part)]
            chunk = chunk.view(*part.shape[:2], width(columns), _numbers(part))
            if isinstance(columns, slice):
                _widen(chunk, part)
            elif part.dtype == self.dtype:
                torch.index_select(part, 2, columns.keys, out=chunk)
            else:
                for place, run in runs(columns):
                    _widen(chunk[:, :, place], part[:, :, run])
        if scale is not None:
            scale = scale[(None,) * (4 - scale.dim())]
            entries = 1 if self.pages is not None else whole.shape[0]
            if scale.shape[2] == 1:
                chunk.mul_(scale.expand(entries, whole.shape[1], 1, -1)[batch, heads])
            elif self.pages is None:
                of_keys = scale.expand(entries, whole.shape[1], -1, 1)[batch, heads]
                for place, run in runs(columns):
                    chunk[:, :, place].mul_(of_keys[:, :, run])
            else:
                scale = scale.expand(-1, whole.shape[1], -1, 1)
                for place, page, rows in self._pieces(columns, whole.shape[2]):
                    chunk[0, :, place].mul_(scale[page if scale.shape[0] > 1 else 0, heads, rows])
        return chunk.view(-1, *chunk.shape[2:]) if chunk.is_contiguous() else chunk.squeeze(0)

    def _of_pages(self, whole: Tensor, heads: slice, columns: Columns, room: Room) -> Tensor:
        """Tokens of a paged cache, [1, heads, columns, dim]; only the pages that hold them are touched."""
        assert self.pages is not None
        size, stored, dim, many = whole.shape[2], whole.shape[3], _numbers(whole), heads.stop - heads.start
        if isinstance(columns, slice) and size < SMALLEST_COPIED_PAGE:
            first, last = columns.start // size, -(-columns.stop // size)
            shape = (last - first, many, size, stored)
            tokens = (last - first) * many * size
            pages = room.pages[: tokens * stored * whole.element_size()].view(whole.dtype).view(shape)
            torch.index_select(whole[:, heads], 0, self.pages[first:last], out=pages)
            chunk = room.chunk[: tokens * dim].view(many, last - first, size, dim)
            _widen(chunk, pages.transpose(0, 1))
            offset = columns.start - first * size
            return chunk.view(1, many, -1, dim)[:, :, offset : offset + width(columns)]
        chunk = room.chunk[: many * width(columns) * dim].view(many, width(columns), dim)
        for place, page, rows in self._pieces(columns, size):
            _widen(chunk[:, place], whole[page, heads, rows])
        return chunk.unsqueeze(0)

    def _pieces(self, columns: Columns, size: int) -> Iterator[tuple[slice, int, slice]]:
        """(place in the chunk, page, rows of it) of the parts of pages that hold a chunk's keys."""
        assert self.pages is not None
        for place, run in runs(columns):
            for start in range(run.start - run.start % size, run.stop, size):
                a, b = max(start, run.start), min(start + size, run.stop)
                target = slice(place.start + a - run.start, place.start + b - run.start)
                yield target, int(self.pages[start // size]), slice(a - start, b - start)


class Room(NamedTuple):
    """Where chunks of keys or values are written that cannot be views.

    Attributes:
        chunk: flat, in the dtype that sums are made in. pages: bytes for the pages of a chunk as they are stored.
    """

    chunk: Tensor
    pages: Tensor


def _numbers(stored: Tensor) -> int:
    """The head size of stored keys or values; a byte holds two int4."""
    return stored.shape[-1] * (2 if stored.dtype == torch.uint8 else 1)


def _widen(chunk: Tensor, stored: Tensor) -> None:
    """Write stored keys or values as numbers; int4 without a tensor beside the chunk: ((n + 8) mod 16) - 8 gives n its
    sign.
    """
    if stored.dtype != torch.uint8:
        chunk.copy_(stored)
        return
    even, odd = chunk[..., 0::2], chunk[..., 1::2]
    odd.copy_(stored)
    even.copy_(odd)
    odd.div_(16).floor_()
    even.sub_(odd, alpha=16)
    for codes in (even, odd):
        codes.add_(8).remainder_(16).sub_(8)


def _merges(part: Tensor) -> bool:
    """Whether batch entries and heads have a common stride, so that a view can make one dimension of them."""
    return part.shape[0] == 1 or part.shape[1] == 1 or part.stride(0) == part.shape[1] * part.stride(1)
