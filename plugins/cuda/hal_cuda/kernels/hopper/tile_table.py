# ruff: noqa: N803
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
"""The tiles of packed sequences, found on the device: their lengths are never read on the host."""

import triton
import triton.language as tl


@triton.jit
def span(ends, i, there, total):
    """First token and length of sequences i of `ends`, int32 [sequences + 1], kept inside the `total` tokens that there
    are.
    """
    first = tl.minimum(tl.maximum(tl.load(ends + i, mask=there, other=0), 0), total)
    end = tl.minimum(tl.load(ends + i + 1, mask=there, other=0), total)
    return first, tl.maximum(end - first, 0)


@triton.jit
def tile_table(
    table, cu_q, cu_k, sequences, all_q, all_k, most, together, programs, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    """List every tile of ROWS query rows, those of the sequence with most keys first. Grid: (sequences,).

    Rows are listed from the last to the first, or, in every second sequence counted from the end, from the first to the
    last: below a diagonal the last rows read most keys, and programs that take every n-th tile, forwards and backwards
    in turn, get about as much each where the list rises and falls without a leap. Where a sequence is about one round
    of them, two follow each other in the same direction. A sequence that holds most of the tiles ends with its first
    rows, its shortest.

    table: int32 [8 + 8 * most]. The first number is how many tiles there are; from 8 on each has first row in its
    sequence, sequence's first query, first key, queries, keys. cu_q, cu_k: int32 [sequences + 1], never falling. all_q,
    all_k: tokens that there are. together: heads that take a tile one after the other; programs: that share the tiles
    out. Where cu_q or cu_k are wrong, so are results, but nothing outside the tensors is named.
    """
    s = tl.program_id(0)
    q_at, len_q = span(cu_q, s, True, all_q)
    k_at, len_k = span(cu_k, s, True, all_k)
    mine = (len_q + ROWS - 1) // ROWS
    before, tiles, behind = 0, 0, 0
    for start in range(0, sequences, BLOCK):
        i = start + tl.arange(0, BLOCK)
        _, rows = span(cu_q, i, i < sequences, all_q)
        _, keys = span(cu_k, i, i < sequences, all_k)
        count = (rows + ROWS - 1) // ROWS
        earlier = (keys > len_k) | ((keys == len_k) & (i < s))
        before += tl.sum(tl.where(earlier, count, 0), 0)
        tiles += tl.sum(count, 0)
        behind += tl.sum(((count > 0) & ~earlier & (i != s)).to(tl.int32), 0)
    if s == 0:
        tl.store(table, tl.minimum(tiles, most))
    one_round = (10 * mine * together > 8 * programs) & (10 * mine * together < 11 * programs)
    behind += tl.where(one_round, behind // 2, 0)  # numbers 0, 3, 4, 7, 8 ... are then even
    falling = (behind % 2 == 0) | (2 * mine > tiles)
    for start in range(0, mine, BLOCK):
        j = start + tl.arange(0, BLOCK)
        at = table + 8 + (before + j) * 8
        there = (j < mine) & (before + j >= 0) & (before + j < most)  # below 0: a sum of wrong lengths that ran over
        tl.store(at, tl.where(falling, mine - 1 - j, j) * ROWS, mask=there)
        tl.store(at + 1, q_at, mask=there)
        tl.store(at + 2, k_at, mask=there)
        tl.store(at + 3, len_q, mask=there)
        tl.store(at + 4, len_k, mask=there)
