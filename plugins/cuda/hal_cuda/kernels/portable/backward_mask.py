# ruff: noqa: N803
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
"""The backward's kernels for additive masks: weights where a log-sum-exp is too large to hold them, and the mask's own
gradient.
"""

import triton
import triton.language as tl

from .backward_step import band, block_of_step, kept_pairs, loaded, weights

#: Size of a log-sum-exp from which on weights are divided by their sum: below it, its rounding in float32 changes a
#: weight by less than 4e-6.
LARGE_LSE = tl.constexpr(100.0)


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
    BOTTOM: tl.constexpr,
    LEFT: tl.constexpr,
    RIGHT: tl.constexpr,
    SOFTCAP: tl.constexpr,
    PLAN: tl.constexpr,
    ALIGNED: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Write 1 / sum over keys of exp(score - lse) of every row under an additive mask as the third of `numbers`.

    It is 1 but for rounding, except where the log-sum-exp is so large that float32 does not hold the logarithm of a
    count: a row wholly at a mask's lowest number has n keys of weight exp(0). Only tiles with such a row are computed.
    Grid and arguments: as for `grad_q`.
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
    row_at = numbers + count + (batch64 * tl.num_programs(1) + head64) * len_q + rows
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
                mask_at,
                mask_m,
                mask_n,
                scale,
                softcap,
                low,
                high,
                2,
                LEFT,
                RIGHT,
                SOFTCAP,
                True,
            )
            total += tl.sum(found, 1)
        total = tl.where(large, total, 1.0)
    else:
        total = tl.full([BM], 1.0, tl.float32)
    tl.store(row_at + count, 1.0 / total, mask=row_ok)


