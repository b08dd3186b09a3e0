"""Attention over parts of the keys: partial results merged in the forward pass, gradients from the merged result."""

import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hal_core import AttentionRequest

from .description import Given
from .draws import Draws
from .inner import Inner, Result
from .visible import Call, tokens_of

#: Where gradients are summed; None where they are not wanted.
Sum = Tensor | None


def new_sum(like: Tensor, lse: Tensor, into: Tensor | None) -> Tensor:
    """Zeros in the shape of `like`, in the dtype of sums and on the device of `lse`: `into` where that fits."""
    if into is not None and (into.dtype, into.device) == (lse.dtype, lse.device):
        return into.zero_()
    return torch.zeros(like.shape, dtype=lse.dtype, device=lse.device)


def finished(total: Tensor, like: Tensor, into: Tensor | None) -> Tensor:
    """A sum as a gradient of `like`, in `into` where there is one."""
    if total is into:
        return total
    total = total.to(like.dtype)  # where the sum lies: torch's copy to host memory would convert it there, slowly
    return total.to(like.device) if into is None else into.copy_(total)


class Accumulator:
    """The merged attention over the keys seen so far.

    Args:
        query: whose rows are attended to. out: where the result will be; it holds the sums if its dtype is theirs.

    Attributes:
        out: [batch, heads, rows, dim_v], in the dtype of sums. top, total: [batch, heads, rows]: the largest partial
            log-sum-exp, and the sum of exponentials below it; -inf and 0 for a row without a key so far.

    Source: Milakov & Gimelshein 2018 (online softmax), equation 3.
    """

    def __init__(self, query: Tensor, out: Tensor) -> None:
        self.dtype = torch.promote_types(query.dtype, torch.float32)
        self.out = out.zero_() if out.dtype == self.dtype else torch.zeros_like(out, dtype=self.dtype)
        self.top = query.new_full(query.shape[:3], -math.inf, dtype=self.dtype)
        self.total = torch.zeros_like(self.top)
        self._seen: list[slice] = []

    def add(self, rows: slice, out: Tensor | None, lse: Tensor) -> None:
        """Merge a partial result of some rows; `out` may be written to, None: the log-sum-exp alone counts."""
        top, total = self.top[:, :, rows], self.total[:, :, rows]
        if not any(seen.start < rows.stop and rows.start < seen.stop for seen in self._seen):
            self._seen.append(rows)
            top.copy_(lse)
            total.copy_(lse > -math.inf)
            if out is not None:
                self.out[:, :, rows] = out
            return
        self._seen.append(rows)
        highest = torch.maximum(top, lse)
        anchor = highest.masked_fill(highest == -math.inf, 0)
        old, new = total.mul_((top - anchor).exp_()), (lse - anchor).exp_()
        top.copy_(highest)
        both = old + new
        if out is not None:
            share = new.div_(both.masked_fill(both == 0, 1)).unsqueeze_(-1)
            out = out.to(self.dtype) if out.dtype != self.dtype else out
            # out + share * (part - out): a weighted mean without a temporary of the output's size.
            self.out[:, :, rows].mul_(1 - share).add_(out.mul_(share))
        total.copy_(both)

    @property
    def lse(self) -> Tensor:
        """The merged log-sum-exp; -inf for a row without a key."""
        return self.top + self.total.log()


class Part(NamedTuple):
    """Batch entries and heads that are computed together."""

    entries: slice
    heads: slice
    heads_kv: slice

    def queries(self, tensor: Any) -> Any:
        """The part of a tensor over query heads, of which there may be 1 for all, or None."""
        return None if tensor is None else _cut(tensor, self.entries, self.heads)

    def of(self, given: Given) -> Given:
        """The part of all operands; those that are None stay."""
        key, value = (t if t is None else _cut(t, self.entries, self.heads_kv) for t in given[1:3])
        return Given(self.queries(given.query), key, value, self.queries(given.mask))

    def draws(self, draws: Draws | None) -> Draws | None:
        """The random numbers of this part."""
        if draws is None or self is WHOLE:
            return draws
        return draws._replace(first_head=draws.first_head + self.heads.start, first_entry=self.entries.start)


def _cut(tensor: Tensor, entries: slice, heads: slice) -> Tensor:
    return tensor[entries if tensor.shape[0] > 1 else slice(None), heads if tensor.shape[1] > 1 else slice(None)]


WHOLE = Part(slice(None), slice(None), slice(None))


def cut(r: AttentionRequest, batch: int, heads_kv: int) -> tuple[Part, ...]:
    """A request's parts of so many batch entries and key heads."""
    if (batch, heads_kv) == (r.batch, r.heads_kv):
        return (WHOLE,)
    group = r.heads_q // r.heads_kv
    return tuple(
        Part(slice(i, i + batch), slice(j * group, (j + heads_kv) * group), slice(j, j + heads_kv))
        for i, j in itertools.product(range(0, r.batch, batch), range(0, r.heads_kv, heads_kv))
    )


