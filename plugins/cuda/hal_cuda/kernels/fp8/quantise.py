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
def token_tile(x, tokens, length, x_b, x_h, x_m, heads, D: tl.constexpr, DP: tl.constexpr):
    # Tokens of the head of program axis 1, float32 [BLOCK, DP]; zeros behind the last token and column.
    head = tl.program_id(1)
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
def scale_of_tile(tile, blocks, maxima, scales, PER_BLOCK: tl.constexpr):
    # The tile's scale, written where its readers look for it. maxima: largest magnitudes of the head's tiles.
    head, block = tl.program_id(1), tl.program_id(0)
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
    head, tokens, columns = tl.program_id(1), tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.arange(0, DP)
    tile = token_tile(x, tokens, length, x_b, x_h, x_m, heads, D, DP)
    if DOTS:
        centre = tl.load(mean + head // group * DP + columns)
        product = tl.sum(tile * centre[None, :], 1) * scale_of_scores
        tl.store(dots + head.to(tl.int64) * length + tokens, product, mask=tokens < length)
    if CENTRED:
        centre = tl.load(mean + head * DP + columns)
        tile = tl.where((tokens < length)[:, None], tile - centre[None, :], 0.0)
    scale = scale_of_tile(tile, blocks, maxima, scales, PER_BLOCK)
    at = (head.to(tl.int64) * length + tokens)[:, None] * DP + columns[None, :]
    tl.store(out + at, (tile * (1.0 / scale)).to(tl.float8e4nv), mask=(tokens < length)[:, None])


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
    place, columns = tl.arange(0, BLOCK), tl.arange(0, DP)
    tokens = block * BLOCK + place // 16 * 16 + place % 4 // 2 * 8 + place % 16 // 4 * 2 + place % 2
    tile = token_tile(x, tokens, length, x_b, x_h, x_m, heads, D, DP)
    scale = scale_of_tile(tile, blocks, maxima, scales, PER_BLOCK)
    at = ((head * blocks + block).to(tl.int64) * DP + columns)[:, None] * BLOCK + place[None, :]
    tl.store(out + at, tl.trans((tile * (1.0 / scale)).to(tl.float8e4nv)))


@triton.jit
def tile_maxima(
    x, maxima, mean, x_b, x_h, x_m, heads, length, blocks, D: tl.constexpr, DP: tl.constexpr, CENTRED: tl.constexpr
):
    """Largest magnitude of each tile, for scales per head: float32 [batch, heads, blocks]. Grid: (blocks, batch *
    heads).
    """
    head, block = tl.program_id(1), tl.program_id(0)
    tokens = block * BLOCK + tl.arange(0, BLOCK)
    tile = token_tile(x, tokens, length, x_b, x_h, x_m, heads, D, DP)
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
        total += tl.sum(token_tile(x, tokens, length, x_b, x_h, x_m, heads, D, DP), 0)
    tl.store(sums + (head * chunks + chunk).to(tl.int64) * DP + tl.arange(0, DP), total)


@triton.jit
def mean_of_sums(sums, mean, length, chunks, DP: tl.constexpr):
    """The mean over the tokens of a head from `tile_sums`: float32 [batch, heads, DP]. Grid: (1, batch * heads)."""
    head, columns = tl.program_id(1), tl.arange(0, DP)
    total = tl.zeros([DP], tl.float32)
    for chunk in range(chunks):
        total += tl.load(sums + (head * chunks + chunk).to(tl.int64) * DP + columns)
    tl.store(mean + head * DP + columns, total / length)
