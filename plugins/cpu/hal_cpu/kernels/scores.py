"""From products of query and key to scores and weights: scale, softcap, mask, causal and window, one tile at a time.

Scores are kept in base 2 (natural scores times log2 e) because torch's exp2 is several times faster than its exp. Under
an additive mask they stay natural until the row's maximum is subtracted: the lowest finite number of a dtype, which
Hugging Face writes into masks, would become -inf when it is multiplied by log2 e.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from hal_core.plugin_api import AttentionRequest, Causal, MaskKind

from .keyvalue import Columns, bounds, width

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

    def hides(self, rows: slice, keys: tuple[int, int]) -> bool:
        """Whether some pair of the rows and of the keys from keys[0] to keys[1] (excluded) is hidden."""
        start, stop = keys
        above = self.upper is not None and stop - 1 > rows.start + self.upper
        below = self.lower is not None and start < rows.stop - 1 + self.lower
        return above or below


class HiddenPairs:
    """Booleans that say which pairs of a tile causal and window hide, in one buffer that all tiles of a call share.

    Along a diagonal all tiles are alike, so the booleans are written only when they differ from the last tile's.

    Args:
        band: what causal and window leave. memory: bool, for rows and columns of the largest tile.
    """

    def __init__(self, band: Band, memory: Tensor) -> None:
        self._band, self._memory = band, memory
        self._written: tuple[object, ...] = ()

    def of(self, rows: slice, columns: Columns) -> Tensor | None:
        """Boolean [rows, columns], True where hidden; None where every pair is visible. Valid until the next call."""
        lower, upper = self._band
        start, stop = bounds(columns)
        if not self._band.hides(rows, (start, stop)):
            return None
        shape = (rows.stop - rows.start, width(columns))
        hidden = self._memory[: shape[0] * shape[1]].view(shape)
        now = (rows.start - start, *shape) if isinstance(columns, slice) else ()
        if now and now == self._written:
            return hidden
        self._written = now
        key = torch.arange(start, stop) if isinstance(columns, slice) else columns.keys
        row = torch.arange(rows.start, rows.stop).unsqueeze(1)
        if upper is not None:
            torch.gt(key, row + upper, out=hidden)
        if lower is not None:
            if upper is None:
                torch.lt(key, row + lower, out=hidden)
            else:
                hidden.logical_not_().logical_and_(key >= row + lower).logical_not_()
        return hidden


class ScoreRule(NamedTuple):
    """How a product becomes a score, and scores become weights.

    Attributes:
        factor: multiplies the query before the product.
        cap: the softcap, or None. logistic: whether it is made from the logistic function.
        scale: of the request. unit: what natural scores are multiplied by: log2 e, or 1 under an additive mask.
    """

    factor: float
    cap: float | None
    logistic: bool
    scale: float
    unit: float

    @classmethod
    def of(cls, request: AttentionRequest) -> ScoreRule:
        """The rule of a request with exact lengths."""
        scale, cap = request.effective_scale, request.softcap
        unit = 1.0 if request.mask is MaskKind.ADDITIVE else LOG2E
        if cap is None:
            return cls(scale * unit, None, False, scale, unit)
        logistic = cap <= LARGEST_LOGISTIC_CAP and request.len_k >= FEWEST_LOGISTIC_KEYS
        return cls((2 if logistic else 1) * scale / cap, cap, logistic, scale, unit)

    def apply_cap(self, products: Tensor, slope: Tensor | None = None) -> Tensor:
        """Products to scores, in place; `slope`, if given, receives the derivative 1 - tanh²."""
        if self.cap is None:
            return products
        if self.logistic:  # tanh(x) = 2 * logistic(2x) - 1
            products.sigmoid_().sub_(0.5)
            if slope is not None:
                torch.mul(products, products, out=slope).mul_(-4).add_(1)
            return products.mul_(2 * self.cap * self.unit)
        products.tanh_()
        if slope is not None:
            torch.mul(products, products, out=slope).neg_().add_(1)
        return products.mul_(self.cap * self.unit)

    def exponentials(self, scores: Tensor, anchor: Tensor) -> Tensor:
        """exp(score - anchor) of natural scores, in place; the anchor is in the scores' unit."""
        scores.sub_(anchor)
        return (scores.mul_(LOG2E) if self.unit == 1.0 else scores).exp2_()

    def log_sum_exp(self, top: Tensor, total: Tensor) -> Tensor:
        """Natural log-sum-exp of a maximum in the scores' unit and a sum of exponentials; overwrites `total`."""
        if self.unit == 1.0:
            return total.log_().add_(top)
        return total.log2_().add_(top).mul_(LN2)


def split_heads(mask: Tensor, heads_kv: int, group: int) -> Tensor:
    """A mask as [batch, heads_kv, group, len_q, len_k], sizes of 1 where it broadcasts."""
    mask = mask[(None,) * (4 - mask.dim())]
    return mask.unsqueeze(2) if mask.shape[1] == 1 else mask.unflatten(1, (heads_kv, group))


def mask_tile(mask: Tensor, batch: slice, heads: slice, rows: slice, columns: slice) -> Tensor:
    """The part of a `split_heads` mask that a tile needs, a view; dimensions of size 1 stay."""
    whole = slice(None)
    part = mask[
        batch if mask.shape[0] > 1 else whole,
        heads if mask.shape[1] > 1 else whole,
        :,
        rows if mask.shape[3] > 1 else whole,
    ]
    return part if mask.shape[4] == 1 else part[..., columns]


def apply_mask(scores: Tensor, mask: Tensor, unit: float, room: Tensor) -> None:
    """Apply a mask tile to scores [batch, heads_kv, group, rows, columns], in place.

    Args:
        mask: boolean, or additive in natural units. unit: of the scores.
        room: flat memory in the scores' dtype for a converted tile; used where an additive mask has another dtype.
    """
    if mask.dtype == torch.bool:
        torch.where(mask, scores, torch.full((), -math.inf, dtype=scores.dtype), out=scores)
        return
    if mask.dtype != scores.dtype:
        mask = room[: mask.numel()].view(mask.shape).copy_(mask)
    scores.add_(mask, alpha=unit)
