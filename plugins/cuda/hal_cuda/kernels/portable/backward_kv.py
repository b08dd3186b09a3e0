# ruff: noqa: N803
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
"""Gradients of key and value in Triton: a program owns a block of keys and walks the queries that read it."""

import triton
import triton.language as tl

from .backward_step import band, block_of_step, loaded, sequence, weights
from .dropout import kept_pairs, row_words
from .merge import LOG2E


@triton.jit
def kv_step(
    dk,
    dv,
    k_tile,
    v_tile,
    q_at,
    g_at,
    row_at,
    mask_at,
    start,
    end_q,
    first_key,
    end_k,
    q_m,
    g_m,
    mask_m,
    mask_n,
    count,
    low,
    high,
    factor,
    softcap,
    seed,
    offset,
    number,
    probability,
    DQ: tl.constexpr,
    DV: tl.constexpr,
    BDQ: tl.constexpr,
    BDV: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    MASK: tl.constexpr,
    MASK_ROWS: tl.constexpr,
    MASK_KEYS: tl.constexpr,
    LEFT: tl.constexpr,
    RIGHT: tl.constexpr,
    SOFTCAP: tl.constexpr,
    DROPOUT: tl.constexpr,
    PACKED: tl.constexpr,
    KEY: tl.constexpr,
    VALUE: tl.constexpr,
    EVEN_Q: tl.constexpr,
    EVEN_K: tl.constexpr,
    EDGE: tl.constexpr,
):
    """Add what BM rows from `start` on give to the gradients of a tile of keys and values, scores transposed.

    q_at, g_at: addresses of the tile of row 0, of queries [BDQ, BM] and of the output's gradient [BM, BDV].
    """
    rows, columns = start + tl.arange(0, BM), first_key + tl.arange(0, BN)
    there = rows < end_q
    q_tile = loaded(q_at + start * q_m, there[None, :], tl.arange(0, BDQ)[:, None] < DQ, EDGE, DQ != BDQ)
    g_tile = loaded(g_at + start * g_m, there[:, None], tl.arange(0, BDV)[None, :] < DV, EDGE, DV != BDV)
    row_lse = tl.load(row_at + count + rows, mask=there if EDGE else None, other=float("inf") if EDGE else None)
    share = row_lse
    if MASK == 2:
        share = loaded(row_at + 2 * count + rows, there, there, EDGE, False)
    products = tl.dot(k_tile, q_tile, input_precision="ieee")
    found, bent = weights(
        products,
        rows[None, :],
        columns[:, None],
        end_q,
        end_k,
        row_lse[None, :],
        share[None, :],
        mask_at,
        mask_m,
        mask_n,
        factor,
        softcap,
        low,
        high,
        MASK,
        MASK_ROWS,
        MASK_KEYS,
        LEFT,
        RIGHT,
        SOFTCAP,
        EVEN_Q,
        EVEN_K,
        EDGE,
    )
    used = found
    if DROPOUT:
        if PACKED:  # a row's words depend on its place in the sequence
            step, base = row_words(seed, offset, rows * 0 + number, rows)
        else:
            word_at = row_at + (3 if MASK == 2 else 2) * count + rows
            step = loaded(word_at, there, there, EDGE, False).to(tl.int32, bitcast=True)
            base = loaded(word_at + count, there, there, EDGE, False).to(tl.int32, bitcast=True)
        keep = kept_pairs(step[None, :], base[None, :], first_key, probability, BN, True)
        used = tl.where(keep, found, 0.0)
    if VALUE:
        dv = tl.dot(used.to(g_tile.dtype), g_tile, dv, input_precision="ieee")
    if KEY:
        grad = tl.dot(v_tile, tl.trans(g_tile), input_precision="ieee")
        if DROPOUT:
            grad = tl.where(keep, grad * (1.0 / (1.0 - probability)), 0.0)
        grad = found * (grad - loaded(row_at + rows, there, there, EDGE, False)[None, :])
        if SOFTCAP:
            grad *= 1.0 - bent * bent
        dk = tl.dot(grad.to(q_tile.dtype), tl.trans(q_tile), dk, input_precision="ieee")
    return dk, dv


