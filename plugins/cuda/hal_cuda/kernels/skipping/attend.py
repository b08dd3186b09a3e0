# ruff: noqa: N803
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
# mypy: disable-error-code="attr-defined"
"""Dense attention in Triton that skips tiles of keys; full and causal, any strides; also runs in Triton's interpreter.

One program owns BM query rows of a head and walks its keys in tiles of BN from the last backwards. The scores of every
tile are computed; a tile that no row needs costs neither exponentials, nor the product with the values, nor their load.

Source: BLASST (2025) for the test of a tile's largest score against the running maximum.
"""

import triton
import triton.language as tl

from ..portable.merge import LN2, LOG2E


@triton.jit
def attend_skipping(
    q,
    k,
    v,
    out,
    lse,
    counts,
    lost_share,
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
    o_b,
    o_h,
    o_m,
    scale,
    threshold,
    group,
    len_q,
    len_k,
    shift,
    DQ: tl.constexpr,
    DV: tl.constexpr,
    BDQ: tl.constexpr,
    BDV: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    CAUSAL: tl.constexpr,
    LSE: tl.constexpr,
    ALIGNED: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Grid: (row tiles, heads, batch entries).

    Row i reads keys up to i + shift with CAUSAL. threshold: in base-2 units. lse: float32 [batch, heads, len_q]; like
    the result it counts the tiles that were not skipped alone. counts: int64 [2], to which tiles met and tiles skipped
    are added. lost_share: float32 [1], raised to the largest bound of a row: what was skipped of its sum of weights at
    most, BN times the largest weight of each tile that was skipped.
    """
    if ALIGNED:
        q_d, k_d, v_d = 1, 1, 1
    first_row = tl.program_id(0) * BM
    head, batch = tl.program_id(1), tl.program_id(2)
    rows, d_q, d_v = first_row + tl.arange(0, BM), tl.arange(0, BDQ), tl.arange(0, BDV)
    row_ok = rows < len_q
    batch64, head64, kv64, rows64 = (
        batch.to(tl.int64),
        head.to(tl.int64),
        (head // group).to(tl.int64),
        rows.to(tl.int64),
    )
    q_at = q + batch64 * q_b + head64 * q_h + rows64[:, None] * q_m + d_q[None, :] * q_d
    q_tile = tl.load(q_at, mask=row_ok[:, None] & (d_q[None, :] < DQ), other=0.0)
    k_base, v_base = k + batch64 * k_b + kv64 * k_h, v + batch64 * v_b + kv64 * v_h
    end = len_k
    if CAUSAL:
        end = tl.maximum(tl.minimum(first_row + BM + shift, len_k), 0)
    tiles = (end + BN - 1) // BN
    most = tl.full([BM], float("-inf"), tl.float32)
    total, lost = tl.zeros([BM], tl.float32), tl.zeros([BM], tl.float32)
    sums = tl.zeros([BM, BDV], tl.float32)
    skipped = 0
    for i in tl.range(0, tiles, num_stages=STAGES):
        columns = (tiles - 1 - i) * BN + tl.arange(0, BN)
        there = columns < len_k
        at = columns.to(tl.int64)
        k_at = k_base + at[None, :] * k_n + d_q[:, None] * k_d
        k_tile = tl.load(k_at, mask=there[None, :] & (d_q[:, None] < DQ), other=0.0)
        scores = tl.dot(q_tile, k_tile, input_precision="ieee") * (scale * LOG2E)
        visible = there[None, :]
        if CAUSAL:
            visible = visible & (columns[None, :] <= (rows + shift)[:, None])
        scores = tl.where(visible, scores, float("-inf"))
        # A maximum leaves NaNs out; one makes its tile needed, so that it reaches the result.
        peak = tl.max(tl.where(scores == scores, scores, float("inf")), 1)
        needed = row_ok & (peak > most - threshold)
        if tl.max(needed.to(tl.int32), 0) > 0:
            raised = tl.maximum(most, peak)
            anchor = tl.where(raised == float("-inf"), 0.0, raised)
            weights = tl.exp2(scores - anchor[:, None])
            shrink = tl.exp2(most - anchor)
            total = total * shrink + tl.sum(weights, 1)
            lost = lost * shrink
            most = raised
            v_at = v_base + at[:, None] * v_n + d_v[None, :] * v_d
            v_tile = tl.load(v_at, mask=there[:, None] & (d_v[None, :] < DV), other=0.0)
            sums = sums * shrink[:, None]
            sums = tl.dot(weights.to(v_tile.dtype), v_tile, sums, input_precision="ieee")
        else:
            skipped += 1
            lost += BN * tl.exp2(peak - tl.where(most == float("-inf"), 0.0, most))
    dead = total == 0.0
    sums = sums * (1.0 / tl.where(dead, 1.0, total))[:, None]
    o_at = out + batch64 * o_b + head64 * o_h + rows64[:, None] * o_m + d_v[None, :]
    tl.store(o_at, sums.to(out.dtype.element_ty), mask=row_ok[:, None] & (d_v[None, :] < DV))
    if LSE:
        natural = tl.where(dead, float("-inf"), (most + tl.log2(tl.where(dead, 1.0, total))) * LN2)
        tl.store(lse + (batch64 * tl.num_programs(1) + head64) * len_q + rows64, natural, mask=row_ok)
    tl.atomic_add(counts, tiles.to(tl.int64))
    tl.atomic_add(counts + 1, skipped.to(tl.int64))
    share = tl.where(row_ok, lost / tl.where(lost > 0.0, total + lost, 1.0), 0.0)
    tl.atomic_max(lost_share, tl.max(share, 0))
