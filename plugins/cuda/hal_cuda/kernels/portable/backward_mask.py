# ruff: noqa: N803
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
"""The backward's kernels for additive masks: weights where a log-sum-exp is too large to hold them, and the mask's own
gradient.
"""

import triton
import triton.language as tl

from .backward_step import band, block_of_step, loaded, weights
from .dropout import kept_pairs, row_words

#: Size of a log-sum-exp from which on weights are divided by their sum: below it, its rounding in float32 changes a
#: weight by less than 4e-6.
LARGE_LSE = tl.constexpr(100.0)
#: Of `sum_parts`: numbers of a program, and parts that it adds at a time.
SUM_TILE = {"BLOCK": 64, "TOGETHER": 16}


@triton.jit
def normalise(
    q,
    k,
    numbers,
    mask,
    plan_index,
    plan_count,
    q_b,
    q_h,
    q_m,
    q_d,
    k_b,
    k_h,
    k_n,
    k_d,
    mask_b,
    mask_h,
    mask_m,
    mask_n,
    index_b,
    index_h,
    index_m,
    count_b,
    count_h,
    count,
    scale,
    softcap,
    len_q,
    len_k,
    diagonal,
    left,
    right,
    block_q,
    block_k,
    GROUP: tl.constexpr,
    DQ: tl.constexpr,
    BDQ: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    MASK_ROWS: tl.constexpr,
    MASK_KEYS: tl.constexpr,
    BOTTOM: tl.constexpr,
    LEFT: tl.constexpr,
    RIGHT: tl.constexpr,
    SOFTCAP: tl.constexpr,
    PLAN: tl.constexpr,
    ALIGNED: tl.constexpr,
    TILED: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Write -log2 of the sum over keys of exp(score - lse) of every row under an additive mask: the third of `numbers`.

    It is 0 but for rounding, except where the log-sum-exp is so large that float32 does not hold the logarithm of a
    count: a row wholly at a mask's lowest number has n keys of weight exp(0). Only tiles with such a row are computed.
    Grid and arguments: as for `grad_q`. TILED: rows of a tile where `numbers` are in the Hopper kernel's order, see its
    `Maps`; else 0.
    """
    if ALIGNED:
        q_d, k_d = 1, 1
    head, batch = tl.program_id(1), tl.program_id(2)
    head64, kv64, batch64 = head.to(tl.int64), (head // GROUP).to(tl.int64), batch.to(tl.int64)
    low, high = band(diagonal, len_q, len_k, left, right, BOTTOM)
    tile = tl.program_id(0)
    start, end_q, plan_row = tile * BM, len_q, 0
    if PLAN:
        tiles_in_block = (block_q + BM - 1) // BM
        plan_row = tile // tiles_in_block
        start = plan_row * block_q + (tile % tiles_in_block) * BM
        end_q = tl.minimum((plan_row + 1) * block_q, len_q)
    if start >= end_q:
        return
    rows = start + tl.arange(0, BM)
    row_ok, rows64 = rows < end_q, rows.to(tl.int64)
    place = batch64 * tl.num_programs(1) + head64
    if TILED > 0:
        row_at = numbers + (place * ((len_q + TILED - 1) // TILED) + rows // TILED) * (4 * TILED) + rows % TILED
        share_at = row_at + 2 * TILED
    else:
        row_at = numbers + count + place * len_q + rows
        share_at = row_at + count
    row_lse = tl.load(row_at, mask=row_ok, other=float("inf"))
    large = (tl.abs(row_lse) > LARGE_LSE) & (row_lse != float("inf"))
    total = tl.where(row_lse == float("inf"), 1.0, tl.zeros([BM], tl.float32))
    if tl.max(large.to(tl.int32), 0) > 0:
        d = tl.arange(0, BDQ)
        q_at = q + batch64 * q_b + head64 * q_h + rows64[:, None] * q_m + d[None, :] * q_d
        q_tile = loaded(q_at, row_ok[:, None], d[None, :] < DQ, True, DQ != BDQ)
        k_at = k + batch64 * k_b + kv64 * k_h + tl.arange(0, BN).to(tl.int64)[None, :] * k_n + d[:, None] * k_d
        mask_at = mask + batch64 * mask_b + head64 * mask_h
        first_key, end_key = 0, len_k
        if LEFT:
            first_key = tl.maximum(start + low, 0)
        if RIGHT:
            end_key = tl.minimum(tl.maximum(tl.minimum(start + BM, end_q) + high, 0), len_k)
        first_step, last_step = first_key // BN, (end_key + BN - 1) // BN
        lists, steps = plan_index, 1
        if PLAN:
            steps = (block_k + BN - 1) // BN
            lists = plan_index + batch64 * index_b + head64 * index_h + plan_row * index_m
            first_step = 0
            last_step = steps * tl.load(plan_count + batch64 * count_b + head64 * count_h + plan_row)
        for step in tl.range(first_step, last_step, num_stages=STAGES):
            column, end_k = block_of_step(lists, step, steps, block_k, len_k, BN, PLAN)
            columns = column + tl.arange(0, BN)
            k_tile = loaded(k_at + column * k_n, (columns < end_k)[None, :], d[:, None] < DQ, True, DQ != BDQ)
            found, _ = weights(
                tl.dot(q_tile, k_tile, input_precision="ieee"),
                rows[:, None],
                columns[None, :],
                end_q,
                end_k,
                row_lse[:, None],
                0.0,
                mask_at,
                mask_m,
                mask_n,
                scale,
                softcap,
                low,
                high,
                2,
                MASK_ROWS,
                MASK_KEYS,
                LEFT,
                RIGHT,
                SOFTCAP,
                False,
                False,
                True,
            )
            total += tl.sum(found, 1)
        total = tl.where(large, total, 1.0)
    else:
        total = tl.full([BM], 1.0, tl.float32)
    tl.store(share_at, -tl.log2(total), mask=row_ok)


@triton.jit
def grad_mask(
    q,
    k,
    v,
    grad_out,
    numbers,
    mask,
    listed,
    part,
    dm,
    q_b,
    q_h,
    q_m,
    q_d,
    k_b,
    k_h,
    k_n,
    k_d,
    v_b,
    v_h,
    v_n,
    v_d,
    g_b,
    g_h,
    g_m,
    g_d,
    dm_b,
    dm_h,
    dm_m,
    dm_n,
    mask_b,
    mask_h,
    mask_m,
    mask_n,
    listed_b,
    listed_h,
    listed_n,
    count,
    scale,
    softcap,
    probability,
    seed,
    offset,
    batches,
    heads,
    chunks,
    len_q,
    len_k,
    diagonal,
    left,
    right,
    block_q,
    block_k,
    GROUP: tl.constexpr,
    DQ: tl.constexpr,
    DV: tl.constexpr,
    BDQ: tl.constexpr,
    BDV: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BOTTOM: tl.constexpr,
    LEFT: tl.constexpr,
    RIGHT: tl.constexpr,
    SOFTCAP: tl.constexpr,
    DROPOUT: tl.constexpr,
    PLAN: tl.constexpr,
    ALIGNED: tl.constexpr,
    GRAD_ALIGNED: tl.constexpr,
    MASK_UNIT: tl.constexpr,
    EVEN_Q: tl.constexpr,
    EVEN_K: tl.constexpr,
    OF_BATCH: tl.constexpr,
    OF_HEADS: tl.constexpr,
    OF_ROWS: tl.constexpr,
    OF_KEYS: tl.constexpr,
    PARTS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Gradient of an additive mask: a program owns a tile of it and adds up whatever the mask is broadcast over.

    Grid: (tiles of rows * tiles of keys * chunks, heads, batch entries), all of the mask. OF_BATCH, OF_HEADS, OF_ROWS,
    OF_KEYS: the dimensions over which it runs; the others are 1. dm: of its shape. PARTS: the batch entries and heads
    that a mask is broadcast over are cut into `chunks`, whose sums go to part, float32 [chunks, the mask's elements],
    for `sum_parts`. listed: with PLAN a byte for each pair of blocks, of `rows_of_blocks`. The rest as in `grad_kv`.
    """
    if ALIGNED:
        q_d, k_d, v_d = 1, 1, 1
    if GRAD_ALIGNED:
        g_d = 1
    if MASK_UNIT:
        mask_n = 1
    low, high = band(diagonal, len_q, len_k, left, right, BOTTOM)
    tile, chunk = tl.program_id(0) // chunks, tl.program_id(0) % chunks
    row_tiles, key_tiles = (len_q + BM - 1) // BM, (len_k + BN - 1) // BN
    first_row, rows_walked, first_column, columns_walked, row_tile, key_tile = 0, row_tiles, 0, key_tiles, 0, 0
    if OF_ROWS and OF_KEYS:
        row_tile, key_tile = tile // key_tiles, tile % key_tiles
    elif OF_ROWS:
        row_tile = tile
    elif OF_KEYS:
        key_tile = tile
    if OF_ROWS:
        first_row, rows_walked = row_tile, 1
    if OF_KEYS:
        first_column, columns_walked = key_tile, 1
    pairs = 1
    if not OF_BATCH:
        pairs *= batches
    if not OF_HEADS:
        pairs *= heads
    each = (pairs + chunks - 1) // chunks
    first_pair = chunk * each
    steps = tl.maximum(tl.minimum(each, pairs - first_pair), 0) * rows_walked * columns_walked
    if OF_ROWS and OF_KEYS:  # a tile that no row reads
        if RIGHT:
            steps = tl.where(key_tile * BN > tl.minimum(row_tile * BM + BM, len_q) - 1 + high, 0, steps)
        if LEFT:
            steps = tl.where(key_tile * BN + BN - 1 < row_tile * BM + low, 0, steps)
    lane_q, lane_k, d_q, d_v = tl.arange(0, BM), tl.arange(0, BN), tl.arange(0, BDQ), tl.arange(0, BDV)
    sums = tl.zeros([BM, BN], tl.float32)
    for step in tl.range(0, steps, num_stages=STAGES):
        place = step // columns_walked
        pair = first_pair + place // rows_walked
        batch, head = tl.program_id(2), tl.program_id(1)
        if not OF_BATCH and not OF_HEADS:
            batch, head = pair // heads, pair % heads
        elif not OF_BATCH:
            batch = pair
        elif not OF_HEADS:
            head = pair
        batch64 = tl.zeros([], tl.int64) + batch
        head64 = tl.zeros([], tl.int64) + head
        kv64 = head64 // GROUP
        rows = (first_row + place % rows_walked) * BM + lane_q
        start = (first_column + step % columns_walked) * BN
        columns = start + lane_k
        row_ok, rows64 = rows < len_q, rows.to(tl.int64)[:, None]
        column_ok, columns64 = columns < len_k, columns.to(tl.int64)[None, :]
        q_at = q + batch64 * q_b + head64 * q_h + rows64 * q_m + d_q[None, :] * q_d
        g_at = grad_out + batch64 * g_b + head64 * g_h + rows64 * g_m + d_v[None, :] * g_d
        k_at = k + batch64 * k_b + kv64 * k_h + columns64 * k_n + d_q[:, None] * k_d
        v_at = v + batch64 * v_b + kv64 * v_h + columns64 * v_n + d_v[:, None] * v_d
        q_tile = loaded(q_at, row_ok[:, None], d_q[None, :] < DQ, not EVEN_Q, DQ != BDQ)
        g_tile = loaded(g_at, row_ok[:, None], d_v[None, :] < DV, not EVEN_Q, DV != BDV)
        k_tile = loaded(k_at, column_ok[None, :], d_q[:, None] < DQ, not EVEN_K, DQ != BDQ)
        v_tile = loaded(v_at, column_ok[None, :], d_v[:, None] < DV, not EVEN_K, DV != BDV)
        row_at = numbers + (batch64 * heads + head64) * len_q + rows
        delta = tl.load(row_at, mask=row_ok, other=0.0)
        row_lse = tl.load(row_at + count, mask=row_ok, other=float("inf"))
        share = tl.load(row_at + 2 * count, mask=row_ok, other=0.0)
        found, _ = weights(
            tl.dot(q_tile, k_tile, input_precision="ieee"),
            rows[:, None],
            columns[None, :],
            len_q,
            len_k,
            row_lse[:, None],
            share[:, None],
            mask + batch64 * mask_b + head64 * mask_h,
            mask_m,
            mask_n,
            scale,
            softcap,
            low,
            high,
            2,
            OF_ROWS,
            OF_KEYS,
            LEFT,
            RIGHT,
            SOFTCAP,
            EVEN_Q,
            EVEN_K,
            LEFT or RIGHT or not EVEN_Q or not EVEN_K,
        )
        if PLAN:
            at = listed + batch64 * listed_b + head64 * listed_h
            at += (columns // block_k).to(tl.int64)[None, :] * listed_n + (rows // block_q)[:, None]
            present = tl.load(at, mask=row_ok[:, None] & column_ok[None, :], other=0)
            found = tl.where(present != 0, found, 0.0)
        grad = tl.dot(g_tile, v_tile, input_precision="ieee")
        if DROPOUT:
            step_words, base_words = row_words(seed, offset, rows * 0 + (batch * heads + head), rows)
            keep = kept_pairs(step_words[:, None], base_words[:, None], start, probability, BN, False)
            grad = tl.where(keep, grad * (1.0 / (1.0 - probability)), 0.0)
        sums += found * (grad - delta[:, None])

    rows, columns = row_tile * BM + lane_q, key_tile * BN + lane_k
    if PARTS:
        rows_of, keys_of = 1, 1
        if OF_ROWS:
            rows_of = len_q
        if OF_KEYS:
            keys_of = len_k
        size = tl.zeros([], tl.int64) + rows_of * keys_of
        at = part + ((chunk * tl.num_programs(2) + tl.program_id(2)) * tl.num_programs(1) + tl.program_id(1)) * size
        step_m, step_n = size * 0 + keys_of, size * 0 + 1
    else:
        at = dm + tl.program_id(2).to(tl.int64) * dm_b + tl.program_id(1).to(tl.int64) * dm_h
        step_m, step_n = dm_m, dm_n
    kind: tl.constexpr = tl.float32 if PARTS else dm.dtype.element_ty
    if OF_ROWS and OF_KEYS:
        at += rows.to(tl.int64)[:, None] * step_m + columns.to(tl.int64)[None, :] * step_n
        tl.store(at, sums.to(kind), mask=(rows < len_q)[:, None] & (columns < len_k)[None, :])
    elif OF_ROWS:
        tl.store(at + rows.to(tl.int64) * step_m, tl.sum(sums, 1).to(kind), mask=rows < len_q)
    elif OF_KEYS:
        tl.store(at + columns.to(tl.int64) * step_n, tl.sum(sums, 0).to(kind), mask=columns < len_k)
    else:
        tl.store(at, tl.sum(tl.sum(sums, 1), 0).to(kind))


@triton.jit
def sum_parts(part, dm, dm_b, dm_h, dm_m, dm_n, chunks, size, heads, rows, keys, BLOCK: tl.constexpr,
              TOGETHER: tl.constexpr):  # fmt: skip
    """dm: the sum of `chunks` parts of `size` numbers each, TOGETHER of them at a time. heads, rows, keys: of dm.

    Grid: blocks of the numbers.
    """
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    there, lane = place < size, tl.arange(0, TOGETHER)
    total = tl.zeros([TOGETHER, BLOCK], tl.float32)
    for first in tl.range(0, chunks, TOGETHER):
        chunk = (first + lane)[:, None]
        total += tl.load(part + chunk * size + place[None, :], mask=(chunk < chunks) & there[None, :], other=0.0)
    row, head = place // keys, place // keys // rows
    at = dm + head // heads * dm_b + head % heads * dm_h + row % rows * dm_m + place % keys * dm_n
    tl.store(at, tl.sum(total, 0).to(dm.dtype.element_ty), mask=there)
