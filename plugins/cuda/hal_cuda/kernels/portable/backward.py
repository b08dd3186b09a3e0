# ruff: noqa: N803
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
"""Before the gradients in Triton: what they read of each query row.

Every feature of `attend` but pages, any strides, compute capability 8.0 and up; also in Triton's interpreter. Every
number is summed in one program, in one order: there are no atomics, so results repeat bit by bit.

Source: Dao 2023 (FlashAttention-2), algorithm 2, with the gradient of the queries in a kernel of its own.
"""

import triton
import triton.language as tl

from .dropout import row_words
from .merge import LOG2E


@triton.jit
def prepare(
    out,
    grad_out,
    lse,
    grad_lse,
    numbers,
    o_b,
    o_h,
    o_m,
    o_d,
    g_b,
    g_h,
    g_m,
    g_d,
    l_b,
    l_h,
    l_m,
    e_b,
    e_h,
    e_m,
    count,
    seed,
    offset,
    len_q,
    DV: tl.constexpr,
    BDV: tl.constexpr,
    BM: tl.constexpr,
    NATURAL: tl.constexpr,
    GRAD_LSE: tl.constexpr,
    WORDS: tl.constexpr,
    ALIGNED: tl.constexpr,
    GRAD_ALIGNED: tl.constexpr,
):
    """Write delta, sum(grad_out * out) - grad_lse, and the log-sum-exp of every row into `numbers`.

    Grid: (row tiles, heads, batch) of the tensors. count: rows of all heads. NATURAL: scores are natural, else base-2.
    WORDS: where among `numbers` the random words of dropout are written, 0 for nowhere.
    """
    if ALIGNED:
        o_d = 1
    if GRAD_ALIGNED:
        g_d = 1
    head, batch = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    there, rows64 = rows < len_q, rows.to(tl.int64)
    d = tl.arange(0, BDV)
    where = there[:, None] & (d[None, :] < DV)
    result = tl.load(out + batch * o_b + head * o_h + rows64[:, None] * o_m + d[None, :] * o_d, mask=where, other=0.0)
    grad = tl.load(
        grad_out + batch * g_b + head * g_h + rows64[:, None] * g_m + d[None, :] * g_d, mask=where, other=0.0
    )
    delta = tl.sum(result.to(tl.float32) * grad.to(tl.float32), 1)
    row_lse = tl.load(lse + batch * l_b + head * l_h + rows64 * l_m, mask=there, other=0.0)
    if GRAD_LSE:
        delta -= tl.load(grad_lse + batch * e_b + head * e_h + rows64 * e_m, mask=there, other=0.0).to(tl.float32)
    fully_masked = row_lse == float("-inf")
    if not NATURAL:
        row_lse *= LOG2E
    at = numbers + (batch * tl.num_programs(1) + head) * len_q + rows64
    tl.store(at, tl.where(fully_masked, 0.0, delta), mask=there)
    tl.store(at + count, tl.where(fully_masked, float("inf"), row_lse), mask=there)
    if WORDS > 0:
        number = tl.zeros([BM], tl.int32) + tl.program_id(2) * tl.num_programs(1) + tl.program_id(1)
        step, base = row_words(seed, offset, number, rows)
        tl.store(at + WORDS * count, step.to(tl.float32, bitcast=True), mask=there)
        tl.store(at + (WORDS + 1) * count, base.to(tl.float32, bitcast=True), mask=there)
