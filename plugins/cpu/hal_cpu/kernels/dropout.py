"""Dropout whose pattern is a function of (seed, offset) and of the pair's place, not of any generator's history.

Every pair (batch entry, query head, query row, key) hashes to 32 bits, so the pattern is the same in any thread, for
any tile sizes, and when the backward pass makes it again.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .keyvalue import Columns

# lowbias32: two multiplications and three shifts with no measurable bias. Source: Chris Wellons, "Prospecting for hash
# functions" (2018), https://nullprogram.com/blog/2018/07/31/. Multipliers as signed 32-bit numbers.
_FIRST, _SECOND = 0x7FEB352D, 0x846CA68B - (1 << 32)
_WORD = 0xFFFFFFFF


def keep_mask(
    rng: tuple[int, int],
    probability: float,
    batch: slice,
    query_heads: slice,
    rows: slice,
    columns: Columns,
    words: Tensor,
    row_words: Tensor,
) -> Tensor:
    """Which pairs are kept.

    Args:
        rng: (seed, offset), any integers.
        probability: of dropping a pair.
        batch, query_heads, rows, columns: the tile's place in the whole call.
        words: int32 memory of at least 2 * pairs numbers. row_words: int64 memory of at least 3 * batch * heads * rows
            numbers.

    Returns:
        bool [batch, query_heads, rows, columns], in the second half of the used words.
    """
    row = _row_words(rng, batch, query_heads, rows, row_words)
    column = torch.arange(columns.start, columns.stop) if isinstance(columns, slice) else columns.keys
    column = column * 0x9E3779B1 + _mix_number(rng[1] ^ 0x5BF03635)
    column = _mix(column, torch.empty_like(column)).to(torch.int32)
    shape = (*row.shape, len(column))
    count = row.numel() * len(column)
    pairs, shifted = words[:count].view(shape), words[count : 2 * count].view(shape)
    torch.bitwise_xor(row.unsqueeze(-1), column, out=pairs)
    # The shifts drag the sign along, and xor with a dragged sign would clear it: every weight would be kept.
    for shift, factor in ((16, _FIRST), (15, _SECOND)):
        torch.bitwise_right_shift(pairs, shift, out=shifted)
        pairs.bitwise_xor_(shifted.bitwise_and_((1 << 32 - shift) - 1)).mul_(factor)
    torch.bitwise_right_shift(pairs, 16, out=shifted)
    pairs.bitwise_xor_(shifted.bitwise_and_(0xFFFF))
    keep = words[count : 2 * count].view(torch.bool)[:count].view(shape)
    return torch.ge(pairs, round(probability * (1 << 32)) - (1 << 31), out=keep)


def _row_words(rng: tuple[int, int], batch: slice, heads: slice, rows: slice, memory: Tensor) -> Tensor:
    """One well mixed int32 for every (batch entry, head, row), in `memory`."""
    shape = (batch.stop - batch.start, heads.stop - heads.start, rows.stop - rows.start)
    count = shape[0] * shape[1] * shape[2]
    words, temporary = memory[:count].view(shape), memory[count : 2 * count].view(shape)
    words.fill_(_mix_number(rng[0] ^ _mix_number(rng[0] >> 32)) ^ _mix_number(rng[1]))
    for part, view in ((batch, (-1, 1, 1)), (heads, (1, -1, 1)), (rows, (1, 1, -1))):
        numbers = torch.arange(part.start, part.stop).add_(0x9E3779B9)
        words.bitwise_xor_(_mix(numbers, torch.empty_like(numbers)).view(view))
        _mix(words, temporary)
    return memory[2 * count : 3 * count].view(torch.int32)[:count].view(shape).copy_(words)


def _mix(words: Tensor, temporary: Tensor) -> Tensor:
    """lowbias32 on unsigned words held in int64, in place; `temporary` is memory of the same shape."""
    words.bitwise_and_(_WORD)
    for shift, factor in ((16, _FIRST), (15, _SECOND & _WORD)):
        words.bitwise_xor_(torch.bitwise_right_shift(words, shift, out=temporary)).mul_(factor).bitwise_and_(_WORD)
    return words.bitwise_xor_(torch.bitwise_right_shift(words, 16, out=temporary))


def _mix_number(word: int) -> int:
    word &= _WORD
    word = ((word ^ (word >> 16)) * _FIRST) & _WORD
    word = ((word ^ (word >> 15)) * (_SECOND & _WORD)) & _WORD
    return word ^ (word >> 16)
