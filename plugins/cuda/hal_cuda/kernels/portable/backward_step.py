# ruff: noqa: N803
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
"""What the backward kernels share: one sequence's place, the tiles of a walk, the weights and gradients of its pairs.

Weights are recomputed from the row's log-sum-exp (Dao et al. 2022, FlashAttention, algorithm 4). `numbers`, written by
`prepare` and `normalise`, hold float32 [2 to 5, rows of all heads]: delta, the log-sum-exp in the units of the scores
with +inf for a fully masked row; under an additive mask the reciprocal of the weights' sum, as a base-2
logarithm; and of dense rows with
dropout the two words of `dropout.row_words`, bit for bit.
"""

import triton
import triton.language as tl

from .attend import within
from .mask_tiles import mask_tile
from .merge import LOG2E


@triton.jit
def sequence(cu_q, cu_k, batch, len_q, len_k, all_q, all_k, PACKED: tl.constexpr):
    """(first query, first key, queries, keys, batch entry of the tensors) of a batch entry or packed sequence."""
    q_start, k_start = tl.zeros([], tl.int64), tl.zeros([], tl.int64)
    entry = batch.to(tl.int64)
    if PACKED:
        first_q, first_k = within(cu_q + batch, 0, all_q), within(cu_k + batch, 0, all_k)
        len_q = within(cu_q + batch + 1, first_q, all_q) - first_q
        len_k = within(cu_k + batch + 1, first_k, all_k) - first_k
        q_start, k_start = first_q.to(tl.int64), first_k.to(tl.int64)
        entry = tl.zeros([], tl.int64)
    return q_start, k_start, len_q, len_k, entry


@triton.jit
def band(diagonal, len_q, len_k, left, right, BOTTOM: tl.constexpr):
    """(low, high): row i reads keys i + low to i + high, where there are such bounds."""
    shift = diagonal
    if BOTTOM:
        shift = diagonal + len_k - len_q
    return shift - left, shift + right


@triton.jit
def loaded(at, there, inside, BOUNDED: tl.constexpr, NARROW: tl.constexpr):
    """A tile of an operand. there: which tokens exist, asked where BOUNDED; inside: which columns do, where NARROW."""
    if BOUNDED and NARROW:
        tile = tl.load(at, mask=there & inside, other=0.0)
    elif BOUNDED:
        tile = tl.load(at, mask=there, other=0.0)
    elif NARROW:
        tile = tl.load(at, mask=inside, other=0.0)
    else:
        tile = tl.load(at)
    return tile


@triton.jit
def block_of_step(lists, step, steps_in_block, block, end, TILE: tl.constexpr, PLAN: tl.constexpr):
    """(first token, end of the tokens) of a step of a walk: over all tiles, or over the blocks that `lists` names."""
    start = step * TILE
    if PLAN:
        number = tl.maximum(tl.load(lists + step // steps_in_block), 0)
        start = number * block + (step % steps_in_block) * TILE
        end = tl.minimum((number + 1) * block, end)
    return start, end


@triton.jit
def weights(
    products,
    rows,
    columns,
    end_q,
    end_k,
    row_lse,
    share,
    mask_at,
    mask_m,
    mask_n,
    factor,
    softcap,
    low,
    high,
    MASK: tl.constexpr,
    MASK_ROWS: tl.constexpr,
    MASK_KEYS: tl.constexpr,
    LEFT: tl.constexpr,
    RIGHT: tl.constexpr,
    SOFTCAP: tl.constexpr,
    EVEN_Q: tl.constexpr,
    EVEN_K: tl.constexpr,
    EDGE: tl.constexpr,
):
    """(weights, tanh under a softcap) of a block of products of queries and keys.

    rows, columns: places in the sequence, int32, row_lse and, under an additive mask, share: as `numbers` hold
    them; blocks that broadcast to the
    products. mask_at: the mask's element of row 0 and key 0. factor: the scale, times log2(e) where scores are base-2.
    MASK_ROWS, MASK_KEYS, EVEN_Q, EVEN_K: see `mask_tile`. EDGE: the block meets a diagonal, or an end of rows or keys.
    """
    scores = products * factor
    bent = scores
    if SOFTCAP:
        bent = 1.0 - 2.0 / (tl.exp2(scores * (2.0 * LOG2E / softcap)) + 1.0)
        scores = softcap * bent
    visible = columns < end_k
    if LEFT:
        visible = visible & (columns >= rows + low)
    if RIGHT:
        visible = visible & (columns <= rows + high)
    if MASK > 0:
        given = mask_tile(mask_at, rows, columns, mask_m, mask_n, end_q, end_k, MASK_ROWS, MASK_KEYS, EVEN_Q, EVEN_K)
        if MASK == 1:
            scores = tl.where(given != 0, scores, float("-inf"))
        else:
            scores += given.to(tl.float32)
    if EDGE:
        scores = tl.where(visible, scores, float("-inf"))
    if MASK == 2:  # the difference first: the lowest finite number of a mask times log2(e) would be -inf
        found = tl.exp2((scores - row_lse) * LOG2E + share)
    elif SOFTCAP:
        found = tl.exp2(scores * LOG2E - row_lse)
    else:
        found = tl.exp2(scores - row_lse)
    return found, bent
