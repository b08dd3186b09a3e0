"""Which pairs of query and key tokens attention reads, as few dense calls: causal, windows and packed sequences by the
tokens' own positions.
"""

import itertools
from collections.abc import Iterable, Iterator
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hal_core import AttentionRequest, Causal

from .layout import Piece, Pieces


class Rule(NamedTuple):
    """What causal, window and packed sequences let a token read.

    Attributes:
        causal, diagonal, window: as of `AttentionRequest`, for the whole sequence or for each packed one.
        cu_q, cu_k: cumulative lengths of the whole sequences, (0, len) where there is one.
    """

    causal: Causal
    diagonal: int
    window: tuple[int | None, int | None] | None
    cu_q: tuple[int, ...]
    cu_k: tuple[int, ...]

    def band(self, sequence: int) -> tuple[int | None, int | None]:
        """(low, high): query token q of a sequence reads key tokens q + low to q + high; None for no bound."""
        begin_q, begin_k = self.cu_q[sequence], self.cu_k[sequence]
        len_q, len_k = self.cu_q[sequence + 1] - begin_q, self.cu_k[sequence + 1] - begin_k
        offset = begin_k - begin_q + self.diagonal + (len_k - len_q if self.causal is Causal.BOTTOM_RIGHT else 0)
        left, right = self.window or (None, None)
        right = right if self.causal is Causal.NONE else 0
        return None if left is None else offset - left, None if right is None else offset + right


class Call(NamedTuple):
    """One dense attention call.

    Attributes:
        rows, keys: slots of the query and of the key tensor.
        low, high: row i reads keys i + low to i + high of them; None for no bound.
        tokens: (query pieces, key pieces) of the slots.
        masked: the pairs follow no band of slots, so a boolean mask says them.
    """

    rows: slice
    keys: slice
    low: int | None
    high: int | None
    tokens: tuple[Pieces, Pieces]
    masked: tuple[int | None, int | None] | None = None

    def visible(self, device: torch.device) -> Tensor | None:
        """bool [rows, keys] of a masked call; None of any other."""
        if self.masked is None:
            return None
        low, high = self.masked
        distance = tokens_of(self.tokens[1], device) - tokens_of(self.tokens[0], device)[:, None]
        seen = torch.ones_like(distance, dtype=torch.bool) if high is None else distance <= high
        return seen if low is None else seen & (distance >= low)

    @property
    def open(self) -> bool:
        """Whether every row reads every key."""
        return (self.low, self.high, self.masked) == (None, None, None)

    @property
    def size(self) -> tuple[int, int]:
        """How many rows and keys."""
        return self.rows.stop - self.rows.start, self.keys.stop - self.keys.start

    @property
    def pairs(self) -> int:
        """How many pairs of tokens are visible."""
        if self.masked is not None:
            return int(self.visible(torch.device("cpu")).sum())  # type: ignore[union-attr]
        return AttentionRequest(1, 1, 1, *self.size, 1, 0, "float32", **band_options(self.low, self.high)).visible_macs


def band_options(low: int | None, high: int | None) -> dict[str, Any]:
    """A band of slots as `hal.attention`'s causal, diagonal and window."""
    if high is None:
        return {} if low is None else {"causal": Causal.NONE, "diagonal": low, "window": (0, None)}
    window = None if low is None else (high - low, None)
    return {"causal": Causal.TOP_LEFT, "diagonal": high, "window": window}


def tokens_of(pieces: Pieces, device: torch.device) -> Tensor:
    """int64: the tokens in the pieces' slots."""
    parts = [torch.arange(p.start, p.last + 1, p.step, device=device) for p in pieces]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


