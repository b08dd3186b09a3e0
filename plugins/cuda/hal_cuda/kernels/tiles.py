# ruff: noqa: N803
"""The tiles of packed sequences, found on the device: their lengths are never read on the host."""

import triton
import triton.language as tl


@triton.jit
def tile_table(table, cu_q, cu_k, sequences, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """List every tile of ROWS query rows, those of the sequence with most keys first, last rows first. Grid: (sequences,).

    table: int32 [8 + 8 * tiles]. The first number is how many tiles there are; from 8 on each has first row in its sequence,
    sequence's first query, first key, queries, keys. cu_q, cu_k: int32 [sequences + 1].
    """
    s = tl.program_id(0)
    q_at, k_at = tl.load(cu_q + s), tl.load(cu_k + s)
    len_q, len_k = tl.load(cu_q + s + 1) - q_at, tl.load(cu_k + s + 1) - k_at
    before, tiles = 0, 0
    for start in range(0, sequences, BLOCK):
        i = start + tl.arange(0, BLOCK)
        there = i < sequences
        rows = tl.load(cu_q + i + 1, mask=there, other=0) - tl.load(cu_q + i, mask=there, other=0)
        keys = tl.load(cu_k + i + 1, mask=there, other=0) - tl.load(cu_k + i, mask=there, other=0)
        count = (rows + ROWS - 1) // ROWS
        earlier = (keys > len_k) | ((keys == len_k) & (i < s))
        before += tl.sum(tl.where(earlier, count, 0), 0)
        tiles += tl.sum(count, 0)
    if s == 0:
        tl.store(table, tiles)
    mine = (len_q + ROWS - 1) // ROWS
    for start in range(0, mine, BLOCK):
        j = start + tl.arange(0, BLOCK)
        at = table + 8 + (before + j) * 8
        there = j < mine
        tl.store(at, (mine - 1 - j) * ROWS, mask=there)
        tl.store(at + 1, q_at, mask=there)
        tl.store(at + 2, k_at, mask=there)
        tl.store(at + 3, len_q, mask=there)
        tl.store(at + 4, len_k, mask=there)
