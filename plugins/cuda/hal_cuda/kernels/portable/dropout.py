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
def row_words(seed, offset, head, row):
    """Two random words of each row, int32, the first odd: Philox of (seed, offset) and the row's place.

    seed: int64. offset: int32. head: batch entry * heads + query head. row: place in the sequence. int32 blocks of one
    shape.
    """
    last = (row * 0 + offset).to(tl.uint32)
    zero = (row * 0).to(tl.uint32)
    step, base, _, _ = tl.philox(seed, row.to(tl.uint32), head.to(tl.uint32), last, zero)
    return (step | 1).to(tl.int32, bitcast=True), base.to(tl.int32, bitcast=True)


@triton.jit
def kept_pairs(step, base, start, probability, BN: tl.constexpr, TURNED: tl.constexpr):
    """Whether dropout keeps the pairs of a tile of rows and of the BN keys from `start`, an even number, on.

    step, base: `row_words`, [BM, 1], or [1, BM] where TURNED: the result is then [BN, BM].

    A key's word is the row's step times half its number, plus the row's base, mixed; two neighbours share a word and
    have 16 bits each, so the probability is rounded to a multiple of 2^-16. A thread that holds both mixes once. Philox
    for each pair would take longer than attention.

    Source: Wellons 2018, "Prospecting for hash functions" (lowbias32).
    """
    lane = tl.arange(0, BN)
    half, odd = (start // 2 + lane // 2).to(tl.uint32), lane % 2
    if TURNED:
        half, odd = half[:, None], odd[:, None]
    else:
        half, odd = half[None, :], odd[None, :]
    word = half * step.to(tl.uint32, bitcast=True) + base.to(tl.uint32, bitcast=True)
    word = (word ^ (word >> 16)) * 0x7FEB352D
    word = (word ^ (word >> 15)) * 0x846CA68B
    word = word ^ (word >> 16)
    part = tl.where(odd != 0, word >> 16, word & 0xFFFF).to(tl.int32)
    least = (tl.zeros([], tl.float32) + probability * 65536.0 + 0.5).to(tl.int32)
    return part >= least


@triton.jit
def keep_mask(out, seed, offset, rows, columns, first_head, probability, BLOCK: tl.constexpr):
    """out[head, row, column] = kept: the pattern as a tensor, for gradients by torch.

    Grid: (heads * rows, blocks of columns). Heads are numbered from first_head: batch entry * heads + query head.
    """
    start = tl.program_id(1) * BLOCK
    column = tl.arange(0, BLOCK)
    number = tl.zeros([1, 1], tl.int32) + tl.program_id(0)
    row, head = number % rows, number // rows
    step, base = row_words(seed, offset, head + first_head, row)
    keep = kept_pairs(step, base, start, probability, BLOCK, False)
    place = number.to(tl.int64) * columns + (start + column)[None, :]
    tl.store(out + place, keep.to(tl.uint8), mask=(start + column < columns)[None, :])


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
