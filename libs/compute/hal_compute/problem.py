"""A call as the numbers and tables that attention programs read: visible band, mask, key ranges."""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hal_core.plugin_api import AttentionRequest, BlockPlan, Causal, TilePlan

from .sizes import OPEN, Sizes

#: Allocates an uninitialised host tensor of a shape and dtype from the session's memory, for the length of the call.
Scratch = Callable[[Sequence[int], str], Tensor]

#: The programs' parameters: 18 of int32, then 2 of float32. Strides are in elements.
PARAMETERS = (
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
_SKIP_BLOCK = 64  # tokens of a tile of a mask that is skipped where every element is -inf
_SKIP_FROM = 1 << 14  # elements of a mask below which hidden tiles are not looked for
_TILES_AT_ONCE = 1 << 12
_VISIBLE, _HIDDEN = (torch.tensor(value, dtype=torch.float32, device="cpu") for value in (0.0, -math.inf))


class Call(NamedTuple):
    """The tensors and the request of one call."""

    query: Tensor
    key: Tensor
    value: Tensor
    request: AttentionRequest
    plan: TilePlan | BlockPlan | None
    mask: Tensor | None


class Mask(NamedTuple):
    """Numbers added to the scores: float32, contiguous, with strides over batch, head and row (0: broadcast)."""

    values: Tensor
    strides: tuple[int, int, int]


class Ranges(NamedTuple):
    """Key ranges that query blocks read.

    Attributes:
        offsets: int32 [blocks + 1], where each query block's ranges begin. bounds: int32 [ranges, 2], (start, stop).
        batch_stride, head_stride: in query blocks; 0: broadcast. block_q: query rows in a block.
    """

    offsets: Tensor
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


def mask_of(mask: Tensor, len_k: int, scratch: Scratch) -> Mask:
    """A boolean or additive mask as float32 numbers; dimensions along which it broadcasts are not repeated."""
    mask = mask.detach()
    mask = mask[(None,) * (4 - mask.dim())]
    for dim in range(3):
        if mask.shape[dim] > 1 and mask.stride(dim) == 0:
            mask = mask.narrow(dim, 0, 1)
    if mask.shape[3] != len_k:
        mask = mask.expand(*mask.shape[:3], len_k)
    values = mask
    if mask.dtype != torch.float32 or not mask.is_contiguous():
        values = scratch(mask.shape, "float32")
        if mask.dtype == torch.bool:
            torch.where(mask, _VISIBLE, _HIDDEN, out=values)
        else:
            values.copy_(mask)
    batch, head, row = (
        stride if size > 1 else 0 for size, stride in zip(values.shape[:3], values.stride()[:3], strict=True)
    )
    return Mask(values, (batch, head, row))


def hidden_tiles(mask: Mask, len_q: int, scratch: Scratch) -> Ranges | None:
    """The key ranges that a mask leaves visible, in tiles; None where every tile is visible, or for a small mask."""
    values = mask.values
    if values.numel() < _SKIP_FROM and values.shape[3] < 4 * _SKIP_BLOCK:
        return None
    batch, heads, rows, keys = values.shape
    block_q = _SKIP_BLOCK if rows > 1 else 1
    blocks_q, blocks_k = -(-rows // block_q), -(-keys // _SKIP_BLOCK)
    highest = scratch((batch, heads, blocks_q, blocks_k), "float32")
    # The last blocks may be shorter, so the mask is read in up to four parts, each with blocks of one size.
    for rows_at, tall in _equal_blocks(rows, block_q):
        for keys_at, wide in _equal_blocks(keys, _SKIP_BLOCK):
            part = values[:, :, rows_at, keys_at].unflatten(3, (-1, wide)).unflatten(2, (-1, tall))
            to = highest[:, :, rows_at.start // block_q :, keys_at.start // _SKIP_BLOCK :]
            torch.amax(part, dim=(3, 5), out=to[:, :, : part.shape[2], : part.shape[4]])
    visible = highest.ne(-math.inf)
    if bool(visible.all()):
        return None
    chunks = visible.view(-1, blocks_k).split(_rows_at_once(blocks_k))
    found = _ranges(chunks, (batch, heads, blocks_q), (block_q, _SKIP_BLOCK), keys, scratch)
    return found if rows > 1 else found._replace(block_q=max(len_q, 1))


def _equal_blocks(length: int, block: int) -> list[tuple[slice, int]]:
    """(where, size) of the whole blocks of a length, and of the shorter one after them."""
    whole = length // block * block
    parts = [(slice(0, whole), block), (slice(whole, length), length - whole)]
    return [(where, size) for where, size in parts if where.stop > where.start]


def ranges_of(plan: BlockPlan, len_k: int, scratch: Scratch) -> Ranges:
    """A block plan's listed key blocks as ranges: neighbours are joined, a block listed twice is read once."""
    blocks_k = -(-len_k // plan.block_k)
    batch, heads, blocks_q, most = plan.indices.shape
    rows = _rows_at_once(max(blocks_k, most))

    def tiles() -> Iterator[Tensor]:
        for indices, counts in zip(
            plan.indices.reshape(-1, most).split(rows), plan.counts.reshape(-1).split(rows), strict=True
        ):
            listed = torch.arange(most, device=counts.device) < counts.unsqueeze(-1)
            columns = torch.where(
                listed, indices, blocks_k
            ).long()  # entries past the count go to a column of their own
            found = torch.zeros((len(columns), blocks_k + 1), dtype=torch.bool, device=columns.device)
            yield found.scatter_(1, columns, True)[:, :blocks_k]

    return _ranges(tiles(), (batch, heads, blocks_q), (plan.block_q, plan.block_k), len_k, scratch)


def _rows_at_once(columns: int) -> int:
    """Rows of tiles that are looked at together, so that what torch makes of them stays small."""
    return max(_TILES_AT_ONCE // max(columns, 1), 1)


def _ranges(
    tiles: Iterable[Tensor], shape: tuple[int, int, int], block: tuple[int, int], len_k: int, scratch: Scratch
) -> Ranges:
    """Runs of True in boolean tiles, given as chunks [rows, key blocks] of [batch or 1, heads or 1, query blocks]."""
    (batch, heads, blocks_q), (block_q, block_k) = shape, block
    counts, bounds = [], []
    for chunk in tiles:
        edges = torch.nn.functional.pad(chunk.to(torch.int8), (1, 1)).diff(dim=-1)
        starts, stops = (edges == 1).nonzero()[:, 1], (edges == -1).nonzero()[:, 1]
        counts.append((edges == 1).sum(-1))
        bounds.append(torch.stack((starts * block_k, (stops * block_k).clamp(max=len_k)), 1))
    offsets = scratch((batch * heads * blocks_q + 1,), "float32").view(torch.int32)
    offsets[0] = 0
    torch.cumsum(torch.cat(counts), 0, dtype=torch.int32, out=offsets[1:])
    total = sum(map(len, bounds))
    ranges = scratch((max(total, 1), 2), "float32").view(torch.int32)
    ranges[:1] = 0  # a range that is never read, where there is none
    at = 0
    for part in bounds:
        ranges[at : at + len(part)] = part
        at += len(part)
    return Ranges(offsets, ranges, heads * blocks_q if batch > 1 else 0, blocks_q if heads > 1 else 0, block_q)


class Problem:
    """A call's sizes, and its mask and block plan in the form that programs read.

    Attributes:
        sizes: see `Sizes`. mask, ranges: None where the call has none. parameters: values by the names of PARAMETERS.
    """

    def __init__(self, call: Call, *, pack: bool, scratch: Scratch) -> None:
        """`pack`: whether a unit may hold several heads. `scratch`: allocates what the mask and the plan become."""
        (batch, heads_q, len_q), (heads_kv, len_k) = call.query.shape[:3], call.key.shape[1:3]
        dtype = str(call.query.dtype).removeprefix("torch.")
        request = replace(
            call.request, batch=batch, heads_q=heads_q, heads_kv=heads_kv, len_q=len_q, len_k=len_k, dtype=dtype
        )
        self.mask = None if call.mask is None else mask_of(call.mask, len_k, scratch)
        self.ranges: Ranges | None = None
        if isinstance(call.plan, BlockPlan):
            self.ranges = ranges_of(call.plan, len_k, scratch)
        elif self.mask is not None:
            self.ranges = hidden_tiles(self.mask, len_q, scratch)
        rows, per_head = (0, False) if self.ranges is None else (self.ranges.block_q, self.ranges.head_stride > 0)
        self.sizes = sizes = Sizes.of(request, pack=pack, range_rows=rows, per_head=per_head)
        lower, upper = band(request, len_q, len_k)
        strides = (0, 0, 0) if self.mask is None else self.mask.strides
        self.parameters: dict[str, Any] = dict.fromkeys(PARAMETERS, 0) | {
            "len_q": len_q,
            "len_k": len_k,
            "unit_rows": sizes.unit_rows,
            "heads_per_unit": sizes.heads_per_unit,
            "units_per_batch": heads_q // sizes.heads_per_unit,
            "group": heads_q // heads_kv,
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
            self.parameters |= {"has_plan": 1, "block_q": self.ranges.block_q}
            self.parameters |= {"plan_batch": self.ranges.batch_stride, "plan_head": self.ranges.head_stride}

    @property
    def causal(self) -> bool:
        """Whether later rows read more keys."""
        return bool(self.parameters["upper"] < OPEN and self.parameters["lower"] == -OPEN)

    @property
    def changes_scores(self) -> bool:
        """Whether scores need more than a positive scale and the band."""
        values = self.parameters
        return bool(values["has_mask"] or values["softcap"] or values["scale"] <= 0)

    def split(self, chunk: int, splits: int) -> None:
        """Split the keys, see `splits_of`."""
        self.parameters |= {"chunk": chunk, "splits": splits}

    def values(self, **changes: Any) -> list[Any]:
        """The parameters in the order of PARAMETERS, some of them changed."""
        parameters = self.parameters | changes
        return [parameters[name] for name in PARAMETERS]

    def packed(self) -> bytes:
        """The parameters as the programs' struct."""
        return struct.pack(LAYOUT, *self.values())
