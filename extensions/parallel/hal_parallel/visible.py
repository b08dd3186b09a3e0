"""Which pairs of query and key tokens attention reads, as few dense calls: causal, windows and packed sequences by the
tokens' own positions.
"""

from __future__ import annotations

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
def find_calls(
    queries: Pieces, keys: Pieces, rule: Rule, most_rows: int | None = None, most_keys: int | None = None
) -> tuple[Call, ...]:
    """The dense calls that give the queries' attention over the keys, in the order of query slots.

    Args:
        queries, keys: the tokens of the two tensors. most_rows, most_keys: bounds of one call; None for none.

    Returns:
        Calls whose pairs are disjoint and, together, all that the rule lets the queries read.
    """
    found: list[Call] = []
    whole: list[_Whole] = []
    columns: dict[int, list[Piece]] = {}
    for key, sequence in _cut(keys, rule.cu_k, most_keys):
        columns.setdefault(sequence, []).append(key)
    for query, sequence in _cut(queries, rule.cu_q, most_rows):
        spans: list[list[Piece]] = []
        for key in columns.get(sequence, ()):
            band = _clipped(query, key, *rule.band(sequence))
            if band is None:
                continue
            last = spans[-1] if spans else None
            size = 0 if last is None else _size(last) + key.size
            near = last if last and size <= (most_keys or size) and last[-1].at + last[-1].size == key.at else None
            if band == (None, None):
                if near is None:
                    spans.append([])
                spans[-1].append(key)
                continue
            call = _banded(query, key, *band)
            if call is not None and near is not None and _follows(call):
                spans.pop()
                call = _behind(call, near)
            if call is not None:
                found.append(call)
        if spans:
            _join(whole, query, spans, most_rows)
    for each in whole:
        found += (
            Call(_slots(each.queries), _slots(span), None, None, (tuple(each.queries), tuple(span)))
            for span in each.spans
        )
    return tuple(sorted(found, key=lambda call: (call.rows.start, call.keys.start)))


class _Whole(NamedTuple):
    """Neighbouring pieces of queries that read every key of some spans."""

    queries: list[Piece]
    spans: list[list[Piece]]


def _slots(span: list[Piece]) -> slice:
    return slice(span[0].at, span[-1].at + span[-1].size)


def _size(span: list[Piece]) -> int:
    return sum(piece.size for piece in span)


def _cut(pieces: Iterable[Piece], edges: tuple[int, ...], most: int | None) -> Iterator[tuple[Piece, int]]:
    """Pieces of one sequence and at most `most` tokens each, and the number of their sequence."""
    for piece in pieces:
        for sequence, (begin, end) in enumerate(itertools.pairwise(edges)):
            first = max(-(-(begin - piece.start) // piece.step), 0)
            stop = min(-(-(end - piece.start) // piece.step), piece.size)
            for at in range(first, stop, most or max(stop - first, 1)):
                yield piece.part(at, min(at + (most or stop), stop)), sequence


def _clipped(query: Piece, key: Piece, low: int | None, high: int | None) -> tuple[int | None, int | None] | None:
    """The bounds of key - query token that hide a pair of the two pieces; None where every pair is hidden."""
    least, most = key.start - query.last, key.last - query.start
    if (high is not None and least > high) or (low is not None and most < low):
        return None
    return (
        None if low is None or least >= low else low,
        None if high is None or most <= high else high,
    )


def _banded(query: Piece, key: Piece, low: int | None, high: int | None) -> Call | None:
    """The call of two pieces under a band of tokens; None where no pair is visible."""
    rows, columns = slice(query.at, query.at + query.size), slice(key.at, key.at + key.size)
    step = query.step if query.size > 1 else key.step
    if key.size > 1 and key.step != step:
        return Call(rows, columns, None, None, ((query,), (key,)), (low, high))
    between = query.start - key.start
    low = None if low is None else -(-(low + between) // step)
    high = None if high is None else (high + between) // step
    least, most = 1 - query.size if low is None else low, key.size - 1 if high is None else high
    if least > min(most, key.size - 1) or most < 1 - query.size:
        return None
    return Call(rows, columns, low, high, ((query,), (key,)))


def _follows(call: Call) -> bool:
    """Whether the band of a call lets every row read what lies right before its keys."""
    return call.masked is None and call.low is None and call.high is not None and call.high >= -1


def _behind(call: Call, span: list[Piece]) -> Call:
    """A call over a span that all its rows read, and the keys behind it that its band bounds."""
    assert call.high is not None
    keys = slice(span[0].at, call.keys.stop)
    return call._replace(keys=keys, high=call.high + _size(span), tokens=(call.tokens[0], (*span, *call.tokens[1])))


def _join(whole: list[_Whole], query: Piece, spans: list[list[Piece]], most: int | None) -> None:
    """Note that a piece of queries reads whole spans, together with its neighbour where that reads the same."""
    last = whole[-1] if whole else None
    size = 0 if last is None else _size(last.queries) + query.size
    if last and last.spans == spans and _slots(last.queries).stop == query.at and size <= (most or size):
        last.queries.append(query)
    else:
        whole.append(_Whole([query], spans))
