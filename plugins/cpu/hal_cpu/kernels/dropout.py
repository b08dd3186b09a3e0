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
    scratch: Tensor,
) -> Tensor:
    """Which pairs are kept.

    Args:
        rng: (seed, offset), any integers.
        probability: of dropping a pair.
        batch, query_heads, rows, columns: the tile's place in the whole call.
        scratch: int32 memory of at least 2 * pairs numbers.

    Returns:
        bool [batch, query_heads, rows, columns].
    """
    row = _row_words(rng, batch, query_heads, rows)
    column = torch.arange(columns.start, columns.stop) if isinstance(columns, slice) else columns
    column = _mix(column * 0x9E3779B1 + _mix_number(rng[1] ^ 0x5BF03635)).to(torch.int32)
    shape = (*row.shape, len(column))
    count = row.numel() * len(column)
    words, shifted = scratch[:count].view(shape), scratch[count : 2 * count].view(shape)
    torch.bitwise_xor(row.unsqueeze(-1), column, out=words)
    # The shifts drag the sign along, and xor with a dragged sign would clear it: every weight would be kept.
    for shift, factor in ((16, _FIRST), (15, _SECOND)):
        torch.bitwise_right_shift(words, shift, out=shifted)
        words.bitwise_xor_(shifted.bitwise_and_((1 << 32 - shift) - 1)).mul_(factor)
    torch.bitwise_right_shift(words, 16, out=shifted)
    words.bitwise_xor_(shifted.bitwise_and_(0xFFFF))
    return words >= round(probability * (1 << 32)) - (1 << 31)


def _row_words(rng: tuple[int, int], batch: slice, heads: slice, rows: slice) -> Tensor:
    """One well mixed int32 for every (batch entry, head, row)."""
    words = torch.full(
        (1, 1, 1), _mix_number(rng[0] ^ _mix_number(rng[0] >> 32)) ^ _mix_number(rng[1]), dtype=torch.int64
    )
    for part, shape in ((batch, (-1, 1, 1)), (heads, (1, -1, 1)), (rows, (1, 1, -1))):
        numbers = torch.arange(part.start, part.stop).view(shape)
        words = _mix(words ^ _mix(numbers + 0x9E3779B9))
    return words.to(torch.int32)


def _mix(words: Tensor) -> Tensor:
    """lowbias32 on unsigned words held in int64."""
    words = words & _WORD
    words = ((words ^ (words >> 16)) * _FIRST) & _WORD
    words = ((words ^ (words >> 15)) * (_SECOND & _WORD)) & _WORD
    return words ^ (words >> 16)


def _mix_number(word: int) -> int:
    word &= _WORD
    word = ((word ^ (word >> 16)) * _FIRST) & _WORD
    word = ((word ^ (word >> 15)) * (_SECOND & _WORD)) & _WORD
    return word ^ (word >> 16)