class PartialAttention:
    """The dense calls of a rank, one set of keys after the other.

    Args:
        inner: the device that runs them. draws: None for none. out: where the result will be.
    """

    def __init__(self, inner: Inner, draws: Draws | None, query: Tensor, out: Tensor) -> None:
        self.inner, self.draws = inner, draws
        self.dropout = draws if draws is not None and draws.dropout else None
        self.kept = Accumulator(query, out)
        self.every = self.kept if self.dropout is None else Accumulator(query, self.kept.out[..., :0])

    def add(self, given: Given, calls: Sequence[Call]) -> None:
        """Attend to the keys of some calls."""
        for call in calls:
            operands = _of(given, call)
            rng = None if self.draws is None else self.draws.noise(call)
            if self.dropout is None:
                self.kept.add(call.rows, *self.inner.forward(operands, call, rng))
                continue
            # Weights of dropped pairs are left out of the products and not of the sums below them.
            self.kept.add(call.rows, *self.inner.forward(_kept(self.dropout, operands, call), call, rng))
            self.every.add(call.rows, None, self.inner.forward(operands, call, rng)[1])

    def finish(self, out: Tensor, lse: Tensor) -> None:
        """Write (out, log-sum-exp) over all keys that were added."""
        lse.copy_(self.every.lse)
        if self.dropout is not None:
            share = (self.kept.lse - lse.masked_fill(lse == -math.inf, 0)).exp_()
            self.kept.out.mul_(share.div_(1 - self.dropout.dropout).unsqueeze_(-1))
        if self.kept.out is not out:
            out.copy_(self.kept.out)


class PartialGradients:
    """Gradients from a merged result, one set of keys after the other.

    Args:
        wanted: of "q", "k", "v", "mask". query, mask: the sums of their gradients, None where not wanted.
    """

    def __init__(
        self, inner: Inner, draws: Draws | None, result: Result, wanted: frozenset[str], query: Sum, mask: Sum
    ) -> None:
        self.inner, self.dropout = inner, draws  # gradients of noise are refused
        self.query, self.mask = query, mask
        self.results = [(result, wanted)]
        if draws is not None:
            # d score = weight * keep / (1 - p) * (grad_out . value) - weight * delta: the first term from kept pairs
            # with an output of 0, whose delta is 0; the second from all pairs, as a gradient of the log-sum-exp.
            out, lse, grad_out, grad_lse = result
            delta, nothing = (out.to(lse.dtype) * grad_out).sum(-1), torch.zeros_like(out)
            of_kept = Result(nothing, lse, grad_out / (1 - draws.dropout), None)
            of_all = Result(nothing, lse, nothing, -delta if grad_lse is None else grad_lse - delta)
            self.results = [(of_kept, wanted), (of_all, wanted - {"v"})]

    def add(self, given: Given, calls: Sequence[Call], key: Sum, value: Sum) -> None:
        """Add the gradients that some calls give to the sums of query and mask, and to those of their keys and values.

        Args:
            key, value: sums in the shape of the keys and values, in the dtype of sums; None where not wanted.
        """
        for call in calls:
            operands = _of(given, call)
            for n, (result, wanted) in enumerate(self.results):
                kept = operands if self.dropout is None or n else _kept(self.dropout, operands, call)
                if wanted:
                    found = self.inner.backward(kept, call, result.rows(call.rows), wanted)
                    self._sum(found, given, call, key, value)
                    del found  # its memory serves the next call

    def _sum(self, found: tuple[Tensor | None, ...], given: Given, call: Call, key: object, value: object) -> None:
        for total, grad, place in zip((self.query, key, value), found, (call.rows, call.keys, call.keys), strict=False):
            if isinstance(total, Tensor) and grad is not None:
                total[:, :, place] += grad.to(total.device)
        if self.mask is None or found[3] is None:
            return
        part = self.mask[:, :, call.rows] if self.mask.shape[2] > 1 else self.mask
        columns = _columns(call, part)
        count = found[3].shape[3] if part.shape[3] > 1 else 1
        # What hides pairs beside the mask may have made it wider: dropout has a pattern for every head.
        grad = found[3].to(self.mask.dtype).sum_to_size(*part.shape[:3], count)
        if isinstance(columns, slice):
            part[..., columns] += grad
        else:
            part.index_add_(3, columns, grad)


def _of(given: Given, call: Call) -> Given:
    """The operands of one call. Keys that lie elsewhere (in host memory) come to the queries."""
    query = given.query[:, :, call.rows]
    key, value = given.key[:, :, call.keys].to(query.device), given.value[:, :, call.keys].to(query.device)
    mask = given.mask
    if mask is not None:
        mask = mask[:, :, call.rows] if mask.shape[2] > 1 else mask
        columns = _columns(call, mask)
        mask = mask[..., columns] if isinstance(columns, slice) else mask.index_select(3, columns)
    seen = call.visible(query.device)
    return Given(query, key, value, mask if seen is None else _both(mask, seen[None, None]))


def _columns(call: Call, mask: Tensor) -> slice | Tensor:
    """The mask's columns of the keys of a call."""
    if mask.shape[3] == 1:
        return slice(None)
    pieces = call.tokens[1]
    tokens = [(piece.start, piece.last + 1) for piece in pieces]
    if all(a[1] == b[0] for a, b in itertools.pairwise(tokens)) and all(p.step == 1 for p in pieces):
        return slice(tokens[0][0], tokens[-1][1])
    return tokens_of(pieces, mask.device)


def _kept(dropout: Draws, operands: Given, call: Call) -> Given:
    """The operands of one call with a mask that hides dropped pairs too."""
    query = operands.query
    rows, keys = (tokens_of(pieces, query.device) for pieces in call.tokens)
    return operands._replace(mask=_both(operands.mask, dropout.keep(query.shape[0], query.shape[1], rows, keys)))


def _both(mask: Tensor | None, seen: Tensor) -> Tensor:
    """A mask that hides what either hides."""
    if mask is None:
        return seen
    return mask & seen if mask.dtype == torch.bool else mask.masked_fill(~seen, -math.inf)
