"""Dropout as the kernels draw it: its random words, and its pattern as a tensor."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .chip import Chip
from .kernels.attend import keep_mask


def dropout_pattern(
    chip: Chip,
    shape: tuple[int, int, int, int],
    probability: float,
    rng: tuple[int, int],
    device: Any,
    first_batch: int = 0,
) -> Tensor:
    """bool [batch, heads, len_q, len_k]: the pairs that the kernels keep under (seed, offset), from `first_batch`
    on.
    """
    batch, heads, rows, columns = shape
    keep = torch.empty(shape, dtype=torch.bool, device=device)
    signature = {"out": "*u8", "seed": "i64", "offset": "i32", "rows": "i32", "columns": "i32", "probability": "fp32"}
    signature |= {"first_head": "i32"}
    run = chip.launcher(keep_mask, signature, {"BLOCK": 1024}, num_warps=4)
    if keep.numel():
        arguments = [*random_words(rng), rows, columns, first_batch * heads, probability]
        run((batch * heads * rows, -(-columns // 1024), 1), (keep.view(torch.uint8),), arguments)
    return keep


def random_words(rng: tuple[int, int]) -> tuple[int, int]:
    """(seed, offset) as the kernels take them: 63 and 32 bits, the offset's upper half mixed into the seed."""
    seed = (rng[0] ^ rng[0] >> 63 ^ (rng[1] >> 32) * 0x9E3779B97F4A7C15) & ((1 << 63) - 1)
    low = rng[1] & 0xFFFFFFFF
    return seed, low - (1 << 32) if low >> 31 else low
