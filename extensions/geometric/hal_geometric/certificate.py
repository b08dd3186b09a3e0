"""Bounds of what each block of keys holds of a row's attention, at a fraction of the cost of the scores.

With scores s_j = scale q . k_j over the n keys of a block, centroid c and deviations x_j = scale q . (k_j - c):

    n exp(scale q . c) <= sum_j exp(s_j) <= n exp(scale q . c) (b^2 exp(-v / b) + v exp(b)) / (b^2 + v)

below by Jensen's inequality, above by Bennett's (1962) for x of mean 0, at most b, and variance v. b and v are bounded
from the block's radius, box, standard deviations and covariance.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class BlockStatistics(NamedTuple):
    """What is known of each block of keys; [..., blocks, d] where nothing else is said, float32 or float64.

    Attributes:
        keys: how many a block has, [blocks]. centre: their mean. high, low: largest and smallest deviation from it.
        deviation: standard deviation of each coordinate. radius: largest distance from the centre, [..., blocks].
        spread: a bound of the largest eigenvalue of the covariance, [..., blocks].
        covariance: [..., blocks, d, d].
    """

    keys: Tensor
    centre: Tensor
    high: Tensor
    low: Tensor
    deviation: Tensor
    radius: Tensor
    spread: Tensor
    covariance: Tensor

    def repeated(self, group: int) -> BlockStatistics:
        """For grouped heads: each key head's statistics for `group` query heads."""
        if group == 1:
            return self
        return BlockStatistics(self.keys, *(t.repeat_interleave(group, 1) for t in self[1:]))


def cut_blocks(x: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """(tokens [..., L, d] as [..., blocks, block, d], zeros after the last; which are tokens, [blocks, block])."""
    length = x.shape[-2]
    blocks = -(-length // block)
    wide = x if x.dtype == torch.float64 else x.float()
    if length % block:
        wide = torch.nn.functional.pad(wide, (0, 0, 0, blocks * block - length))
    present = torch.arange(blocks * block, device=x.device).view(blocks, block) < length
    return wide.unflatten(-2, (blocks, block)), present


def block_statistics(key: Tensor, block: int) -> BlockStatistics:
    """The statistics of blocks of `block` keys [B, H, len_k, d], the last one shorter."""
    length = key.shape[-2]
    blocks = -(-length // block)
    wide = key if key.dtype == torch.float64 else key.float()
    count = torch.full((blocks,), float(block), dtype=wide.dtype, device=key.device)
    count[-1] = length - (blocks - 1) * block
    padded = torch.nn.functional.pad(wide, (0, 0, 0, blocks * block - length))
    cut = padded.unflatten(-2, (blocks, block))
    centre = cut.sum(-2) / count.unsqueeze(-1)
    away = cut - centre.unsqueeze(-2)
    if length % block:
        away[..., -1, length - (blocks - 1) * block :, :] = 0  # at the centre: they change no bound
    covariance = away.mT @ away / count.view(-1, 1, 1)
    spread = covariance.square().sum((-2, -1)).sqrt()  # the root of the sum of the eigenvalues' squares
    deviation = covariance.diagonal(dim1=-2, dim2=-1).clamp_min(0).sqrt()
    radius = away.square().sum(-1).amax(-1).sqrt()
    return BlockStatistics(count, centre, away.amax(-2), away.amin(-2), deviation, radius, spread, covariance)


def jensen(query: Tensor, blocks: BlockStatistics) -> Tensor:
    """log of the lower bound, [..., len_q, blocks], for queries that hold the scale."""
    return (query @ blocks.centre.mT).add_(blocks.keys.log())


def bennett(query: Tensor, blocks: BlockStatistics) -> Tensor:
    """log of the factor between the bounds, [..., len_q, blocks], 0 or more."""
    length = query.square().sum(-1, keepdim=True)
    most = query.clamp_min(0) @ blocks.high.mT + query.clamp_max(0) @ blocks.low.mT
    most = torch.minimum(most, length.sqrt() * blocks.radius.unsqueeze(-2))
    most = most.clamp_min_(torch.finfo(most.dtype).tiny ** 0.25)
    variance = (query.abs() @ blocks.deviation.mT).square_()
    variance = torch.minimum(variance, length * blocks.spread.unsqueeze(-2))
    # (b^2 exp(-v / b) + v exp(b)) / (b^2 + v) = exp(b) (1 + r exp(-v / b - b)) / (1 + r), with r = b^2 / v.
    ratio = most.square() / variance.clamp_min(torch.finfo(most.dtype).tiny ** 0.5)
    factor = torch.log1p(ratio * torch.exp(-variance / most - most)) - torch.log1p(ratio)
    return factor.add_(most).clamp_min_(0)


def second_cumulant(query: Tensor, blocks: BlockStatistics) -> Tensor:
    """log of n exp(scale q . c + scale^2 q^T S q / 2), [..., len_q, blocks]: an estimate, with no bound."""
    spread = torch.einsum("bhqd,bhnde,bhqe->bhqn", query, blocks.covariance, query)
    return jensen(query, blocks).add_(spread, alpha=0.5)


def block_masses(query: Tensor, key: Tensor, block: int, hidden: Tensor | None = None) -> Tensor:
    """log of each block's sum of exp(s_j), from the scores themselves, [..., len_q, blocks].

    Args:
        hidden: bool [len_q, len_k], pairs that do not count.
    """
    scores = (query @ key.mT).to(torch.promote_types(query.dtype, torch.float32))
    if hidden is not None:
        scores = scores.masked_fill_(hidden, -torch.inf)
    length = scores.shape[-1]
    scores = torch.nn.functional.pad(scores, (0, -length % block), value=-torch.inf)
    cut: Tensor = scores.unflatten(-1, (-1, block))
    return cut.logsumexp(-1)
