# ruff: noqa: N803
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
"""Gradients of the query in Triton: a program owns a tile of query rows and walks the keys that they read."""

import triton
import triton.language as tl

from .backward_step import band, block_of_step, loaded, sequence, weights
from .dropout import kept_pairs, row_words
from .merge import LOG2E


@triton.jit
def q_step(
    dq,
    q_tile,
    g_tile,
    k_at,
    v_at,
    row_lse,
    share,
    delta,
    mask_at,
    rows,
    end_q,
    start,
    end_k,
    k_n,
    v_n,
    mask_m,
    mask_n,
    low,
    high,
    factor,
    softcap,
    step,
    base,
    probability,
    DQ: tl.constexpr,
    DV: tl.constexpr,
    BDQ: tl.constexpr,
    BDV: tl.constexpr,
    BN: tl.constexpr,
    MASK: tl.constexpr,
    MASK_ROWS: tl.constexpr,
    MASK_KEYS: tl.constexpr,
    LEFT: tl.constexpr,
    RIGHT: tl.constexpr,
    SOFTCAP: tl.constexpr,
    DROPOUT: tl.constexpr,
    EVEN_Q: tl.constexpr,
    EVEN_K: tl.constexpr,
    EDGE: tl.constexpr,
):
    """Add what BN keys from `start` on give to the gradient of a tile of queries.

    k_at, v_at: addresses of the tile of key 0, of keys [BDQ, BN] and of values [BDV, BN]. share: of a row's weights.
    step, base: the rows' random words.
    """
    columns = start + tl.arange(0, BN)
    there = (columns < end_k)[None, :]
    k_tile = loaded(k_at + start * k_n, there, tl.arange(0, BDQ)[:, None] < DQ, EDGE, DQ != BDQ)
    v_tile = loaded(v_at + start * v_n, there, tl.arange(0, BDV)[:, None] < DV, EDGE, DV != BDV)
    products = tl.dot(q_tile, k_tile, input_precision="ieee")
    grad = tl.dot(g_tile, v_tile, input_precision="ieee")
    found, bent = weights(
        products,
        rows[:, None],
        columns[None, :],
        end_q,
        end_k,
        row_lse[:, None],
        share[:, None],
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
    if DROPOUT:
        keep = kept_pairs(step[:, None], base[:, None], start, probability, BN, False)
        grad = tl.where(keep, grad * (1.0 / (1.0 - probability)), 0.0)
    grad = found * (grad - delta[:, None])
    if SOFTCAP:
        grad *= 1.0 - bent * bent
    return tl.dot(grad.to(k_tile.dtype), tl.trans(k_tile), dq, input_precision="ieee")


@triton.jit
def grad_q(
    q,
    k,
    v,
    grad_out,
    numbers,
    mask,
    cu_q,
    cu_k,
    plan_index,
    plan_count,
    dq,
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
    dq_b,
    dq_h,
    dq_m,
    dq_d,
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
    MASK_UNIT: tl.constexpr,
    ALIGNED: tl.constexpr,
    GRAD_ALIGNED: tl.constexpr,
    RESULT_ALIGNED: tl.constexpr,
    EVEN_Q: tl.constexpr,
    EVEN_K: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Gradients of BM queries. Grid: (row tiles, query heads, batch entries or sequences).

    plan_index, plan_count: with PLAN the key blocks that a row block lists, each once. The rest as in `grad_kv`.
    """
    if ALIGNED:
        q_d, k_d, v_d = 1, 1, 1
    if GRAD_ALIGNED:
        g_d = 1
    if MASK_UNIT:
        mask_n = 1
    if RESULT_ALIGNED:
        dq_d = 1
    head, batch = tl.program_id(1), tl.program_id(2)
    head64, kv64 = head.to(tl.int64), (head // GROUP).to(tl.int64)
    q_start, k_start, len_q, len_k, entry = sequence(cu_q, cu_k, batch, len_q, len_k, all_q, all_k, PACKED)
    low, high = band(diagonal, len_q, len_k, left, right, BOTTOM)
    tile = tl.program_id(0)
    if RIGHT:  # the longest rows begin first
        tile = tl.num_programs(0) - 1 - tile
    start, end_q, plan_row = tile * BM, len_q, 0
    if PLAN:
        tiles_in_block = (block_q + BM - 1) // BM
        plan_row = tile // tiles_in_block
        start = plan_row * block_q + (tile % tiles_in_block) * BM
        end_q = tl.minimum((plan_row + 1) * block_q, len_q)
    if start >= end_q:
        return
    rows = start + tl.arange(0, BM)
    row_ok, query_row = rows < end_q, (q_start + rows.to(tl.int64))[:, None]
    lane, d_q, d_v = tl.arange(0, BN), tl.arange(0, BDQ), tl.arange(0, BDV)
    q_at = q + entry * q_b + head64 * q_h + query_row * q_m + d_q[None, :] * q_d
    g_at = grad_out + entry * g_b + head64 * g_h + query_row * g_m + d_v[None, :] * g_d
    q_tile = loaded(q_at, row_ok[:, None], d_q[None, :] < DQ, not EVEN_Q, DQ != BDQ)
    g_tile = loaded(g_at, row_ok[:, None], d_v[None, :] < DV, not EVEN_Q, DV != BDV)
    row_at = numbers + (entry * tl.num_programs(1) + head64) * all_q + q_start + rows
    delta = tl.load(row_at, mask=row_ok, other=0.0)
    row_lse = tl.load(row_at + count, mask=row_ok, other=float("inf"))
    share = delta
    if MASK == 2:
        share = tl.load(row_at + 2 * count, mask=row_ok, other=0.0)
    k_at = k + entry * k_b + kv64 * k_h + (k_start + lane)[None, :] * k_n + d_q[:, None] * k_d
    v_at = v + entry * v_b + kv64 * v_h + (k_start + lane)[None, :] * v_n + d_v[:, None] * v_d
    mask_at = mask
    if MASK > 0:
        mask_at = mask + batch.to(tl.int64) * mask_b + head64 * mask_h

    # Tiles of keys that these rows read; those from `inner` to `inner_end` are read by all of them, and are whole.
    last_row = tl.minimum(start + BM, end_q) - 1
    first_key, end_key = 0, len_k
    if LEFT:
        first_key = tl.maximum(start + low, 0)
    if RIGHT:
        end_key = tl.minimum(tl.maximum(last_row + high + 1, 0), len_k)
    first, last = first_key // BN, (end_key + BN - 1) // BN
    last = tl.maximum(last, first)
    inner, inner_end = first, last
    if LEFT:
        inner = (tl.maximum(last_row + low, 0) + BN - 1) // BN
    if RIGHT:
        inner_end = tl.maximum(start + high + 1, 0) // BN
    if not EVEN_K:
        inner_end = tl.minimum(inner_end, len_k // BN)
    inner = tl.minimum(tl.maximum(inner, first), last)
    inner_end = tl.minimum(tl.maximum(inner_end, inner), last)

    EDGES: tl.constexpr = LEFT or RIGHT or not EVEN_K or (MASK > 0 and not EVEN_Q)
    factor = scale
    if not (SOFTCAP or MASK == 2):
        factor = scale * LOG2E
    step_words, base_words = rows, rows
    if DROPOUT:
        number = tl.zeros([BM], tl.int32) + batch * tl.num_programs(1) + head
        step_words, base_words = row_words(seed, offset, number, rows)
    sums = tl.zeros([BM, BDQ], tl.float32)
    lists, steps, first_step, last_step = plan_index, 1, 0, 0
    if PLAN:
        steps = (block_k + BN - 1) // BN
        lists = plan_index + batch.to(tl.int64) * index_b + head64 * index_h + plan_row * index_m
        last_step = steps * tl.load(plan_count + batch.to(tl.int64) * count_b + head64 * count_h + plan_row)
    for part in tl.static_range(0 if EDGES or PLAN else 1, 1 if PLAN else 2):
        if not PLAN:
            first_step, last_step = inner, inner_end
            if part == 0:
                first_step, last_step = 0, inner - first + last - inner_end
        for step in tl.range(first_step, last_step, num_stages=STAGES):
            at_edge = step
            if part == 0 and not PLAN:
                at_edge = tl.where(step < inner - first, first + step, inner_end - inner + first + step)
            column, end_k = block_of_step(lists, at_edge, steps, block_k, len_k, BN, PLAN)
            sums = q_step(
                sums,
                q_tile,
                g_tile,
                k_at,
                v_at,
                row_lse,
                share,
                delta,
                mask_at,
                rows,
                end_q,
                column,
                end_k,
                k_n,
                v_n,
                mask_m,
                mask_n,
                low,
                high,
                factor,
                softcap,
                step_words,
                base_words,
                probability,
                DQ,
                DV,
                BDQ,
                BDV,
                BN,
                MASK,
                MASK_ROWS,
                MASK_KEYS,
                LEFT,
                RIGHT,
                SOFTCAP,
                DROPOUT,
                EVEN_Q,
                EVEN_K or part == 1,  # those tiles are whole
                EDGES if part == 0 else MASK > 0 and not EVEN_Q,
            )

    at = dq + entry * dq_b + head64 * dq_h + query_row * dq_m + d_q[None, :] * dq_d
    tl.store(at, (sums * scale).to(dq.dtype.element_ty), mask=row_ok[:, None] & (d_q[None, :] < DQ))
