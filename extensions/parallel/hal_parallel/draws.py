"""Random numbers that are a function of (seed, offset) and of global positions: batch entry, query head, query token,
key token. They are the same for any number of ranks, layout and strategy: which pairs dropout keeps, and what a noisy
device draws from.
"""

import hashlib
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hal_core import ContractError

from .visible import Call

#: Tokens of a block of queries and of keys, counted from the sequence's first, whose noise is drawn together.
NOISE_BLOCK = 64

# lowbias32. Source: Chris Wellons, "Prospecting for hash functions" (2018). Multipliers as signed 32-bit numbers.
_FIRST, _SECOND = 0x7FEB352D, 0x846CA68B - (1 << 32)
_WORD = 0xFFFFFFFF
_ROUNDS = ((16, _FIRST), (15, _SECOND), (16, 1))


class Draws(NamedTuple):
    """The random numbers of a call, or of some of its heads.

    Attributes:
        dropout: probability of dropping a pair, 0 <= dropout < 1. rng: (seed, offset).
        first_head, first_entry: global numbers of the first query head and of the first batch entry that are computed.
    """

    dropout: float
    rng: tuple[int, int]
    first_head: int = 0
    first_entry: int = 0

    def noise(self, call: Call) -> tuple[int, int]:
        """(seed, offset) from which a noisy device draws in one dense call: by where the call's block begins."""
        places = self.first_entry, self.first_head, *(pieces[0].start for pieces in call.tokens)
        digest = hashlib.sha256(repr((self.rng, places)).encode()).digest()
        return int.from_bytes(digest[:7], "big"), int.from_bytes(digest[7:14], "big")

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
        return pairs >= round(self.dropout * (1 << 32)) - (1 << 31)


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


def drawn(rng: Any, wanted: bool) -> tuple[int, int]:
    """(seed, offset) as given, or drawn from torch's default generator where they are wanted.

    Raises:
        ContractError: something else was given.
    """
    if rng is None:
        seed, offset = torch.randint(0, 2**62, (2,)).tolist() if wanted else (0, 0)
        return seed, offset
    if isinstance(rng, tuple | list) and len(rng) == 2 and all(type(n) is int and 0 <= n < 1 << 63 for n in rng):
        return rng[0], rng[1]
    raise ContractError(f"rng {rng!r} was given: pass (seed, offset), two whole numbers of 0 or more")
