"""Orders of tokens in which near ones lie in one block: attention without causal or window does not depend on the keys'
order, and keeps each query's row.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from hal_core import ContractError

#: Keys that are looked at for topics, and topics that are kept of them.
_SAMPLE, _TOPICS = 256, 64
_DIRECTIONS = 16  # principal ones, along which tokens are bisected


class ContentOrder(NamedTuple):
    """A permutation of each head's tokens. order: int64 [B, H, L], the token at each place."""

    order: Tensor

    def apply(self, x: Tensor) -> Tensor:
        """Tokens of x [B, H, L, d] in this order."""
        return x.flatten(0, 2).index_select(0, self._rows()).view(x.shape)

    def undo(self, x: Tensor) -> Tensor:
        """Tokens of x [B, H, L, d] back at their places."""
        return x.flatten(0, 2).index_select(0, self.places()).view(x.shape)

    def places(self) -> Tensor:
        """Each token's place, all heads' one below the other: int64 [B H L]."""
        rows = self._rows()
        places = torch.empty_like(rows)
        places[rows] = torch.arange(len(rows), device=rows.device)
        return places

    def _rows(self) -> Tensor:
        """Each place's row of all heads' tokens one below the other: whole rows are copied at once."""
        batch, heads, length = self.order.shape
        start = torch.arange(0, batch * heads * length, length, device=self.order.device)
        return (self.order + start.view(batch, heads, 1)).flatten()


def content_order(x: Tensor, leaf: int = 64) -> ContentOrder:
    """Tokens [B, H, L, d] so that near ones lie in one block: balanced kd bisection.

    Tokens are projected to each head's principal directions, 16 at most; each part is halved at the median of the one
    along which it varies most, down to parts of `leaf` tokens. Attention
    without causal or window does not depend on the order of keys, and keeps each query's row: ordering both is exact.
    """
    if x.dim() != 4 or leaf < 1:
        raise ContractError(f"tokens {list(x.shape)} and leaf {leaf} were given: use [B, H, L, d] and 1 or more")
    length, d = x.shape[2:]
    parts = 1
    while parts * 2 * leaf <= length:
        parts *= 2
    wide = x.detach().float()
    if d > _DIRECTIONS:
        away = wide - wide.mean(2, keepdim=True)
        _, ways = torch.linalg.eigh(away.mT @ away)
        wide, d = away @ ways[..., -_DIRECTIONS:], _DIRECTIONS
    place = torch.arange(length + -length % parts, device=x.device).clamp(max=length - 1)  # copies of the last token
    order = place.expand(*x.shape[:2], -1)
    repeats = torch.arange(order.shape[-1], device=x.device) >= length
    extra = repeats.expand_as(order)
    now = 1
    while now < parts:
        rows = wide.gather(2, order.unsqueeze(-1).expand(-1, -1, -1, d)).unflatten(2, (now, -1))
        widest = rows.var(-2, correction=0).argmax(-1)
        values = rows.gather(-1, widest[..., None, None].expand(*rows.shape[:-1], 1))[..., 0]
        turned = values.argsort(dim=-1, stable=True)
        order, extra = (t.unflatten(2, (now, -1)).gather(-1, turned).flatten(2) for t in (order, extra))
        now *= 2
    if length % parts:
        order = order[~extra].view(*x.shape[:2], length)
    return ContentOrder(order)


def topic_orders(query: Tensor, key: Tensor) -> tuple[ContentOrder, ContentOrder]:
    """(of queries [B, H, len_q, d], of keys [B, Hk, len_k, d]): tokens of one topic after another.

    Of 256 keys at equal distances, each belongs to the first one that is nearer to it than half the mean squared
    distance; up to 64 of those first ones stand for topics. A key belongs to its nearest topic, a query to the one of
    the largest score, so that rows that read the same keys lie together.
    """
    length, heads = key.shape[2], key.shape[1]
    wide = torch.float64 if key.dtype == torch.float64 else torch.float32
    places = torch.linspace(0, length - 1, min(_SAMPLE, length), device=key.device).long()
    sample = key.detach()[:, :, places].to(wide)
    length_of = sample.square().sum(-1)
    squares = length_of.unsqueeze(-1) + length_of.unsqueeze(-2) - 2 * (sample @ sample.mT)
    place = torch.arange(len(places), dtype=torch.int16, device=key.device)
    near = squares <= squares.mean(-1, keepdim=True) / 2
    first = torch.where(near, place, len(places)).amin(-1)
    alone = first == place
    chosen = torch.where(alone, place, place + len(places)).sort(-1).indices[..., :_TOPICS]
    topics = sample.gather(2, chosen.unsqueeze(-1).expand(-1, -1, -1, sample.shape[-1]))
    bias = torch.zeros_like(chosen, dtype=wide).masked_fill_(~alone.gather(-1, chosen), -torch.inf).unsqueeze(-2)
    of_key = (key.detach().to(wide) @ topics.mT).add_(bias - topics.square().sum(-1).unsqueeze(-2) / 2).argmax(-1)
    group = query.shape[1] // heads
    if group > 1:
        topics, bias = (t.repeat_interleave(group, 1) for t in (topics, bias))
    of_query = (query.detach().to(wide) @ topics.mT).add_(bias).argmax(-1)
    by_query, by_key = (t.to(torch.uint8).sort(dim=-1, stable=True).indices for t in (of_query, of_key))
    return ContentOrder(by_query), ContentOrder(by_key)
