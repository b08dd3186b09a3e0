# ruff: noqa: N803
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
"""A tile of a mask as the attention kernels read it: only along the dimensions over which the mask runs."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def mask_tile(
    at,
    rows,
    columns,
    mask_m,
    mask_n,
    end_q,
    end_k,
    MASK_ROWS: tl.constexpr,
    MASK_KEYS: tl.constexpr,
    EVEN_Q: tl.constexpr,
    EVEN_K: tl.constexpr,
):
    """The mask's elements of a tile, a block that broadcasts to it.

    at: address of the element of row 0 and key 0. rows, columns: int32 blocks that broadcast to the tile. MASK_ROWS,
    MASK_KEYS: whether the mask runs over rows, over keys. EVEN_Q, EVEN_K: every tile of rows, of keys is whole, so that
    no bound is asked for, which would keep loads from being wide.
    """
    if MASK_ROWS:
        at = at + rows.to(tl.int64) * mask_m
    if MASK_KEYS:
        at = at + columns.to(tl.int64) * mask_n
    if MASK_ROWS and not EVEN_Q:
        if MASK_KEYS and not EVEN_K:
            given = tl.load(at, mask=(rows < end_q) & (columns < end_k), other=0)
        else:
            given = tl.load(at, mask=rows < end_q, other=0)
    elif MASK_KEYS and not EVEN_K:
        given = tl.load(at, mask=columns < end_k, other=0)
    else:
        given = tl.load(at)
    return given


def mask_constants(mask: Tensor | None) -> dict[str, bool]:
    """What the kernels are compiled for: the dimensions that a mask of four runs over, and unit last stride."""
    if mask is None:
        return {"MASK_ROWS": False, "MASK_KEYS": False, "MASK_UNIT": False}
    rows, keys = mask.shape[2] > 1, mask.shape[3] > 1
    return {"MASK_ROWS": rows, "MASK_KEYS": keys, "MASK_UNIT": keys and mask.stride(3) == 1}


def mask_steps(mask: Tensor | None) -> dict[str, int]:
    """What the address and the strides of a mask are known to be multiples of, for loads of 16 bytes; else nothing.

    The same of every mask with its shape, its strides and the last four bits of its address.
    """
    if mask is None or mask.shape[3] <= 1 or mask.stride(3) != 1:
        return {}
    elements = 16 // mask.element_size()
    strides = (stride for size, stride in zip(mask.shape[:3], mask.stride()[:3], strict=True) if size > 1)
    if mask.data_ptr() % 16 or any(stride % elements for stride in strides):
        return {}
    return {"mask": 16} | dict.fromkeys(("mask_b", "mask_h", "mask_m"), elements)


def mask_form(mask: Tensor | None) -> Any:
    """What of a mask's address a launch depends on."""
    return None if mask is None else mask.data_ptr() % 16
