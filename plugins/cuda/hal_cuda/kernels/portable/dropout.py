# ruff: noqa: N803
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
"""Dropout as the kernels draw it: which pairs are kept, the random words, and the pattern as a tensor."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...discovery import Chip
from ...runtime.launch import launcher


@triton.jit
def kept(seed, offset, head, row, column, probability):
    """Whether dropout keeps a pair: a function of (seed, offset) and of the pair's place alone.

    seed: int64. offset: int32. head: batch entry * heads + query head. row, column: places in the sequence. int32
    blocks of one shape.
    """
    last = (row * 0 + offset).to(tl.uint32)
    word, _, _, _ = tl.philox(seed, column.to(tl.uint32), row.to(tl.uint32), head.to(tl.uint32), last)
    return tl.uint_to_uniform_float(word) >= probability


@triton.jit
def keep_mask(out, seed, offset, rows, columns, first_head, probability, BLOCK: tl.constexpr):
    """out[head, row, column] = kept: the pattern as a tensor, for gradients by torch.

    Grid: (heads * rows, blocks of columns). Heads are numbered from first_head: batch entry * heads + query head.
    """
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    row = tl.program_id(0) % rows
    head = tl.program_id(0) // rows
    keep = kept(seed, offset, column * 0 + head + first_head, column * 0 + row, column, probability)
    place = (head.to(tl.int64) * rows + row) * columns + column
    tl.store(out + place, keep.to(tl.uint8), mask=column < columns)


def dropout_pattern(
    chip: Chip,
    shape: tuple[int, int, int, int],
    probability: float,
    rng: tuple[int, int],
    device: Any,
    first_batch: int = 0,
    *,
    out: Tensor | None = None,
) -> Tensor:
    """bool [batch, heads, len_q, len_k]: the pairs that the kernels keep under (seed, offset).

    first_batch: number of the first batch entry. out: where the pattern is written; None: in a new tensor.
    """
    batch, heads, rows, columns = shape
    keep = torch.empty(shape, dtype=torch.bool, device=device) if out is None else out
    signature = {"out": "*u8", "seed": "i64", "offset": "i32", "rows": "i32", "columns": "i32", "probability": "fp32"}
    signature |= {"first_head": "i32"}
    run = launcher(chip, keep_mask, signature, {"BLOCK": 1024}, num_warps=4)
    if keep.numel():
        arguments = [*random_words(rng), rows, columns, first_batch * heads, probability]
        run((batch * heads * rows, -(-columns // 1024), 1), (keep.view(torch.uint8),), arguments)
    return keep


def random_words(rng: tuple[int, int]) -> tuple[int, int]:
    """(seed, offset) as the kernels take them: 63 and 32 bits, the offset's upper half mixed into the seed."""
    seed = (rng[0] ^ rng[0] >> 63 ^ (rng[1] >> 32) * 0x9E3779B97F4A7C15) & ((1 << 63) - 1)
    low = rng[1] & 0xFFFFFFFF
    return seed, low - (1 << 32) if low >> 31 else low
