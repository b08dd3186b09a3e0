"""From products of query and key to base-2 scores: scale, softcap, mask, causal and window, on one tile at a time.

Scores are kept in base 2 (natural scores times log2 e) because torch's exp2 is several times faster than its exp.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
from torch import Tensor

from hal_core.plugin_api import AttentionRequest, Causal

from .keyvalue import Columns

LOG2E = math.log2(math.e)
LN2 = math.log(2)

#: Up to this cap c * tanh(s / c) may be made from the logistic function, which torch computes five times faster: its
#: rounding costs up to c * 2**-23 in the score. With few keys that would show in a log-sum-exp near 0, and time is
#: short.
LARGEST_LOGISTIC_CAP = 64.0
FEWEST_LOGISTIC_KEYS = 128


class Band(NamedTuple):
    """Which keys causal and window leave: row i reads keys i + lower to i + upper, inclusive; None is open."""

    lower: int | None
    upper: int | None

    @classmethod
    def of(cls, request: AttentionRequest, len_q: int, len_k: int) -> Band:
        offset = request.diagonal + (len_k - len_q if request.causal is Causal.BOTTOM_RIGHT else 0)
        left, right = request.window or (None, None)
        if request.causal is not Causal.NONE:
            right = 0 if right is None else min(right, 0)
        return cls(None if left is None else offset - left, None if right is None else offset + right)

    def range(self, rows: slice, len_k: int) -> tuple[int, int]:
        """Keys [start, stop) that some of the rows read; start >= stop for none."""
        start = 0 if self.lower is None else max(rows.start + self.lower, 0)
        stop = len_k if self.upper is None else min(rows.stop + self.upper, len_k)
        return start, max(stop, 0)

    def hidden(self, rows: slice, columns: Columns) -> Tensor | None:
        """Boolean [rows, columns], True where hidden; None where every pair is visible."""
        if self.lower is None and self.upper is None:
            return None
        if isinstance(columns, slice):
            if (self.upper is None or columns.stop - 1 <= rows.start + self.upper) and (
                self.lower is None or columns.start >= rows.stop - 1 + self.lower
            ):
                return None
            shift = rows.start - columns.start
            shape = (rows.stop - rows.start, columns.stop - columns.start)
            return _hidden(*shape, *(None if edge is None else edge + shift for edge in self))
        distance = columns - torch.arange(rows.start, rows.stop).unsqueeze(1)
        hidden = torch.zeros_like(distance, dtype=torch.bool)
        if self.upper is not None:
            hidden |= distance > self.upper
        if self.lower is not None:
            hidden |= distance < self.lower
        return hidden


@functools.lru_cache(maxsize=8)  # along a diagonal all tiles are alike
def _hidden(rows: int, columns: int, lower: int | None, upper: int | None) -> Tensor:
    above = torch.ones(rows, columns, dtype=torch.bool)
    hidden = torch.zeros_like(above) if upper is None else above.triu(upper + 1)
    return hidden if lower is None else hidden | above.tril(lower - 1)


class ScoreRule(NamedTuple):
    """How a product becomes a base-2 score.

    Attributes:
        factor: multiplies the query before the product.
        cap: the softcap, or None. logistic: whether it is made from the logistic function.
    """

    factor: float
    cap: float | None
    logistic: bool
    scale: float

    @classmethod
    def of(cls, request: AttentionRequest) -> ScoreRule:
        """The rule of a request with exact lengths."""
        scale, cap = request.effective_scale, request.softcap
        if cap is None:
            return cls(scale * LOG2E, None, False, scale)
        logistic = cap <= LARGEST_LOGISTIC_CAP and request.len_k >= FEWEST_LOGISTIC_KEYS
        return cls((2 if logistic else 1) * scale / cap, cap, logistic, scale)

    def apply_cap(self, products: Tensor, slope: Tensor | None = None) -> Tensor:
        """Products to base-2 scores, in place; `slope`, if given, receives the derivative 1 - tanh²."""
        if self.cap is None:
            return products
        if self.logistic:  # tanh(x) = 2 * logistic(2x) - 1
            products.sigmoid_().sub_(0.5)
            if slope is not None:
                torch.mul(products, products, out=slope).mul_(-4).add_(1)
            return products.mul_(2 * self.cap * LOG2E)
        products.tanh_()
        if slope is not None:
            torch.mul(products, products, out=slope).neg_().add_(1)
        return products.mul_(self.cap * LOG2E)


def split_heads(mask: Tensor, heads_kv: int, group: int) -> Tensor:
    """A mask as [batch, heads_kv, group, len_q, len_k], sizes of 1 where it broadcasts."""
    mask = mask[(None,) * (4 - mask.dim())]
    return mask.unsqueeze(2) if mask.shape[1] == 1 else mask.unflatten(1, (heads_kv, group))


def mask_tile(mask: Tensor, batch: slice, heads: slice, rows: slice, columns: Columns) -> Tensor:
    """The part of a `split_heads` mask that a tile needs; dimensions of size 1 stay."""
    whole = slice(None)
    part = mask[
        batch if mask.shape[0] > 1 else whole,
        heads if mask.shape[1] > 1 else whole,
        :,
        rows if mask.shape[3] > 1 else whole,
    ]
    if mask.shape[4] == 1:
        return part
    return part[..., columns] if isinstance(columns, slice) else part.index_select(4, columns)


def hide(scores: Tensor, mask: Tensor | None, hidden: Tensor | None) -> None:
    """Apply a mask tile and hidden pairs to base-2 scores [batch, heads_kv, group, rows, columns], in place."""
    if mask is not None:
        if mask.dtype == torch.bool:
            scores.masked_fill_(~mask, -math.inf)
        else:
            scores.add_(mask.to(scores.dtype), alpha=LOG2E)
    if hidden is not None:
        scores.masked_fill_(hidden, -math.inf)
