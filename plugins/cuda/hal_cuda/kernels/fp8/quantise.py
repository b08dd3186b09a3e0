# ruff: noqa: N803
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
"""Query, key and value to e4m3 with their scales, in plain Triton: each tensor is read once where scales are per block.

A tile is `BLOCK` tokens of a head. What the kernels of this file write, `forward_fp8` reads; the conventions are in the
package's docstring.
"""

import triton
import triton.language as tl

BLOCK = tl.constexpr(128)
LARGEST = tl.constexpr(448.0)  # of e4m3
LEAST = tl.constexpr(2.0**-120)  # scale


@triton.jit
def token_tile(x, head, tokens, length, x_b, x_h, x_m, heads, D: tl.constexpr, DP: tl.constexpr):
    # Tokens of a head, counted over the batch, float32 [BLOCK, DP]; zeros behind the last token and column.
    base = x + (head // heads).to(tl.int64) * x_b + (head % heads).to(tl.int64) * x_h
    columns = tl.arange(0, DP)
    there = (tokens < length)[:, None]
    if D < DP:
        there = there & (columns < D)[None, :]
    return tl.load(base + tokens.to(tl.int64)[:, None] * x_m + columns[None, :], mask=there, other=0.0).to(tl.float32)


@triton.jit
def scale_of_largest(largest):
    # 1 where all is zero; NaN and inf stay, so that they reach the result. Reciprocals must be finite.
    return tl.where(largest == 0.0, 1.0, tl.maximum(largest * (1.0 / LARGEST), LEAST))


@triton.jit
def scale_of_tile(tile, head, block, blocks, maxima, scales, PER_BLOCK: tl.constexpr):
    # The tile's scale, written where its readers look for it. maxima: largest magnitudes of the head's tiles.
    if PER_BLOCK:
        scale = scale_of_largest(tl.max(tl.max(tl.abs(tile), 1), 0))
        tl.store(scales + head * blocks + block, scale)
    else:
        largest = tl.zeros([BLOCK], tl.float32)
        for first in range(0, blocks, BLOCK):
            at = first + tl.arange(0, BLOCK)
            largest = tl.maximum(largest, tl.load(maxima + head * blocks + at, mask=at < blocks, other=0.0))
        scale = scale_of_largest(tl.max(largest, 0))
        tl.store(scales + head, scale, mask=block == 0)
    return scale


@triton.jit
def rows_tile(
    x,
    out,
    scales,
    maxima,
    mean,
    dots,
    head,
    block,
    x_b,
    x_h,
    x_m,
    heads,
    length,
    blocks,
    group,
    scale_of_scores,
    D: tl.constexpr,
    DP: tl.constexpr,
    PER_BLOCK: tl.constexpr,
    CENTRED: tl.constexpr,
    DOTS: tl.constexpr,
):
    # A tile of a query or key: see `quantise_rows`.
    tokens, columns = block * BLOCK + tl.arange(0, BLOCK), tl.arange(0, DP)
    tile = token_tile(x, head, tokens, length, x_b, x_h, x_m, heads, D, DP)
    if DOTS:
        centre = tl.load(mean + head // group * DP + columns)
        product = tl.sum(tile * centre[None, :], 1) * scale_of_scores
        tl.store(dots + head.to(tl.int64) * length + tokens, product, mask=tokens < length)
    if CENTRED:
        centre = tl.load(mean + head * DP + columns)
        tile = tl.where((tokens < length)[:, None], tile - centre[None, :], 0.0)
    scale = scale_of_tile(tile, head, block, blocks, maxima, scales, PER_BLOCK)
    at = (head.to(tl.int64) * length + tokens)[:, None] * DP + columns[None, :]
    tl.store(out + at, (tile * (1.0 / scale)).to(tl.float8e4nv), mask=(tokens < length)[:, None])


@triton.jit
def values_tile(
    x,
    out,
    scales,
    maxima,
    head,
    block,
    x_b,
    x_h,
    x_m,
    heads,
    length,
    blocks,
    D: tl.constexpr,
    DP: tl.constexpr,
    PER_BLOCK: tl.constexpr,
):
    # A tile of a value: see `quantise_values`.
    place, columns = tl.arange(0, BLOCK), tl.arange(0, DP)
    tokens = block * BLOCK + place // 16 * 16 + place % 4 // 2 * 8 + place % 16 // 4 * 2 + place % 2
    tile = token_tile(x, head, tokens, length, x_b, x_h, x_m, heads, D, DP)
    scale = scale_of_tile(tile, head, block, blocks, maxima, scales, PER_BLOCK)
    at = ((head * blocks + block).to(tl.int64) * DP + columns)[:, None] * BLOCK + place[None, :]
    tl.store(out + at, tl.trans((tile * (1.0 / scale)).to(tl.float8e4nv)))


@triton.jit
def quantise_rows(
    x,
    out,
    scales,
    maxima,
    mean,
    dots,
    x_b,
    x_h,
    x_m,
    heads,
    length,
    blocks,
    group,
    scale_of_scores,
    D: tl.constexpr,
    DP: tl.constexpr,
    PER_BLOCK: tl.constexpr,
    CENTRED: tl.constexpr,
    DOTS: tl.constexpr,
):
    """Query or key to e4m3. Grid: (blocks, batch * heads).

    x: [batch, heads, length, D] with strides x_b, x_h, x_m, 1. out: e4m3 [batch, heads, length, DP]; columns from D on
    are written as zeros. scales: float32 [batch, heads, blocks], or [batch, heads] from `maxima`, float32 [batch,
    heads, blocks] (see `tile_maxima`). CENTRED: mean, float32 [batch, heads, DP], is subtracted. DOTS, of a query:
    dots, float32 [batch, heads, length], gets scale_of_scores times each row's product with the mean of its key head,
    one for `group` heads of x.
    """
    rows_tile(
        x,
        out,
        scales,
        maxima,
        mean,
        dots,
        tl.program_id(1),
        tl.program_id(0),
        x_b,
        x_h,
        x_m,
        heads,
        length,
        blocks,
        group,
        scale_of_scores,
        D,
        DP,
        PER_BLOCK,
        CENTRED,
        DOTS,
    )


@triton.jit
def quantise_values(
    x,
    out,
    scales,
    maxima,
    x_b,
    x_h,
    x_m,
    heads,
    length,
    blocks,
    D: tl.constexpr,
    DP: tl.constexpr,
    PER_BLOCK: tl.constexpr,
):
    """Value to e4m3, transposed by tiles, in the order in which weights lie in registers. Grid: (blocks, batch *
    heads).

    x: [batch, heads, length, D] with strides x_b, x_h, x_m, 1. out: e4m3 [batch, heads, blocks, DP, BLOCK]: of a tile,
    element 16 a + 4 c + 2 j + e of a column is that of token 16 a + 8 j + 2 c + e (see `layouts`); zeros behind the
    last token and column. scales, maxima: as for `quantise_rows`.
    """
    head, block = tl.program_id(1), tl.program_id(0)
    values_tile(x, out, scales, maxima, head, block, x_b, x_h, x_m, heads, length, blocks, D, DP, PER_BLOCK)


@triton.jit
def quantise_all(
    q,
    k,
    v,
    q8,
    k8,
    v8,
    q_scales,
    k_scales,
    v_scales,
    q_b,
    q_h,
    q_m,
    k_b,
    k_h,
    k_m,
    v_b,
    v_h,
    v_m,
    q_heads,
    k_heads,
    len_q,
    len_k,
    q_programs,
    k_programs,
    D: tl.constexpr,
    DP: tl.constexpr,
    DV: tl.constexpr,
    DVP: tl.constexpr,
):
    """Query, key and value in one launch, with scales per block: as `quantise_rows` and `quantise_values` would.

    Grid: (q_programs + 2 * k_programs,), programs of the query first, a program for each block of each head.
    """
    pid = tl.program_id(0)
    blocks_q, blocks = (len_q + BLOCK - 1) // BLOCK, (len_k + BLOCK - 1) // BLOCK
    if pid < q_programs:
        at, to = pid // blocks_q, pid % blocks_q
        rows_tile(
            q,
            q8,
            q_scales,
            q_scales,
            q_scales,
            q_scales,
            at,
            to,
            q_b,
            q_h,
            q_m,
            q_heads,
            len_q,
            blocks_q,
            1,
            1.0,
            D,
            DP,
            True,
            False,
            False,
        )
    elif pid < q_programs + k_programs:
        at, to = (pid - q_programs) // blocks, (pid - q_programs) % blocks
        rows_tile(
            k,
            k8,
            k_scales,
            k_scales,
            k_scales,
            k_scales,
            at,
            to,
            k_b,
            k_h,
            k_m,
            k_heads,
            len_k,
            blocks,
            1,
            1.0,
            D,
            DP,
            True,
            False,
            False,
        )
    else:
        at, to = (pid - q_programs - k_programs) // blocks, (pid - q_programs - k_programs) % blocks
        values_tile(v, v8, v_scales, v_scales, at, to, v_b, v_h, v_m, k_heads, len_k, blocks, DV, DVP, True)


@triton.jit
def tile_maxima(
    x, maxima, mean, x_b, x_h, x_m, heads, length, blocks, D: tl.constexpr, DP: tl.constexpr, CENTRED: tl.constexpr
):
    """Largest magnitude of each tile, for scales per head: float32 [batch, heads, blocks]. Grid: (blocks, batch *
    heads).
    """
    head, block = tl.program_id(1), tl.program_id(0)
    tokens = block * BLOCK + tl.arange(0, BLOCK)
    tile = token_tile(x, head, tokens, length, x_b, x_h, x_m, heads, D, DP)
    if CENTRED:
        centre = tl.load(mean + head * DP + tl.arange(0, DP))
        tile = tl.where((tokens < length)[:, None], tile - centre[None, :], 0.0)
    tl.store(maxima + head * blocks + block, tl.max(tl.max(tl.abs(tile), 1), 0))


@triton.jit
def tile_sums(x, sums, x_b, x_h, x_m, heads, length, chunks, D: tl.constexpr, DP: tl.constexpr, TILES: tl.constexpr):
    """Sum over the tokens of TILES tiles: float32 [batch, heads, chunks, DP]. Grid: (chunks, batch * heads)."""
    head, chunk = tl.program_id(1), tl.program_id(0)
    total = tl.zeros([DP], tl.float32)
    for i in range(TILES):
        tokens = (chunk * TILES + i) * BLOCK + tl.arange(0, BLOCK)
        total += tl.sum(token_tile(x, head, tokens, length, x_b, x_h, x_m, heads, D, DP), 0)
    tl.store(sums + (head * chunks + chunk).to(tl.int64) * DP + tl.arange(0, DP), total)


@triton.jit
def mean_of_sums(sums, mean, length, chunks, DP: tl.constexpr):
    """The mean over the tokens of a head from `tile_sums`: float32 [batch, heads, DP]. Grid: (1, batch * heads)."""
    head, columns = tl.program_id(1), tl.arange(0, DP)
    total = tl.zeros([DP], tl.float32)
    for chunk in range(chunks):
        total += tl.load(sums + (head * chunks + chunk).to(tl.int64) * DP + columns)
    tl.store(mean + head * DP + columns, total / length)
