"""How much attention each block of keys gets from each block of queries, estimated without the product of all pairs.

Every function takes query [batch, heads_q, len_q, dim] and key [batch, heads_kv, len_k, dim] and gives float32
[batch, heads_q, query blocks, key blocks].
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from hal_core import AttentionRequest

from .accelerated import device_kernel

Kind = Literal["mean", "antidiagonal"]
#: What "triton_square_sums" takes: dtypes, and squares of a block even where its sides are rounded up to powers of two.
KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_KERNEL_SQUARES = 1 << 12


def estimated_share(
    query: Tensor, key: Tensor, request: AttentionRequest, block_q: int, block_k: int, kind: Kind, stride: int
) -> Tensor:
    """Share of each query block's attention that each key block gets, estimated from squares of stride x stride pairs.

    "mean": a square's score is that of the mean of its queries and the mean of its keys, which is the mean of all its
    scores: one product of [len_q / stride, dim] and [len_k / stride, dim]. With stride = block this is the pooling of
    MInference (Jiang et al. 2024); smaller squares tell more, and cost 1 / stride^2 of the scores of dense attention.

    "antidiagonal": the mean of the scores on its antidiagonal, query position i with key position stride - 1 - i: one
    product of [len_q / stride, stride * dim] and [len_k / stride, stride * dim], 1 / stride of the scores of dense
    attention. Every query and every key counts once, and vertical as well as diagonal lines of large scores are seen
    (Xu et al. 2025, XAttention, section 3.1).

    On an accelerator the squares of half precision inputs are scored in half precision, which moves a quarter of the
    bytes.

    Returns:
        Means over a block's rows of squares, and sums over its columns of squares, of the softmax over all visible
        squares: a query block's row sums to 1, or to 0 where it sees nothing.
    """
    scale, group = request.effective_scale, query.shape[1] // key.shape[1]
    coarse, pool = _in_half(query), device_kernel("triton_pool_rows", query)
    factor = 1.0  # of the scores
    if kind == "mean" and pool is not None and query.dtype in KERNEL_DTYPES:
        rows, columns = pool(query, stride, scale), pool(key, stride)
    elif kind == "mean":
        rows, columns = _pool(query, stride) * scale, _pool(key, stride)
        if coarse:
            rows, columns = rows.to(query.dtype), columns.to(query.dtype)
    else:
        parts = _squares(query, stride), _squares(key, stride).flip(3)
        rows, columns = (part.flatten(3) for part in parts)
        if query.dtype == torch.float16:  # whose sums could be too large
            rows = rows * (scale / stride)
        else:
            factor = scale / stride
    of_block = block_q // stride, block_k // stride
    squares = Squares(of_block, stride, request.band(query.shape[2], key.shape[2]), coarse, factor)
    room = 1 << 20 if query.is_cpu else 1 << 28
    step = max(room // max(columns.shape[2] * of_block[0] * query.shape[1], 1), 1) * of_block[0]
    if not rows.shape[2]:
        return query.new_zeros((*query.shape[:2], 0, -(-key.shape[2] // block_k)), dtype=torch.float32)
    shares = []
    for start in range(0, rows.shape[2], step):  # whole blocks of rows at once
        part = rows if step >= rows.shape[2] else rows[:, :, start : start + step]
        if group > 1:
            part = part.unflatten(1, (-1, group)).flatten(2, 3)
        scores = part @ columns.mT
        shares.append(squares.shares(scores if group == 1 else scores.unflatten(2, (group, -1)).flatten(1, 2), start))
    return shares[0] if len(shares) == 1 else torch.cat(shares, 2)


class Squares(NamedTuple):
    """How scores of squares become shares of blocks.

    Attributes:
        of_block: squares in a block, of rows and of columns. stride: side of a square.
        band: the visible key positions less the query position, (least, largest). coarse: weights in half precision.
        factor: of the scores.
    """

    of_block: tuple[int, int]
    stride: int
    band: tuple[int | None, int | None]
    coarse: bool
    factor: float

    def shares(self, scores: Tensor, first: int) -> Tensor:
        """Means over a block's rows, and sums over its columns, of the softmax of [batch, heads, rows, columns], which
        is written over; `first` is the number of the first row.
        """
        (per_row, per_column), (low, high), stride = self.of_block, self.band, self.stride
        summed = device_kernel("triton_square_sums", scores)
        if summed is not None and scores.dtype in KERNEL_DTYPES and per_row * per_column <= _KERNEL_SQUARES:
            found: Tensor = summed(scores, per_row, per_column, stride, low, high, first, self.factor)
            return found
        if self.factor != 1.0:
            scores *= self.factor
        position = torch.arange(scores.shape[3], device=scores.device) * stride
        place = torch.arange(first, first + scores.shape[2], device=scores.device).unsqueeze(1) * stride
        if high is not None:
            scores.masked_fill_(position > place + stride - 1 + high, -math.inf)
        if low is not None:
            scores.masked_fill_(position + stride - 1 < place + low, -math.inf)
        scores = scores.softmax(-1, dtype=None if self.coarse else torch.float32)
        if (low, high) != (None, None):
            scores.nan_to_num_(0.0)  # rows that see nothing
        short = -scores.shape[2] % per_row, -scores.shape[3] % per_column
        if any(short):
            scores = torch.nn.functional.pad(scores, (0, short[1], 0, short[0]))
        found = scores.unflatten(3, (-1, per_column)).sum(-1, dtype=torch.float32).unflatten(2, (-1, per_row)).mean(3)
        if short[0]:  # of the squares that the last block has
            found[:, :, -1] *= per_row / (per_row - short[0])
        return found


def _in_half(tensor: Tensor) -> bool:
    """Whether squares are scored in half precision: processors are not always faster in it."""
    return tensor.device.type != "cpu" and tensor.dtype in (torch.bfloat16, torch.float16)


def box_bound(query: Tensor, key: Tensor, request: AttentionRequest, block_q: int, block_k: int) -> Tensor:
    """The most that a score of a block can be, by the least and the largest value of its keys in each dimension.

    The maximum over the rows of a query block: meant for decoding, where a block has one row.

    Source: Tang et al. 2024 (Quest), section 3.3.
    """
    bounds = row_bounds(query, key, request, block_k)
    short = -bounds.shape[2] % block_q
    bounds = torch.nn.functional.pad(bounds, (0, 0, 0, short), value=-math.inf)
    largest: Tensor = bounds.unflatten(2, (-1, block_q)).amax(3)
    return largest


def row_bounds(query: Tensor, key: Tensor, request: AttentionRequest, block_k: int) -> Tensor:
    """`box_bound` of every row, [batch, heads_q, len_q, key blocks], float32 or float64."""
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    key = key.to(dtype)
    short = -key.shape[2] % block_k
    least = torch.nn.functional.pad(key, (0, 0, 0, short), value=math.inf).unflatten(2, (-1, block_k)).amin(3)
    largest = torch.nn.functional.pad(key, (0, 0, 0, short), value=-math.inf).unflatten(2, (-1, block_k)).amax(3)
    rows = query.to(dtype) * request.effective_scale
    least, largest = (_repeat(each, query.shape[1]).mT for each in (least, largest))
    bound: Tensor = rows.clamp(min=0) @ largest + rows.clamp(max=0) @ least
    return bound


def _pool(tensor: Tensor, size: int) -> Tensor:
    """Means of blocks along the length, [batch, heads, blocks, dim], float32; of the last block's own rows."""
    length = tensor.shape[2]
    full = length // size
    means: Tensor = tensor[:, :, : full * size].unflatten(2, (full, size)).mean(3, dtype=torch.float32)
    if full * size == length:
        return means
    return torch.cat([means, tensor[:, :, full * size :].mean(2, keepdim=True, dtype=torch.float32)], 2)


def _squares(tensor: Tensor, stride: int) -> Tensor:
    """[batch, heads, length / stride, stride, dim], the last one filled up with zeros."""
    short = -tensor.shape[2] % stride
    if short:
        tensor = torch.nn.functional.pad(tensor, (0, 0, 0, short))
    squares: Tensor = tensor.unflatten(2, (-1, stride))
    return squares


def _repeat(tensor: Tensor, heads: int) -> Tensor:
    return tensor if tensor.shape[1] == heads else tensor.repeat_interleave(heads // tensor.shape[1], 1)
