# ruff: noqa: N803
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
"""Pages of keys and values in Triton: new ones put into their slots, and whole sequences taken out.

A slot or a page that the pool does not have, and a position behind a sequence's pages, are masked: nothing outside the
tensors is read or written.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...runtime import binaries
from ...runtime.launch import launcher
from .checks import TYPES, aligned, chip_of
from .forms import check_append, check_read, programs_of

#: Bytes of keys that a program moves at a time, and as many of values.
BYTES = 8192


@triton.jit
def paged_append(
    pool,
    slots,
    keys,
    values,
    k_t,
    k_h,
    v_t,
    v_h,
    count,
    pages,
    heads,
    size,
    D: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Put token t into slot slots[t] = page * size + offset. Grid: blocks of ROWS rows (token, head). pool: [pages, 2,
    heads, size, D]; keys, values: [tokens, heads, D]; count: rows.
    """
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    token, head = row // heads, row % heads
    slot = tl.load(slots + token, mask=row < count, other=-1).to(tl.int64)
    there = (slot >= 0) & (slot < pages * size)
    element = tl.arange(0, COLUMNS)
    inside = there[:, None] & (element < D)[None, :]
    target = ((slot // size * 2 * heads + head) * size + slot % size)[:, None] * D + element[None, :]
    key = tl.load(keys + (token * k_t + head * k_h)[:, None] + element[None, :], mask=inside)
    value = tl.load(values + (token * v_t + head * v_h)[:, None] + element[None, :], mask=inside)
    tl.store(pool + target, key, mask=inside)
    tl.store(pool + heads * size * D + target, value, mask=inside)


@triton.jit
def paged_read(
    pool,
    table,
    lengths,
    keys,
    values,
    t_b,
    t_n,
    pages,
    heads,
    size,
    listed,
    most,
    blocks,
    D: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Take positions of a sequence's head out of its pages. Grid: batch * heads * blocks of ROWS positions. table:
    [batch, listed], lengths: [batch], both int32; keys, values: [batch, heads, most, D].
    """
    program = tl.program_id(0).to(tl.int64)
    batch, head, block = program // (heads * blocks), program // blocks % heads, program % blocks
    position = block * ROWS + tl.arange(0, ROWS)
    place = position // size
    known = (position < tl.load(lengths + batch)) & (place < listed)
    page = tl.load(table + batch * t_b + place * t_n, mask=known, other=-1).to(tl.int64)
    there = known & (page >= 0) & (page < pages)
    element = tl.arange(0, COLUMNS)
    inside = there[:, None] & (element < D)[None, :]
    source = ((page * 2 * heads + head) * size + position % size)[:, None] * D + element[None, :]
    key = tl.load(pool + source, mask=inside, other=0.0)
    value = tl.load(pool + heads * size * D + source, mask=inside, other=0.0)
    written = (position < most)[:, None] & (element < D)[None, :]
    target = ((batch * heads + head) * most + position)[:, None] * D + element[None, :]
    tl.store(keys + target, key, mask=written)
    tl.store(values + target, value, mask=written)


def _block(dim: int, itemsize: int, length: int) -> tuple[int, int]:
    """(columns, rows) of a program, powers of two."""
    columns = triton.next_power_of_2(dim)
    return columns, max(min(BYTES // (columns * itemsize), triton.next_power_of_2(max(length, 1))), 1)


def triton_paged_kv_cache_append(pool: Tensor, slot_mapping: Tensor, new_keys: Tensor, new_values: Tensor) -> Tensor:
    """`hal_cuda.kernels.paged_kv_cache_append` in Triton."""
    slots, keys, values = check_append(
        "triton_paged_kv_cache_append", pool, slot_mapping, new_keys, new_values, binaries.INTERPRETED
    )
    pages, _, heads, size, dim = pool.shape
    if not (keys.numel() and pool.numel()):
        return pool
    count = len(slots) * heads
    columns, rows = _block(dim, pool.itemsize, count)
    moved = [keys.stride(0), keys.stride(1), values.stride(0), values.stride(1)]
    even = aligned(pool, keys, values) and not any(n * pool.itemsize % 16 for n in (dim, *moved))
    names = ("k_t", "k_h", "v_t", "v_h")
    types = dict.fromkeys(("pool", "keys", "values"), f"*{TYPES[pool.dtype]}") | {"slots": "*i32"}
    types |= dict.fromkeys((*names, "count", "pages", "heads", "size"), "i64")
    steps = [*((n, 8) for n in names), *((n, 16) for n in ("pool", "keys", "values"))]
    constants = {"D": dim, "COLUMNS": columns, "ROWS": rows}
    chip = chip_of(pool.device)
    divisible = dict(steps) if even else {}
    with torch.cuda.device_of(pool):
        launch = launcher(chip, paged_append, types, constants, num_warps=4, divisible=divisible)
        launch((-(-count // rows), 1, 1), (pool, slots, keys, values), [*moved, count, pages, heads, size])
    return pool


def triton_paged_kv_cache_read(
    pool: Tensor, block_table: Tensor, seq_lens: Tensor, max_seq_len: int
) -> tuple[Tensor, Tensor]:
    """`hal_cuda.kernels.paged_kv_cache_read` in Triton."""
    keys, values = check_read(
        "triton_paged_kv_cache_read", pool, block_table, seq_lens, max_seq_len, binaries.INTERPRETED
    )
    if not keys.numel():
        return keys, values
    pages, _, heads, size, dim = pool.shape
    if not size:
        return keys.zero_(), values.zero_()
    columns, rows = _block(dim, pool.itemsize, max_seq_len)
    blocks = -(-max_seq_len // rows)
    even = aligned(pool) and dim * pool.itemsize % 16 == 0
    types = dict.fromkeys(("pool", "keys", "values"), f"*{TYPES[pool.dtype]}")
    types |= dict.fromkeys(("table", "lengths"), "*i32")
    types |= dict.fromkeys(("t_b", "t_n", "pages", "heads", "size", "listed", "most", "blocks"), "i64")
    steps = dict.fromkeys(("pool", "keys", "values"), 16) if even else {}
    constants = {"D": dim, "COLUMNS": columns, "ROWS": rows}
    arguments = [*block_table.stride(), pages, heads, size, block_table.shape[1], max_seq_len, blocks]
    given = (pool, block_table, seq_lens.contiguous(), keys, values)
    programs, chip = programs_of(block_table.shape[0], heads, blocks), chip_of(pool.device)
    with torch.cuda.device_of(pool):
        launch = launcher(chip, paged_read, types, constants, num_warps=4, divisible=steps)
        launch((programs, 1, 1), given, arguments)
    return keys, values