@triton.jit
def grad_kv(
    q,
    k,
    v,
    grad_out,
    numbers,
    mask,
    cu_q,
    cu_k,
    row_index,
    row_count,
    dk,
    dv,
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
    dk_b,
    dk_h,
    dk_n,
    dk_d,
    dv_b,
    dv_h,
    dv_n,
    dv_d,
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
    probability,
    seed,
    offset,
    len_q,
    len_k,
    diagonal,
    left,
    right,
    block_q,
    block_k,
    all_q,
    all_k,
    GROUP: tl.constexpr,
    DQ: tl.constexpr,
    DV: tl.constexpr,
    BDQ: tl.constexpr,
    BDV: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    MASK: tl.constexpr,
    MASK_ROWS: tl.constexpr,
    MASK_KEYS: tl.constexpr,
    BOTTOM: tl.constexpr,
    LEFT: tl.constexpr,
    RIGHT: tl.constexpr,
    SOFTCAP: tl.constexpr,
    DROPOUT: tl.constexpr,
    PACKED: tl.constexpr,
    PLAN: tl.constexpr,
    KEY: tl.constexpr,
    VALUE: tl.constexpr,
    MASK_UNIT: tl.constexpr,
    ALIGNED: tl.constexpr,
    GRAD_ALIGNED: tl.constexpr,
    RESULT_ALIGNED: tl.constexpr,
    EVEN_Q: tl.constexpr,
    EVEN_K: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Gradients of BN keys and values of one key head: the rows of all its query heads are walked, so sums stay here.

    Grid: (key tiles, key heads, batch entries or sequences). numbers: see `backward_step`; count: rows of all heads.
    row_index, row_count: with PLAN the row blocks that list a key block, of `rows_of_blocks`. KEY, VALUE: which
    gradients are wanted. ALIGNED, GRAD_ALIGNED, RESULT_ALIGNED: q, k and v, grad_out, dk and dv have unit last stride,
    addresses and other strides are multiples of 16 bytes. EVEN_Q, EVEN_K: every tile of rows, of keys is whole.
    MASK_UNIT: the mask has unit last stride. The rest as in `attend`.
    """
    if ALIGNED:
        q_d, k_d, v_d = 1, 1, 1
    if GRAD_ALIGNED:
        g_d = 1
    if MASK_UNIT:  # its loads then follow the keys, down the transposed scores
        mask_n = 1
    if RESULT_ALIGNED:
        dk_d, dv_d = 1, 1
    kv_head, batch = tl.program_id(1), tl.program_id(2)
    kv64 = kv_head.to(tl.int64)
    q_start, k_start, len_q, len_k, entry = sequence(cu_q, cu_k, batch, len_q, len_k, all_q, all_k, PACKED)
    low, high = band(diagonal, len_q, len_k, left, right, BOTTOM)
    start = tl.program_id(0) * BN
    end_k = len_k
    block = 0
    if PLAN:
        tiles_in_block = (block_k + BN - 1) // BN
        block = tl.program_id(0) // tiles_in_block
        start = block * block_k + (tl.program_id(0) % tiles_in_block) * BN
        end_k = tl.minimum((block + 1) * block_k, len_k)
    if start >= end_k:
        return
    columns = start + tl.arange(0, BN)
    column_ok, key_row = columns < end_k, (k_start + columns.to(tl.int64))[:, None]
    lane, d_q, d_v = tl.arange(0, BM), tl.arange(0, BDQ), tl.arange(0, BDV)
    k_at = k + entry * k_b + kv64 * k_h + key_row * k_n + d_q[None, :] * k_d
    v_at = v + entry * v_b + kv64 * v_h + key_row * v_n + d_v[None, :] * v_d
    k_tile = loaded(k_at, column_ok[:, None], d_q[None, :] < DQ, not EVEN_K, DQ != BDQ)
    v_tile = loaded(v_at, column_ok[:, None], d_v[None, :] < DV, not EVEN_K, DV != BDV)

    # Tiles of rows that read these keys; those from `inner` to `inner_end` read all of them, and are whole.
    last_key = tl.minimum(start + BN, end_k) - 1
    first_row, end_row = 0, len_q
    if RIGHT:
        first_row = tl.maximum(start - high, 0)
    if LEFT:
        end_row = tl.minimum(tl.maximum(last_key - low + 1, 0), len_q)
    first, last = first_row // BM, (end_row + BM - 1) // BM
    last = tl.maximum(last, first)
    inner, inner_end = first, last
    if RIGHT:
        inner = (tl.maximum(last_key - high, 0) + BM - 1) // BM
    if LEFT:
        inner_end = tl.maximum(start - low + 1, 0) // BM
    if not EVEN_Q:
        inner_end = tl.minimum(inner_end, len_q // BM)
    inner = tl.minimum(tl.maximum(inner, first), last)
    inner_end = tl.minimum(tl.maximum(inner_end, inner), last)

    EDGES: tl.constexpr = LEFT or RIGHT or not EVEN_Q or (MASK > 0 and not EVEN_K)
    factor = scale
    if not (SOFTCAP or MASK == 2):
        factor = scale * LOG2E
    dk_sums, dv_sums = tl.zeros([BN, BDQ], tl.float32), tl.zeros([BN, BDV], tl.float32)
    for member in range(GROUP):
        head = kv_head * GROUP + member
        head64 = kv64 * GROUP + member
        number = batch * (tl.num_programs(1) * GROUP) + head
        q_at = q + entry * q_b + head64 * q_h + (q_start + lane)[None, :] * q_m + d_q[:, None] * q_d
        g_at = grad_out + entry * g_b + head64 * g_h + (q_start + lane)[:, None] * g_m + d_v[None, :] * g_d
        row_at = numbers + (entry * tl.num_programs(1) * GROUP + head64) * all_q + q_start
        mask_at = mask
        if MASK > 0:
            mask_at = mask + batch.to(tl.int64) * mask_b + head64 * mask_h
        lists, steps, first_step, last_step = row_index, 1, 0, 0
        if PLAN:
            steps = (block_q + BM - 1) // BM
            lists = row_index + batch.to(tl.int64) * index_b + head64 * index_h + block * index_m
            last_step = steps * tl.load(row_count + batch.to(tl.int64) * count_b + head64 * count_h + block)
        # Tiles at edges first, then those that need no mask; the blocks of a plan all in one walk.
        for part in tl.static_range(0 if EDGES or PLAN else 1, 1 if PLAN else 2):
            if not PLAN:
                first_step, last_step = inner, inner_end
                if part == 0:
                    first_step, last_step = 0, inner - first + last - inner_end
            for step in tl.range(first_step, last_step, num_stages=STAGES):
                at_edge = step
                if part == 0 and not PLAN:
                    at_edge = tl.where(step < inner - first, first + step, inner_end - inner + first + step)
                row, end_q = block_of_step(lists, at_edge, steps, block_q, len_q, BM, PLAN)
                dk_sums, dv_sums = kv_step(
                    dk_sums,
                    dv_sums,
                    k_tile,
                    v_tile,
                    q_at,
                    g_at,
                    row_at,
                    mask_at,
                    row,
                    end_q,
                    start,
                    end_k,
                    q_m,
                    g_m,
                    mask_m,
                    mask_n,
                    count,
                    low,
                    high,
                    factor,
                    softcap,
                    seed,
                    offset,
                    number,
                    probability,
                    DQ,
                    DV,
                    BDQ,
                    BDV,
                    BM,
                    BN,
                    MASK,
                    MASK_ROWS,
                    MASK_KEYS,
                    LEFT,
                    RIGHT,
                    SOFTCAP,
                    DROPOUT,
                    PACKED,
                    KEY,
                    VALUE,
                    EVEN_Q or part == 1,  # those tiles are whole
                    EVEN_K,
                    EDGES if part == 0 else MASK > 0 and not EVEN_K,
                )

    if KEY:
        at = dk + entry * dk_b + kv64 * dk_h + key_row * dk_n + d_q[None, :] * dk_d
        tl.store(at, (dk_sums * scale).to(dk.dtype.element_ty), mask=column_ok[:, None] & (d_q[None, :] < DQ))
    if VALUE:
        if DROPOUT:
            dv_sums *= 1.0 / (1.0 - probability)
        at = dv + entry * dv_b + kv64 * dv_h + key_row * dv_n + d_v[None, :] * dv_d
        tl.store(at, dv_sums.to(dv.dtype.element_ty), mask=column_ok[:, None] & (d_v[None, :] < DV))
