# ruff: noqa: N803
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
"""Attention and its gradients for rows so short that all keys fit one tile: windows of an image, for one.

A program owns one head and walks batch entries, so a mask that is broadcast over the batch is read once, and the sum of
its gradient stays in registers. Each operand is read once: dQ, dK, dV and the mask's gradient come from one pass over
five products.
"""

import triton
import triton.language as tl

from .backward_mask import LARGE_LSE
from .dropout import kept_pairs, row_words
from .mask_tiles import mask_tile
from .merge import LN2, LOG2E


@triton.jit
def scores_of(products, given, rows, columns, len_q, len_k, scale, softcap, low, high, MASK: tl.constexpr,
              LEFT: tl.constexpr, RIGHT: tl.constexpr, SOFTCAP: tl.constexpr):  # fmt: skip
    """(scores in natural units, -inf where hidden; tanh under a softcap) of a tile of products. given: the mask's."""
    scores = products * scale
    bent = scores
    if SOFTCAP:
        bent = 1.0 - 2.0 / (tl.exp2(scores * (2.0 * LOG2E / softcap)) + 1.0)
        scores = softcap * bent
    visible = (columns < len_k) & (rows < len_q)
    if LEFT:
        visible = visible & (columns >= rows + low)
    if RIGHT:
        visible = visible & (columns <= rows + high)
    if MASK == 1:
        visible = visible & (given != 0)
    elif MASK == 2:
        scores += given.to(tl.float32)
    return tl.where(visible, scores, float("-inf")), bent


@triton.jit
def tile_at(at, rows, columns, step_m, there, inside):
    """A [rows, columns] tile of an operand, zeros beyond it."""
    return tl.load(at + rows * step_m + columns, mask=there & inside, other=0.0)


@triton.jit
def attend_short(q, k, v, out, lse, mask, q_b, q_h, q_m, k_b, k_h, k_n, v_b, v_h, v_n, o_b, o_h, o_m, mask_b, mask_h,
                 mask_m, mask_n, scale, softcap, probability, seed, offset, batches, each, len_q, len_k, low, high,
                 DQ: tl.constexpr, DV: tl.constexpr, BDQ: tl.constexpr, BDV: tl.constexpr, BM: tl.constexpr,
                 BN: tl.constexpr, MASK: tl.constexpr, MASK_ROWS: tl.constexpr, MASK_KEYS: tl.constexpr,
                 OF_BATCH: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, SOFTCAP: tl.constexpr,
                 DROPOUT: tl.constexpr, LSE: tl.constexpr, STAGES: tl.constexpr):  # fmt: skip
    """Grid: (heads, groups of `each` batch entries). Last strides of q, k, v and out are 1.

    mask_b to mask_n: 0 where the mask is broadcast. OF_BATCH: it runs over the batch. low, high: row i reads keys
    i + low to i + high. lse: float32 [batch, heads, len_q], contiguous. The rest as in `attend`.
    """
    head = tl.program_id(0)
    head64 = head.to(tl.int64)
    rows, columns = tl.arange(0, BM)[:, None], tl.arange(0, BN)[None, :]
    keys, d_q, d_v = tl.arange(0, BN)[:, None], tl.arange(0, BDQ)[None, :], tl.arange(0, BDV)[None, :]
    row = tl.arange(0, BM)
    mask_at = mask
    if MASK > 0:
        mask_at = mask + head64 * mask_h
    given = tl.zeros([BM, BN], tl.float32)
    if MASK > 0 and not OF_BATCH:
        given = mask_tile(mask_at, rows, columns, mask_m, mask_n, len_q, len_k, MASK_ROWS, MASK_KEYS, False, False)
    first = tl.program_id(1) * each
    for batch in tl.range(first, tl.minimum(first + each, batches), num_stages=STAGES):
        batch64 = tl.zeros([], tl.int64) + batch
        q_tile = tile_at(q + batch64 * q_b + head64 * q_h, rows, d_q, q_m, rows < len_q, d_q < DQ)
        k_tile = tile_at(k + batch64 * k_b + head64 * k_h, keys, d_q, k_n, keys < len_k, d_q < DQ)
        v_tile = tile_at(v + batch64 * v_b + head64 * v_h, keys, d_v, v_n, keys < len_k, d_v < DV)
        if MASK > 0 and OF_BATCH:
            at = mask_at + batch64 * mask_b
            given = mask_tile(at, rows, columns, mask_m, mask_n, len_q, len_k, MASK_ROWS, MASK_KEYS, False, False)
        products = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee")
        scores, _ = scores_of(products, given, rows, columns, len_q, len_k, scale, softcap, low, high, MASK, LEFT,
                              RIGHT, SOFTCAP)  # fmt: skip
        most = tl.max(scores, 1)
        anchor = tl.where(most == float("-inf"), 0.0, most)
        weights = tl.exp2((scores - anchor[:, None]) * LOG2E)
        total = tl.sum(weights, 1)
        dead = total == 0.0
        keep_share = 1.0
        if DROPOUT:
            step, base = row_words(seed, offset, row * 0 + (batch * tl.num_programs(0) + head), row)
            keep = kept_pairs(step[:, None], base[:, None], 0, probability, BN, False)
            weights = tl.where(keep, weights, 0.0)
            keep_share = 1.0 - probability
        result = tl.dot(weights.to(v_tile.dtype), v_tile, input_precision="ieee")
        result *= (1.0 / tl.where(dead, 1.0, total * keep_share))[:, None]
        o_at = out + batch64 * o_b + head64 * o_h + rows * o_m + d_v
        tl.store(o_at, result.to(out.dtype.element_ty), mask=(rows < len_q) & (d_v < DV))
        if LSE:
            level = tl.where(dead, float("-inf"), anchor + tl.log2(tl.where(dead, 1.0, total)) * LN2)
            tl.store(lse + (batch64 * tl.num_programs(0) + head) * len_q + row, level, mask=row < len_q)


