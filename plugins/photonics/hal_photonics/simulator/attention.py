"""What the simulated chip computes of attention: products on the optics, everything else in its control die.

QK^T: keys are held as weights, queries stream. PV: values are held, softmax weights stream. The weights exp(s - max)
reach the optics unnormalised, between 0 and 1; the sum that divides them is digital and exact.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from hal_core.plugin_api import AttentionRequest, MaskKind

from .blockfloat import encode
from .core import PhotonicCore
from .held import WeightTile

Span = tuple[int, int]
_LOWEST = torch.finfo(torch.float32).min


class Part(NamedTuple):
    """A part of a call: batch entries, key heads and query rows, and the tiles of keys that they read, in order."""

    batch: slice
    heads: slice
    rows: slice
    spans: tuple[Span, ...]

    @property
    def keys(self) -> slice:
        """The keys from the first to the last tile."""
        return slice(self.spans[0][0], self.spans[-1][1])


class Programmed(NamedTuple):
    """Keys and values as the chip holds them.

    Attributes:
        key_codes: [batch, heads_kv, len_k, dim_qk], whole numbers as float32.
        key_scales: [batch, heads_kv, len_k, tiles along dim_qk], float32.
        values: [batch, heads_kv, len_k, dim_v], float32; their codes depend on the tiles of the keys.
    """

    key_codes: Tensor
    key_scales: Tensor
    values: Tensor


def program(core: PhotonicCore, key: Tensor, value: Tensor, into: Programmed, not_finite: Tensor | None) -> None:
    """Encode keys and copy values, head by head, into the chip's memory.

    Args:
        key, value: [batch, heads_kv, len_k, dim], any float dtype and strides.
        not_finite: [batch, heads_kv], heads that are left at zero; None for none.
    """
    places = list(core.converters.tiles(key.shape[-1]))
    for b in range(key.shape[0]):
        for h in range(key.shape[1]):
            if not_finite is not None and bool(not_finite[b, h]):
                for tensor in into:
                    tensor[b, h].zero_()
                continue
            head = key[b, h].float()
            for number, place in enumerate(places):
                codes, scales = encode(head[..., place], core.converters.weight_levels)
                into.key_codes[b, h, :, place] = codes
                into.key_scales[b, h, :, number] = scales[:, 0]
            into.values[b, h] = value[b, h]


class Products(Protocol):
    """The two products of attention."""

    def scores(self, query: Tensor, part: Part) -> Tensor:
        """QK^T of the part's query [batch, heads_q, rows, dim]: a new tensor [batch, heads_q, rows, keys], float32."""
        ...

    def mixed(self, weights: Tensor, part: Part) -> Tensor:
        """PV: weights [batch, heads_q, rows, keys] -> [batch, heads_q, rows, dim_v], float32."""
        ...


class OpticalProducts(NamedTuple):
    """Products on the chip, with what it holds, the generator of its readout noise, and the passes to average."""

    core: PhotonicCore
    held: Programmed
    noise: torch.Generator | None
    passes: int = 1

    def scores(self, query: Tensor, part: Part) -> Tensor:
        held = self.held
        codes, scales = (t[part.batch, part.heads, part.keys].flatten(0, 1) for t in (held.key_codes, held.key_scales))
        places = self.core.converters.tiles(codes.shape[-1])
        tiles = (
            WeightTile(place, self.core.program(codes[..., place]), scales[..., [i]]) for i, place in enumerate(places)
        )
        batch, heads_q, rows, dim = query.shape
        inputs = query.float().reshape(len(codes), -1, dim)
        found = self.core.stream(inputs, codes.shape[1], tiles, self.noise, passes=self.passes)
        return found.view(batch, heads_q, rows, -1)

    def mixed(self, weights: Tensor, part: Part) -> Tensor:
        values = self.held.values[part.batch, part.heads, part.keys].flatten(0, 1)
        origin, widest = part.keys.start, self.core.converters.inputs
        tiles = [  # a range of keys wider than the array takes several tiles
            slice(k - origin, min(k + widest, stop) - origin)
            for start, stop in part.spans
            for k in range(start, stop, widest)
        ]
        batch, heads_q, rows, keys = weights.shape
        inputs = weights.view(len(values), -1, keys)
        found = self.core.product(inputs, values.transpose(1, 2), self.noise, tiles=tiles, passes=self.passes)
        return found.view(batch, heads_q, rows, -1)


