"""What a request means for the programs: the visible band, the mask as numbers, sparse plans as ranges of keys."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from hal_core import AttentionRequest, BlockPlan, Causal

OPEN = 1 << 30  # stands for no bound
_SKIP_BLOCK = 64  # tokens of a tile of a mask that may be skipped
_SKIP_FROM = 1 << 14  # elements from which looking for hidden tiles pays


class Mask(NamedTuple):
    """Numbers added to the scores: float32, contiguous, and strides over batch, head and row (0 broadcasts)."""

    values: Tensor
    strides: tuple[int, int, int]


class Ranges(NamedTuple):
    """Key ranges that query blocks read.

    Attributes:
        index: int32 [blocks + 1], where each query block's ranges begin. bounds: int32 [ranges, 2], (start, stop).
        batch_stride, head_stride: in query blocks; 0 broadcasts. block_q: query rows in a block.
    """

    index: Tensor
    bounds: Tensor
    batch_stride: int
    head_stride: int
    block_q: int


def band(request: AttentionRequest, len_q: int, len_k: int) -> tuple[int, int]:
    """(lower, upper): row i reads keys i + lower to i + upper, by causal and window."""
    offset = request.diagonal + (len_k - len_q if request.causal is Causal.BOTTOM_RIGHT else 0)
    left, right = request.window or (None, None)
    if request.causal is not Causal.NONE:
        right = 0 if right is None else min(right, 0)
    lower = -OPEN if left is None else max(min(offset - left, OPEN), -OPEN)
    upper = OPEN if right is None else max(min(offset + right, OPEN), -OPEN)
    return lower, upper


def mask_of(mask: Tensor, len_k: int) -> Mask:
    """A boolean or additive mask as float32 numbers, without repeating what broadcasts over batch, heads and rows."""
    mask = mask.detach()
    mask = mask[(None,) * (4 - mask.dim())]
    for dim in range(3):
        if mask.shape[dim] > 1 and mask.stride(dim) == 0:
            mask = mask.narrow(dim, 0, 1)
    if mask.shape[3] != len_k:
        mask = mask.expand(*mask.shape[:3], len_k)
    values = torch.zeros(mask.shape).masked_fill_(~mask, -math.inf) if mask.dtype == torch.bool else mask.float().contiguous()
    batch, head, row = (stride if size > 1 else 0 for size, stride in zip(values.shape[:3], values.stride()[:3], strict=True))
    return Mask(values, (batch, head, row))


def hidden_tiles(mask: Mask, len_q: int) -> Ranges | None:
    """The ranges that a mask leaves visible, in tiles; None where every tile is visible or looking would not pay."""
    values = mask.values
    if values.numel() < _SKIP_FROM and values.shape[3] < 4 * _SKIP_BLOCK:
        return None
    batch, heads, rows, keys = values.shape
    block_q = _SKIP_BLOCK if rows > 1 else max(len_q, 1)
    visible = values > -math.inf
    blocks_k, blocks_q = -(-keys // _SKIP_BLOCK), -(-rows // _SKIP_BLOCK) if rows > 1 else 1
    padded = torch.zeros(batch, heads, blocks_q * (_SKIP_BLOCK if rows > 1 else 1), blocks_k * _SKIP_BLOCK, dtype=torch.bool)
    padded[:, :, :rows, :keys] = visible
    tiles = padded.view(batch, heads, blocks_q, -1, blocks_k, _SKIP_BLOCK).any(5).any(3)
    return None if bool(tiles.all()) else _ranges(tiles, block_q, _SKIP_BLOCK, keys)


def ranges_of(plan: BlockPlan, len_k: int) -> Ranges:
    """A block plan's listed key blocks as ranges, neighbours joined, blocks listed twice read once."""
    blocks_k = -(-len_k // plan.block_k)
    listed = torch.arange(plan.indices.shape[-1]) < plan.counts.unsqueeze(-1)
    columns = torch.where(listed, plan.indices, blocks_k).long()  # what is not listed goes to a block of its own
    tiles = torch.zeros((*plan.indices.shape[:-1], blocks_k + 1), dtype=torch.bool)
    tiles.scatter_(-1, columns, True)
    return _ranges(tiles[..., :blocks_k], plan.block_q, plan.block_k, len_k)


def _ranges(tiles: Tensor, block_q: int, block_k: int, len_k: int) -> Ranges:
    """Runs of True in [batch or 1, heads or 1, query blocks, key blocks]."""
    batch, heads, blocks_q, _ = tiles.shape
    edges = torch.nn.functional.pad(tiles.to(torch.int8), (1, 1)).diff(dim=-1).flatten(0, 2)
    starts, stops = (edges == 1).nonzero(), (edges == -1).nonzero()
    index = torch.zeros(batch * heads * blocks_q + 1, dtype=torch.int32)
    index[1:] = (edges == 1).sum(-1).cumsum(0)
    bounds = torch.stack((starts[:, 1] * block_k, (stops[:, 1] * block_k).clamp(max=len_k)), 1).to(torch.int32)
    if not len(bounds):
        bounds = torch.zeros(1, 2, dtype=torch.int32)
    return Ranges(
        index, bounds.contiguous(), heads * blocks_q if batch > 1 else 0, blocks_q if heads > 1 else 0, block_q
    )
