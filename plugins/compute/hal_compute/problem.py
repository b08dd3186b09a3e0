"""What a call means for the programs: the visible band, the mask as numbers, sparse plans as ranges of keys, the
geometry.

A unit is what one key head is read for at once: the rows of one query head, or, where there are few rows, those of all
query heads that share a key head. Work is cut into units, blocks of a unit's rows, and splits of the keys.
"""

from __future__ import annotations

import math
import struct
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hal_core.plugin_api import AttentionRequest, BlockPlan, Causal

OPEN = 1 << 30  # stands for no bound
LOG2E = 1.4426950408889634
#: Head sizes that programs are made for; others are padded with zeros, which change no score.
HEAD_DIMS = (32, 64, 96, 128, 192, 256)
#: The numbers that programs are told, 18 of int32 and 2 of float32, in this order; strides are in elements.
FIELDS = (
    "len_q",
    "len_k",
    "unit_rows",
    "heads_per_unit",
    "units_per_batch",
    "group",
    "lower",
    "upper",
    "mask_batch",
    "mask_head",
    "mask_row",
    "plan_batch",
    "plan_head",
    "block_q",
    "chunk",
    "has_mask",
    "has_plan",
    "splits",
    "scale",
    "softcap",
)
LAYOUT = "18i2f"
PACK_BELOW = 32  # query rows below which the heads of a key head go into one unit
_SKIP_BLOCK = 64  # tokens of a tile of a mask that may be skipped
_SKIP_FROM = 1 << 14  # elements from which looking for hidden tiles pays


class Call(NamedTuple):
    """The tensors of one call and what they mean."""

    query: Tensor
    key: Tensor
    value: Tensor
    request: AttentionRequest
    plan: BlockPlan | None
    mask: Tensor | None


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
    values = (
        torch.zeros(mask.shape).masked_fill_(~mask, -math.inf)
        if mask.dtype == torch.bool
        else mask.float().contiguous()
    )
    batch, head, row = (
        stride if size > 1 else 0 for size, stride in zip(values.shape[:3], values.stride()[:3], strict=True)
    )
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
    padded = torch.zeros(
        batch, heads, blocks_q * (_SKIP_BLOCK if rows > 1 else 1), blocks_k * _SKIP_BLOCK, dtype=torch.bool
    )
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


def padded_dim(request: AttentionRequest) -> int:
    """The head size of the program, at least both sizes."""
    return next(dim for dim in HEAD_DIMS if dim >= max(request.dim_qk, request.dim_v))


class Problem:
    """A call's geometry, and its mask and plan in the form that programs read.

    Attributes:
        dim: padded head size. dtype: the query's, by name. mask, ranges: None where there is nothing to read.
        heads_per_unit, unit_rows, units: see the module. numbers: by the names of FIELDS.
    """

    def __init__(self, call: Call, *, pack: bool) -> None:
        """`pack`: whether a unit may hold several heads."""
        request, query, key = call.request, call.query, call.key
        self.batch, self.heads_q, self.len_q = query.shape[:3]
        self.heads_kv, self.len_k = key.shape[1:3]
        self.dim, self.dtype = padded_dim(request), str(query.dtype).removeprefix("torch.")
        self.mask = None if call.mask is None else mask_of(call.mask, self.len_k)
        self.ranges: Ranges | None = None
        if call.plan is not None:
            self.ranges = ranges_of(call.plan, self.len_k)
        elif self.mask is not None:
            self.ranges = hidden_tiles(self.mask, self.len_q)
        group = self.heads_q // self.heads_kv
        together = self.ranges is None or (self.ranges.head_stride == 0 and self.ranges.block_q >= self.len_q)
        self.heads_per_unit = group if pack and group > 1 and self.len_q < PACK_BELOW and together else 1
        self.unit_rows = self.heads_per_unit * self.len_q
        self.units = self.batch * self.heads_q // self.heads_per_unit
        lower, upper = band(request, self.len_q, self.len_k)
        strides = (0, 0, 0) if self.mask is None else self.mask.strides
        self.numbers: dict[str, Any] = dict.fromkeys(FIELDS, 0) | {
            "len_q": self.len_q,
            "len_k": self.len_k,
            "unit_rows": self.unit_rows,
            "heads_per_unit": self.heads_per_unit,
            "units_per_batch": self.heads_q // self.heads_per_unit,
            "group": group,
            "lower": lower,
            "upper": upper,
            "mask_batch": strides[0],
            "mask_head": strides[1],
            "mask_row": strides[2],
            "has_mask": int(self.mask is not None),
            "chunk": OPEN,
            "splits": 1,
            "scale": request.effective_scale,
            "softcap": request.softcap or 0.0,
        }
        if self.ranges is not None:
            self.numbers |= {"has_plan": 1, "block_q": self.ranges.block_q}
            self.numbers |= {"plan_batch": self.ranges.batch_stride, "plan_head": self.ranges.head_stride}

    def score_in_bits(self) -> None:
        """Let the scale hold the factor log2(e), for programs whose softmax runs on powers of 2; a softcap comes before
        it.
        """
        self.numbers["scale"] *= 1.0 if self.numbers["softcap"] else LOG2E

    def split(self, rows: int, tile: int, *, wanted: int, least: int) -> int:
        """Cut the keys where blocks of `rows` query rows alone are fewer than `wanted`; returns the number of splits.

        Args:
            tile: keys of a tile; a split has whole ones. least: keys that a split has at least.
        """
        blocks = -(-self.unit_rows // rows) * self.units
        if blocks < wanted and self.len_k > least:
            parts = min(-(-wanted // blocks), -(-self.len_k // least), 64)
            each = -(-self.len_k // parts)
            chunk = -(-each // tile) * tile
            self.numbers |= {"chunk": chunk, "splits": -(-self.len_k // chunk)}
        return int(self.numbers["splits"])

    def values(self, **changes: Any) -> list[Any]:
        """The numbers in the order of FIELDS, with changes."""
        numbers = self.numbers | changes
        return [numbers[name] for name in FIELDS]

    def packed(self) -> bytes:
        """The numbers as the programs' struct."""
        return struct.pack(LAYOUT, *self.values())
