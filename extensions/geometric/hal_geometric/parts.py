"""Bounds of what each block of keys holds for all rows of a block of queries at once, from a few parts of each block.

A block that holds tokens of two topics has a large radius, and every bound of it as a whole is loose. So the tokens of
each block are split among a few parts around far-apart centres. For a row q = a + e of a part of queries (centre a,
|e| <= r, scale within) and a part of n keys (centre c, radius s), relative to a part of m keys with centre c*:

    log(lower of the part / lower of *) >= a . (c - c*) - r |c - c*| + log(n / m)
    log(upper of the part / lower of *) <= a . (c - c*) + r |c - c*| + log(n / m) + min(b, b^2 / 2),  b = (|a| + r) s

by Jensen's inequality, and by Hoeffding's lemma (1963) for deviations of mean 0 between -b and b. The factor that all
parts of a row share, the lower bound of *, cancels in the share that is dropped. The cost is that of a few rows in each
block of queries, where bounds of every row cost as many as it has.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .certificate import cut_blocks

#: Parts of a block.
PARTS = 2


class Parts(NamedTuple):
    """centre: [..., blocks, parts, d]. radius, tokens: [..., blocks, parts]; a part may hold no token."""

    centre: Tensor
    radius: Tensor
    tokens: Tensor


def split(x: Tensor, block: int, parts: int = PARTS) -> Parts:
    """Each block of tokens [B, H, L, d] around centres chosen greedily, each the farthest from those before (Gonzalez
    1985), then each part around its mean.
    """
    cut, present = cut_blocks(x, block)
    squares = torch.linalg.vector_norm(cut, dim=-1).square_()
    nearest = _from(cut, squares, cut[..., :1, :]).masked_fill_(~present, 0.0)
    part = torch.zeros(nearest.shape, dtype=torch.long, device=x.device)
    for number in range(1, parts):
        farthest = nearest.argmax(-1)[..., None, None].expand(*cut.shape[:-2], 1, cut.shape[-1])
        away = _from(cut, squares, cut.gather(-2, farthest)).masked_fill_(~present, torch.inf)
        part.masked_fill_(away < nearest, number)
        nearest = torch.minimum(nearest, away)
    member = (part.unsqueeze(-2) == torch.arange(parts, device=x.device).unsqueeze(-1)) & present.unsqueeze(-2)
    weight = member.to(cut.dtype)
    tokens = weight.sum(-1)
    centre = (weight @ cut) / tokens.clamp_min(1).unsqueeze(-1)
    away = squares.unsqueeze(-2) - 2 * (centre @ cut.mT) + centre.square().sum(-1, keepdim=True)
    rounding = (
        cut.shape[-1] * torch.finfo(cut.dtype).eps * squares.amax(-1)[..., None, None]
    )  # of the squares' difference
    radius = (away.clamp_min_(0) + rounding).mul_(weight).amax(-1).sqrt_()
    return Parts(centre, radius, tokens)


def _from(x: Tensor, squares: Tensor, centre: Tensor) -> Tensor:
    """About the squared distances of tokens [..., n, d], whose squares are given, from one centre [..., 1, d]."""
    return (squares - 2 * (centre @ x.mT).squeeze(-2)).add_(centre.square().sum(-1))


def bounds(query: Parts, key: Parts) -> tuple[Tensor, Tensor]:
    """(lower, upper): log of bounds of each block's mass, [B, H, query blocks * parts, key blocks], each row up to a
    summand of its own.
    """
    centre, keys = key.centre.flatten(-3, -2), key.tokens.flatten(-2)
    none = query.tokens.unsqueeze(-1) == 0  # a part without rows repeats the first one, which adds no condition
    rows = torch.where(none, query.centre[..., :1, :], query.centre).flatten(-3, -2)
    reach = torch.where(none[..., 0], query.radius[..., :1], query.radius).flatten(-2).unsqueeze(-1)
    mean = rows @ centre.mT + keys.log().unsqueeze(-2)
    best, reference = mean.max(-1, keepdim=True)
    squares = centre.square().sum(-1)
    apart = (squares.unsqueeze(-1) + squares.unsqueeze(-2)).sub_(centre @ centre.mT, alpha=2).clamp_min_(0).sqrt_()
    slack = apart.gather(-2, reference.expand_as(mean)).mul_(reach)
    mean -= best
    most = (rows.square().sum(-1, keepdim=True).sqrt() + reach) * key.radius.flatten(-2).unsqueeze(-2)
    most = torch.minimum(most, most.square() / 2)
    parts = key.tokens.shape[-1]
    lower, upper = (t.unflatten(-1, (-1, parts)).logsumexp(-1) for t in (mean - slack, mean + slack + most))
    return lower, upper