@lru_cache(maxsize=4096)
def find_calls(queries: Pieces, keys: Pieces, rule: Rule, most: tuple[int, int] | None = None) -> tuple[Call, ...]:
    """The dense calls that give the queries' attention over the keys, in the order of query slots.

    Args:
        queries, keys: the tokens of the two tensors. most: bounds of a call's rows and keys; None for none.

    Returns:
        Calls whose pairs are disjoint and, together, all that the rule lets the queries read. With bounds they are cut
        where a token's number is a multiple of its bound, so that they are the same wherever the tokens lie.
    """
    found: list[Call] = []
    columns: dict[int, list[Piece]] = {}
    for key, sequence in _cut(keys, rule.cu_k, most and most[1]):
        columns.setdefault(sequence, []).append(key)
    for query, sequence in _cut(queries, rule.cu_q, most and most[0]):
        alone: list[Call] = []
        for key in columns.get(sequence, ()):
            call = _call(query, key, *rule.band(sequence))
            if call is not None and alone and most is None and _follows(alone[-1], call):
                call = _behind(alone.pop(), call)
            alone += [] if call is None else [call]
        found += alone
    found = found if most else _stacked(found)
    return tuple(sorted(found, key=lambda call: (call.rows.start, call.keys.start)))


def _cut(pieces: Iterable[Piece], edges: tuple[int, ...], most: int | None) -> Iterator[tuple[Piece, int]]:
    """Pieces of one sequence and at most `most` tokens each, and the number of their sequence."""
    for piece in pieces:
        for sequence, (begin, end) in enumerate(itertools.pairwise(edges)):
            first = max(-(-(begin - piece.start) // piece.step), 0)
            stop = min(-(-(end - piece.start) // piece.step), piece.size)
            while first < stop:
                at = piece.start // piece.step + first
                following = stop if most is None else min(first + most - at % most, stop)
                yield piece.part(first, following), sequence
                first = following


def _call(query: Piece, key: Piece, low: int | None, high: int | None) -> Call | None:
    """The call of two pieces, of which a query token reads key tokens by `low` and `high`; None where it reads none."""
    least, most = key.start - query.last, key.last - query.start
    if (high is not None and least > high) or (low is not None and most < low):
        return None
    low = None if low is None or least >= low else low
    high = None if high is None or most <= high else high
    rows, columns = slice(query.at, query.at + query.size), slice(key.at, key.at + key.size)
    tokens, step = ((query,), (key,)), query.step if query.size > 1 else key.step
    if key.size > 1 and key.step != step and (low, high) != (None, None):
        return Call(rows, columns, None, None, tokens, (low, high))
    between = query.start - key.start
    low = None if low is None else -(-(low + between) // step)
    high = None if high is None else (high + between) // step
    least, most = 1 - query.size if low is None else low, key.size - 1 if high is None else high
    empty = least > min(most, key.size - 1) or most < 1 - query.size
    return None if empty else Call(rows, columns, low, high, tokens)


def _follows(first: Call, second: Call) -> bool:
    """Whether all rows of a call read all its keys, and one band says what they read of these and those behind them."""
    lets = second.low is None and second.masked is None and (second.high is None or second.high >= -1)
    return first.open and lets and first.keys.stop == second.keys.start


def _behind(first: Call, second: Call) -> Call:
    """Two calls, of which the second follows the first, as one."""
    high, (rows, keys) = second.high, second.tokens
    return second._replace(
        keys=slice(first.keys.start, second.keys.stop),
        high=None if high is None else high + first.size[1],
        tokens=(rows, first.tokens[1] + keys),
    )


def _stacked(calls: list[Call]) -> list[Call]:
    """The calls, those of neighbouring rows that read the same keys, all of them, as one."""
    found: list[Call] = []
    above: dict[tuple[int, int], int] = {}
    for call in calls:
        place = call.keys.start, call.keys.stop
        last = found[above[place]] if place in above else call
        if call.open and last.rows.stop == call.rows.start:
            rows = slice(last.rows.start, call.rows.stop)
            found[above[place]] = last._replace(rows=rows, tokens=(last.tokens[0] + call.tokens[0], call.tokens[1]))
            continue
        if call.open:
            above[place] = len(found)
        found.append(call)
    return found