@triton.jit
def backward_short(q, k, v, out, lse, grad_out, grad_lse, mask, dq, dk, dv, part, q_b, q_h, q_m, k_b, k_h, k_n, v_b,
                   v_h, v_n, o_b, o_h, o_m, l_b, l_h, l_m, g_b, g_h, g_m, e_b, e_h, e_m, dq_b, dq_h, dq_m, dk_b, dk_h,
                   dk_n, dv_b, dv_h, dv_n, mask_b, mask_h, mask_m, mask_n, scale, softcap, probability, seed, offset,
                   batches, each, len_q, len_k, low, high, DQ: tl.constexpr, DV: tl.constexpr, BDQ: tl.constexpr,
                   BDV: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, MASK: tl.constexpr, MASK_ROWS: tl.constexpr,
                   MASK_KEYS: tl.constexpr, OF_BATCH: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr,
                   SOFTCAP: tl.constexpr, DROPOUT: tl.constexpr, GRAD_LSE: tl.constexpr, OF_MASK: tl.constexpr,
                   STAGES: tl.constexpr):  # fmt: skip
    """Gradients of all operands of one head and of `each` batch entries. Grid, strides and mask as in `attend_short`.

    OF_MASK: the gradient of a mask that runs over heads, rows and keys, and not over the batch: the sum over this
    program's entries goes to part, float32 [groups, heads, len_q, len_k], for `sum_parts`. lse: natural.
    """
    head = tl.program_id(0)
    head64 = head.to(tl.int64)
    rows, columns = tl.arange(0, BM)[:, None], tl.arange(0, BN)[None, :]
    keys, d_q, d_v = tl.arange(0, BN)[:, None], tl.arange(0, BDQ)[None, :], tl.arange(0, BDV)[None, :]
    row = tl.arange(0, BM)
    mask_at = mask
    if MASK > 0:
        mask_at = mask + head64 * mask_h
    given = tl.zeros([BM, BN], tl.float32)
    if MASK > 0 and not OF_BATCH:
        given = mask_tile(mask_at, rows, columns, mask_m, mask_n, len_q, len_k, MASK_ROWS, MASK_KEYS, False, False)
    sums = tl.zeros([BM, BN], tl.float32)
    first = tl.program_id(1) * each
    for batch in tl.range(first, tl.minimum(first + each, batches), num_stages=STAGES):
        batch64 = tl.zeros([], tl.int64) + batch
        q_tile = tile_at(q + batch64 * q_b + head64 * q_h, rows, d_q, q_m, rows < len_q, d_q < DQ)
        k_tile = tile_at(k + batch64 * k_b + head64 * k_h, keys, d_q, k_n, keys < len_k, d_q < DQ)
        v_tile = tile_at(v + batch64 * v_b + head64 * v_h, keys, d_v, v_n, keys < len_k, d_v < DV)
        o_tile = tile_at(out + batch64 * o_b + head64 * o_h, rows, d_v, o_m, rows < len_q, d_v < DV)
        g_tile = tile_at(grad_out + batch64 * g_b + head64 * g_h, rows, d_v, g_m, rows < len_q, d_v < DV)
        if MASK > 0 and OF_BATCH:
            at = mask_at + batch64 * mask_b
            given = mask_tile(at, rows, columns, mask_m, mask_n, len_q, len_k, MASK_ROWS, MASK_KEYS, False, False)
        delta = tl.sum(o_tile.to(tl.float32) * g_tile.to(tl.float32), 1)
        if GRAD_LSE:
            delta -= tl.load(grad_lse + batch64 * e_b + head64 * e_h + row * e_m, mask=row < len_q, other=0.0)
        products = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee")
        scores, bent = scores_of(products, given, rows, columns, len_q, len_k, scale, softcap, low, high, MASK, LEFT,
                                 RIGHT, SOFTCAP)  # fmt: skip
        level = tl.load(lse + batch64 * l_b + head64 * l_h + row * l_m, mask=row < len_q, other=float("-inf"))
        dead = level == float("-inf")
        weights = tl.exp2((scores - tl.where(dead, float("inf"), level)[:, None]) * LOG2E)
        if MASK == 2:  # a log-sum-exp may be too large to hold the logarithm of a count, see `normalise`
            total = tl.sum(weights, 1)
            weights *= tl.where((tl.abs(level) > LARGE_LSE) & (total > 0.0), 1.0 / total, 1.0)[:, None]
        used = weights
        grad = tl.dot(g_tile, tl.trans(v_tile), input_precision="ieee")
        if DROPOUT:
            step, base = row_words(seed, offset, row * 0 + (batch * tl.num_programs(0) + head), row)
            keep = kept_pairs(step[:, None], base[:, None], 0, probability, BN, False)
            used = tl.where(keep, weights * (1.0 / (1.0 - probability)), 0.0)
            grad = tl.where(keep, grad * (1.0 / (1.0 - probability)), 0.0)
        grad = tl.where(dead[:, None], 0.0, weights * (grad - delta[:, None]))
        if OF_MASK:
            sums += grad
        if SOFTCAP:
            grad *= 1.0 - bent * bent
        of_value = tl.dot(tl.trans(used.to(g_tile.dtype)), g_tile, input_precision="ieee")
        at_v = dv + batch64 * dv_b + head64 * dv_h + keys * dv_n + d_v
        tl.store(at_v, of_value.to(dv.dtype.element_ty), mask=(keys < len_k) & (d_v < DV))
        grad16 = (grad * scale).to(q_tile.dtype)
        of_key = tl.dot(tl.trans(grad16), q_tile, input_precision="ieee")
        at_k = dk + batch64 * dk_b + head64 * dk_h + keys * dk_n + d_q
        tl.store(at_k, of_key.to(dk.dtype.element_ty), mask=(keys < len_k) & (d_q < DQ))
        of_query = tl.dot(grad16, k_tile, input_precision="ieee")
        at_q = dq + batch64 * dq_b + head64 * dq_h + rows * dq_m + d_q
        tl.store(at_q, of_query.to(dq.dtype.element_ty), mask=(rows < len_q) & (d_q < DQ))
    if OF_MASK:
        at = part + (tl.program_id(1).to(tl.int64) * tl.num_programs(0) + head) * len_q * len_k
        tl.store(at + rows * len_k + columns, sums, mask=(rows < len_q) & (columns < len_k))