class ExactProducts(NamedTuple):
    """Products in float32, differentiable, of key and value [batch, heads_kv, len_k, dim]."""

    key: Tensor
    value: Tensor

    def scores(self, query: Tensor, part: Part) -> Tensor:
        keys = self.key[part.batch, part.heads, part.keys].float().flatten(0, 1)
        batch, heads_q, rows, dim = query.shape
        found = query.float().reshape(len(keys), -1, dim) @ keys.transpose(-1, -2)
        return found.view(batch, heads_q, rows, -1)

    def mixed(self, weights: Tensor, part: Part) -> Tensor:
        values = self.value[part.batch, part.heads, part.keys].float().flatten(0, 1)
        batch, heads_q, rows, keys = weights.shape
        return (weights.view(len(values), -1, keys) @ values).view(batch, heads_q, rows, -1)


def attend_part(
    products: Products,
    query: Tensor,
    part: Part,
    mask: Tensor | None,
    band: tuple[int | None, int | None],
    request: AttentionRequest,
) -> tuple[Tensor, Tensor]:
    """Attention of a part; differentiable where the products are.

    Args:
        query: [batch, heads_q, rows, dim_qk] of the part. mask: of the part; dimensions of size 1 broadcast.
        band: (low, high): row i sees keys i + low to i + high; None for no bound.

    Returns:
        (out [batch, heads_q, rows, dim_v], lse [batch, heads_q, rows]), float32. A row without a key gives 0, -inf.
    """
    visible = _visible_pairs(band, part.rows, part.keys)
    masked = _masked(products.scores(query, part) * request.effective_scale, mask, visible, request)
    peak = masked.detach().amax(-1, keepdim=True)
    fully_masked = peak == -torch.inf
    weights = (masked - peak.masked_fill(fully_masked, 0)).exp_()
    del masked
    total = weights.sum(-1, keepdim=True).masked_fill(fully_masked, 1)
    out = (products.mixed(weights, part) / total).masked_fill(fully_masked, 0)
    return out, (peak + total.log()).masked_fill(fully_masked, -torch.inf).squeeze(-1)


def _masked(scores: Tensor, mask: Tensor | None, visible: Tensor | None, request: AttentionRequest) -> Tensor:
    if request.softcap is not None:
        scores = request.softcap * torch.tanh(scores / request.softcap)
    if request.mask is MaskKind.BOOLEAN and mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    elif mask is not None:
        scores = _added(scores, mask)
    return scores if visible is None else scores.masked_fill(~visible, -torch.inf)


def _added(scores: Tensor, mask: Tensor) -> Tensor:
    """Scores plus an additive mask. Only -inf hides a key: a finite value stays finite, however low."""
    hidden = mask == -torch.inf
    return (scores + mask.float().masked_fill(hidden, 0)).clamp_min_(_LOWEST).masked_fill_(hidden, -torch.inf)


def _visible_pairs(band: tuple[int | None, int | None], rows: slice, keys: slice) -> Tensor | None:
    """The boolean mask [rows, keys] of causal and window; None where every pair is visible."""
    low, high = band
    if low is None and high is None:
        return None
    distance = torch.arange(keys.start, keys.stop) - torch.arange(rows.start, rows.stop).unsqueeze(1)
    seen = torch.ones_like(distance, dtype=torch.bool) if high is None else distance <= high
    return seen if low is None else seen.logical_and_(distance >= low)


def part_of_mask(mask: Tensor | None, part: Part, heads: slice) -> Tensor | None:
    """The view of a 4-dimensional mask that a part needs; dimensions of size 1 stay."""
    if mask is None:
        return None
    places: Sequence[slice] = (part.batch, heads, part.rows, part.keys)
    return mask[tuple(slice(None) if size == 1 else place for size, place in zip(mask.shape, places, strict=True))]