@triton.jit
def grad_mask(
    q,
    k,
    v,
    grad_out,
    numbers,
    mask,
    listed,
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
    OF_BATCH: tl.constexpr,
    OF_HEADS: tl.constexpr,
    OF_ROWS: tl.constexpr,
    OF_KEYS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Gradient of an additive mask: a program owns a tile of it and adds up whatever the mask is broadcast over.

    Grid: (tiles of rows * tiles of keys, heads, batch entries), all of the mask. OF_BATCH, OF_HEADS, OF_ROWS, OF_KEYS:
    the dimensions over which it runs; the others are 1. dm: of its shape. listed: with PLAN a byte for each pair of
    blocks, of `rows_of_blocks`. The rest as in `grad_kv`.
    """
    if ALIGNED:
        q_d, k_d, v_d = 1, 1, 1
    if GRAD_ALIGNED:
        g_d = 1
    low, high = band(diagonal, len_q, len_k, left, right, BOTTOM)
    key_tiles = 1
    if OF_KEYS:
        key_tiles = (len_k + BN - 1) // BN
    row_tile, key_tile = tl.program_id(0) // key_tiles, tl.program_id(0) % key_tiles
    first_row, end_row = row_tile, row_tile + 1
    if not OF_ROWS:
        first_row, end_row = 0, (len_q + BM - 1) // BM
    first_batch, some_batches, first_head, some_heads = tl.program_id(2), 1, tl.program_id(1), 1
    if not OF_BATCH:
        first_batch, some_batches = 0, batches
    if not OF_HEADS:
        first_head, some_heads = 0, heads
    lane_q, lane_k, d_q, d_v = tl.arange(0, BM), tl.arange(0, BN), tl.arange(0, BDQ), tl.arange(0, BDV)
    sums = tl.zeros([BM, BN], tl.float32)
    for pair in tl.range(0, some_batches * some_heads, num_stages=1):
        batch, head = first_batch + pair // some_heads, first_head + pair % some_heads
        batch64 = tl.zeros([], tl.int64) + batch
        head64 = tl.zeros([], tl.int64) + head
        kv64 = head64 // GROUP
        row_base = numbers + (batch64 * heads + head64) * len_q
        mask_at = mask + batch64 * mask_b + head64 * mask_h
        for row_step in tl.range(first_row, end_row, num_stages=1):
            rows = row_step * BM + lane_q
            row_ok, rows64 = rows < len_q, rows.to(tl.int64)[:, None]
            q_at = q + batch64 * q_b + head64 * q_h + rows64 * q_m + d_q[None, :] * q_d
            g_at = grad_out + batch64 * g_b + head64 * g_h + rows64 * g_m + d_v[None, :] * g_d
            q_tile = loaded(q_at, row_ok[:, None], d_q[None, :] < DQ, True, DQ != BDQ)
            g_tile = loaded(g_at, row_ok[:, None], d_v[None, :] < DV, True, DV != BDV)
            delta = tl.load(row_base + rows, mask=row_ok, other=0.0)
            row_lse = tl.load(row_base + count + rows, mask=row_ok, other=float("inf"))
            share = tl.load(row_base + 2 * count + rows, mask=row_ok, other=0.0)
            first_key, end_key = 0, (len_k + BN - 1) // BN
            if LEFT:
                first_key = tl.maximum(row_step * BM + low, 0) // BN
            if RIGHT:
                seen = tl.minimum(tl.maximum(tl.minimum(row_step * BM + BM, len_q) + high, 0), len_k)
                end_key = (seen + BN - 1) // BN
            if OF_KEYS:
                first_key, end_key = tl.maximum(key_tile, first_key), tl.minimum(key_tile + 1, end_key)
            for key_step in tl.range(first_key, end_key, num_stages=STAGES):
                columns = key_step * BN + lane_k
                column_ok, columns64 = columns < len_k, columns.to(tl.int64)[None, :]
                k_at = k + batch64 * k_b + kv64 * k_h + columns64 * k_n + d_q[:, None] * k_d
                v_at = v + batch64 * v_b + kv64 * v_h + columns64 * v_n + d_v[:, None] * v_d
                k_tile = loaded(k_at, column_ok[None, :], d_q[:, None] < DQ, True, DQ != BDQ)
                v_tile = loaded(v_at, column_ok[None, :], d_v[:, None] < DV, True, DV != BDV)
                found, _ = weights(
                    tl.dot(q_tile, k_tile, input_precision="ieee"),
                    rows[:, None],
                    columns[None, :],
                    len_q,
                    len_k,
                    row_lse[:, None],
                    mask_at,
                    mask_m,
                    mask_n,
                    scale,
                    softcap,
                    low,
                    high,
                    2,
                    LEFT,
                    RIGHT,
                    SOFTCAP,
                    True,
                )
                if PLAN:
                    at = listed + batch64 * listed_b + head64 * listed_h
                    at += (columns // block_k).to(tl.int64)[None, :] * listed_n + (rows // block_q)[:, None]
                    present = tl.load(at, mask=row_ok[:, None] & column_ok[None, :], other=0)
                    found = tl.where(present != 0, found, 0.0)
                grad = tl.dot(g_tile, v_tile, input_precision="ieee")
                if DROPOUT:
                    keep = kept_pairs(seed, offset, batch * heads + head, rows[:, None], columns[None, :], probability)
                    grad = tl.where(keep, grad * (1.0 / (1.0 - probability)), 0.0)
                sums += found * share[:, None] * (grad - delta[:, None])

    at = dm + tl.program_id(2).to(tl.int64) * dm_b + tl.program_id(1).to(tl.int64) * dm_h
    rows, columns = row_tile * BM + lane_q, key_tile * BN + lane_k
    if OF_ROWS and OF_KEYS:
        at += rows.to(tl.int64)[:, None] * dm_m + columns.to(tl.int64)[None, :] * dm_n
        tl.store(at, sums.to(dm.dtype.element_ty), mask=(rows < len_q)[:, None] & (columns < len_k)[None, :])
    elif OF_ROWS:
        tl.store(at + rows.to(tl.int64) * dm_m, tl.sum(sums, 1).to(dm.dtype.element_ty), mask=rows < len_q)
    elif OF_KEYS:
        tl.store(at + columns.to(tl.int64) * dm_n, tl.sum(sums, 0).to(dm.dtype.element_ty), mask=columns < len_k)
    else:
        tl.store(at, tl.sum(tl.sum(sums, 1), 0).to(dm.dtype.element_ty))
