"""Pages of keys and values in CUDA C++."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor

from ..extra.checks import aligned, chip_of
from ..extra.forms import check_append, check_read, programs_of
from . import module

_MOST_UNITS = (1 << 31) - 1  # that one launch counts
_POSITIONS = 2  # of a thread


def _kernel(entry: str, pool: Tensor, wide: bool) -> tuple[Any, int, int]:
    """(kernel, CUDA index, elements of a unit)."""
    index = chip_of(pool.device).index
    definitions = {"WIDE": "1"} if wide else {"UNIT": "u32" if pool.itemsize == 4 else "u16"}
    return module.function("paged", entry, definitions, index), index, 16 // pool.itemsize if wide else 1


def paged_kv_cache_append(pool: Tensor, slot_mapping: Tensor, new_keys: Tensor, new_values: Tensor) -> Tensor:
    """Put new keys and values into their slots of the pool, in place; returns the pool.

    Args:
        pool: [pages, 2, H, page size, D], contiguous, float32, float16 or bfloat16: keys, then values.
        slot_mapping: int32 [T]: page * page size + offset of each token. A token whose slot the pool does not have, -1
            for example, is left out. Of two tokens in one slot either may be there afterwards.
        new_keys, new_values: [T, H, D] of the pool's dtype, any strides.

    Raises:
        ContractError: other shapes, dtypes or devices. DeviceUnavailableError: CuPy or NVRTC is missing.
    """
    slots, keys, values = check_append("paged_kv_cache_append", pool, slot_mapping, new_keys, new_values, False)
    pages, _, heads, size, dim = pool.shape
    if not (keys.numel() and pool.numel()):
        return pool
    strides = [keys.stride(0), keys.stride(1), values.stride(0), values.stride(1)]
    wide = aligned(pool, keys, values) and not any(n * pool.itemsize % 16 for n in (dim, *strides))
    made, index, unit = _kernel("append_units", pool, wide)
    units = dim // unit
    steps = [np.int64(step // unit) for step in strides]
    most = max(_MOST_UNITS // (heads * units), 1)
    for first in range(0, len(slots), most):
        some = (slots[first : first + most], keys[first : first + most], values[first : first + most])
        count = len(some[0])
        sizes = (np.uint32(count), np.int64(pages), np.uint32(heads), np.uint32(size), np.uint32(units))
        module.launch(made, index, -(-count * heads * units // 256), 256, (pool, *some, *steps, *sizes))
    return pool


def paged_kv_cache_read(pool: Tensor, block_table: Tensor, seq_lens: Tensor, max_seq_len: int) -> tuple[Tensor, Tensor]:
    """The keys and values of sequences, out of their pages.

    Args:
        pool: [pages, 2, H, page size, D], as `paged_kv_cache_append` fills it.
        block_table: int32 [B, n]: the pages of each sequence, in order. seq_lens: int32 [B]: lengths.

    Returns:
        (keys, values), each [B, H, max_seq_len, D]. Positions behind a sequence's length, and those whose page is not
        listed or not in the pool, are 0: nothing outside the tensors is read.

    Raises:
        ContractError: other shapes, dtypes or devices. DeviceUnavailableError: CuPy or NVRTC is missing.
    """
    keys, values = check_read("paged_kv_cache_read", pool, block_table, seq_lens, max_seq_len, False)
    pages, _, heads, size, dim = pool.shape
    if not keys.numel():
        return keys, values
    if not size:
        return keys.zero_(), values.zero_()
    made, index, unit = _kernel("read_units", pool, aligned(pool) and dim * pool.itemsize % 16 == 0)
    blocks = -(-max_seq_len * dim // (unit * 256 * _POSITIONS))
    programs = programs_of(block_table.shape[0], heads, blocks)
    sizes = [np.uint32(n) for n in (pages, heads, size, block_table.shape[1], max_seq_len, dim // unit)]
    steps = [np.int64(step) for step in block_table.stride()]
    given = (pool, block_table, seq_lens.contiguous(), keys, values)
    module.launch(made, index, programs, 256, (*given, *steps, *sizes))
    return keys, values
