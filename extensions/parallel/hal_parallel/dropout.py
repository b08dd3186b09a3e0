"""Dropout whose pattern is a function of (seed, offset) and of global positions: batch entry, query head, query token,
key token. It is the same for any number of ranks, layout, strategy and device.
"""

from __future__ import annotations

import torch
from torch import Tensor

# lowbias32. Source: Chris Wellons, "Prospecting for hash functions" (2018). Multipliers as signed 32-bit numbers.
_FIRST, _SECOND = 0x7FEB352D, 0x846CA68B - (1 << 32)
_WORD = 0xFFFFFFFF
_ROUNDS = ((16, _FIRST), (15, _SECOND), (16, 1))


class Dropout:
    """Which pairs are kept.

    Args:
        probability: of dropping a pair, 0 <= probability < 1. rng: (seed, offset).
        first_head, first_entry: global numbers of the first query head and of the first batch entry that are computed.
    """

    def __init__(self, probability: float, rng: tuple[int, int], first_head: int = 0, first_entry: int = 0) -> None:
        self.probability, self.rng, self.first_head, self.first_entry = probability, rng, first_head, first_entry

    def keep(self, batch: int, heads: int, rows: Tensor, keys: Tensor) -> Tensor:
        """bool [batch, heads, rows, keys] of the tokens `rows` and `keys`, int64."""
        seed, offset = self.rng
        words, device = _number(seed ^ seed >> 32) ^ _number(offset), rows.device
        numbers = (
            torch.arange(self.first_entry, self.first_entry + batch, device=device)[:, None, None],
            torch.arange(self.first_head, self.first_head + heads, device=device)[:, None],
            rows,
        )
        for number in numbers:
            words = _mix(words ^ _mix(_narrow(number + 0x9E3779B9)))
        columns = _mix(_narrow(keys * 0x9E3779B1 + _number(offset ^ 0x5BF03635)))
        pairs = _mix(words[..., None] ^ columns)
        return pairs >= round(self.probability * (1 << 32)) - (1 << 31)


def _narrow(numbers: Tensor) -> Tensor:
    """The low 32 bits of int64 numbers, as int32."""
    low = numbers & _WORD
    return torch.where(low >= 1 << 31, low - (1 << 32), low).to(torch.int32)


def _mix(words: Tensor) -> Tensor:
    """lowbias32 of int32 words. The shifts drag the sign along, so what it fills is cleared."""
    for shift, factor in _ROUNDS:
        words = (words ^ (words >> shift & (1 << 32 - shift) - 1)) * factor
    return words


def _number(word: int) -> Tensor:
    """The low 32 bits of a number, mixed: int32 without dimensions, which goes with tensors of any device."""
    return _mix(_narrow(torch.tensor(word & _WORD)))
