# ruff: noqa: N803
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
"""gelu(X W^T + bias) for Hopper in Gluon: bf16 and fp16, from tensor maps.

One producer warpgroup feeds tiles of X and W by the tensor memory accelerator to two consumer warpgroups, each of which
owns 64 rows of a tile of 128 rows. Programs are persistent: while a consumer applies bias and GELU to its part of a
tile, the producer loads the next one and the other consumer may still multiply.
"""

from __future__ import annotations

from typing import NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.language import PropagateNan

#: 2^P(a) is 0.5 * erfc(a / sqrt(2)) for 0 <= a <= 6: gelu is then right to 2.5e-7, and to 8e-4 of itself down to -5.
#: Minimax fit of its base-2 logarithm, lowest power first.
P0, P1, P2, P3, P4, P5, P6 = (
    gl.constexpr(c)
    for c in (
        -0.9999996423721313,
        -1.1511564254760742,
        -0.45887237787246704,
        -0.05331439897418022,
        0.00803834106773138,
        -0.000762042764108628,
        3.2895561162149534e-05,
    )
)
FAR = gl.constexpr(10.0)  # beyond it 0.5 * erfc is less than 2^-74, and the polynomial turns round at 16
ALL = gl.constexpr(PropagateNan.ALL)
INNER = gl.constexpr(-2.302208198)  # -2 * log2(e) * sqrt(2 / pi)
CUBIC = gl.constexpr(0.044715)


class Product(NamedTuple):
    """Sizes of X W^T: tiles of rows, tiles of columns, steps along K, and columns."""

    row_tiles: gl.tensor
    column_tiles: gl.tensor
    steps: gl.tensor
    columns: gl.tensor


@gluon.constexpr_function
def accumulator(columns):
    # Layout of a warpgroup's product, [64, columns].
    return gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, columns, 16])


@gluon.jit
def tile_at(t, product: Product, C: gl.constexpr):
    # (row tile, column tile) of tile t: column by column within groups of C.together row tiles.
    group = t // (C.together * product.column_tiles)
    first = group * C.together
    height = gl.minimum(product.row_tiles - first, C.together)
    inside = t % (C.together * product.column_tiles)
    return first + inside % height, inside // height


@gluon.jit
def producer(xd, wd, x_s, w_s, full, empty, product: Product, C: gl.constexpr):
    ST: gl.constexpr = C.stages
    loaded = 0
    for t in range(gl.program_id(0), product.row_tiles * product.column_tiles, gl.num_programs(0)):
        row, column = tile_at(t, product, C)
        for k in range(product.steps):
            stage = loaded % ST
            mbarrier.wait(empty.index(stage), ((loaded // ST) & 1) ^ 1)
            mbarrier.expect(full.index(stage), xd.block_type.nbytes + wd.block_type.nbytes)
            tma.async_copy_global_to_shared(
                xd, [row * (64 * C.consumers), k * C.depth], full.index(stage), x_s.index(stage)
            )
            if C.w_rows:
                tma.async_copy_global_to_shared(
                    wd, [k * C.depth, column * C.columns], full.index(stage), w_s.index(stage)
                )
            else:
                tma.async_copy_global_to_shared(
                    wd, [column * C.columns, k * C.depth], full.index(stage), w_s.index(stage)
                )
            loaded += 1


@gluon.jit
def gelu(x, C: gl.constexpr):
    if C.tanh:
        y = x / (1.0 + gl.exp2(INNER * x * (1.0 + CUBIC * x * x)))
    else:
        a = gl.minimum(gl.abs(x), FAR)
        p = P6 * a + P5
        p = p * a + P4
        p = p * a + P3
        p = p * a + P2
        p = p * a + P1
        p = p * a + P0
        y = gl.maximum(x, 0.0, propagate_nan=ALL) - a * gl.exp2(p)
    return y


@gluon.jit
def write_part(od, bias, acc, o_s, at, row, column, product: Product, C: gl.constexpr):
    # Bias and GELU of a piece of a consumer's rows, and its way to global memory. at: its place in o_s.
    WIDTH: gl.constexpr = C.columns // C.parts
    L: gl.constexpr = accumulator(C.columns // C.parts)
    acc = gl.convert_layout(acc, L, assert_trivial=True)
    if C.bias:
        columns = column + gl.arange(0, WIDTH, gl.SliceLayout(0, L))
        added = gl.load(bias + columns, mask=columns < product.columns, other=0.0).to(gl.float32)
        acc = acc + gl.expand_dims(added, 0)
    out = gelu(acc, C).to(od.dtype)
    tma.store_wait(C.buffers - 1)  # the store before has read this buffer
    o_s.index(at).store(out)
    fence_async_shared()
    tma.async_copy_shared_to_global(od, [row, column], o_s.index(at))


@gluon.jit
def halves(x):
    # The left and the right half of x, which are registers of the same threads.
    ROWS: gl.constexpr = x.shape[0]
    HALF: gl.constexpr = x.shape[1] // 2
    return gl.split(x.reshape([ROWS, 2, HALF]).permute((0, 2, 1)))


@gluon.jit
def write(od, bias, acc, o_s, row, column, product: Product, c: gl.constexpr, C: gl.constexpr):
    W: gl.constexpr = C.columns // C.parts
    B: gl.constexpr = C.buffers
    first: gl.constexpr = c * C.buffers
    if C.parts == 1:
        write_part(od, bias, acc, o_s, first, row, column, product, C)
    elif C.parts == 2:
        left, right = halves(acc)
        write_part(od, bias, left, o_s, first, row, column, product, C)
        write_part(od, bias, right, o_s, first + 1 % B, row, column + W, product, C)
    else:
        left, right = halves(acc)
        a0, a1 = halves(left)
        a2, a3 = halves(right)
        write_part(od, bias, a0, o_s, first, row, column, product, C)
        write_part(od, bias, a1, o_s, first + 1 % B, row, column + W, product, C)
        write_part(od, bias, a2, o_s, first + 2 % B, row, column + 2 * W, product, C)
        write_part(od, bias, a3, o_s, first + 3 % B, row, column + 3 * W, product, C)


@gluon.jit
def consumer(od, bias, x_s, w_s, o_s, full, empty, product: Product, c: gl.constexpr, C: gl.constexpr):
    ST: gl.constexpr = C.stages
    BN: gl.constexpr = C.columns
    L: gl.constexpr = accumulator(C.columns)
    used = 0
    for t in range(gl.program_id(0), product.row_tiles * product.column_tiles, gl.num_programs(0)):
        row, column = tile_at(t, product, C)
        acc = gl.zeros([64, BN], gl.float32, L)
        for k in range(product.steps):
            stage = used % ST
            mbarrier.wait(full.index(stage), (used // ST) & 1)
            w = w_s.index(stage)
            if not C.w_rows:
                w = w.permute((1, 0))
            acc = warpgroup_mma(x_s.index(stage).slice(c * 64, 64, dim=0), w, acc, is_async=True)
            acc = warpgroup_mma_wait(1, deps=[acc])
            # The product of the step before is done, so its stage may be loaded anew.
            mbarrier.arrive(empty.index((used + ST - 1) % ST), count=1, pred=k > 0)
            used += 1
        acc = warpgroup_mma_wait(0, deps=[acc])
        mbarrier.arrive(empty.index((used + ST - 1) % ST), count=1)
        write(od, bias, acc, o_s, row * (64 * C.consumers) + c * 64, column * C.columns, product, c, C)
    tma.store_wait(0)


@gluon.jit
def gelu_linear_hopper(xd, wd, od, bias, row_tiles, column_tiles, steps, columns, C: gl.constexpr):
    """Grid: one program a multiprocessor, or one a tile where there are fewer. C: a `gelu_config.GeluConfig`.

    Tensor maps xd [M, K] with blocks [128, depth], wd [N, K] with blocks [columns, depth] ([K, N] with [depth, columns]
    where C.w_rows), od [M, N] with blocks [64, columns / parts]. bias: [N]. steps: tiles of K.
    """
    NC: gl.constexpr = C.consumers
    ST: gl.constexpr = C.stages
    x_s = gl.allocate_shared_memory(xd.dtype, [ST, 64 * NC, C.depth], xd.layout)
    if C.w_rows:
        w_s = gl.allocate_shared_memory(wd.dtype, [ST, C.depth, C.columns], wd.layout)
    else:
        w_s = gl.allocate_shared_memory(wd.dtype, [ST, C.columns, C.depth], wd.layout)
    o_s = gl.allocate_shared_memory(od.dtype, [NC * C.buffers, 64, C.columns // C.parts], od.layout)
    full = gl.allocate_shared_memory(gl.int64, [ST, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [ST, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(ST):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=NC)
    fence_async_shared()
    product = Product(row_tiles, column_tiles, steps, columns)
    gl.warp_specialize(
        [
            (producer, (xd, wd, x_s, w_s, full, empty, product, C)),
            (consumer, (od, bias, x_s, w_s, o_s, full, empty, product, gl.constexpr(0), C)),
            (consumer, (od, bias, x_s, w_s, o_s, full, empty, product, gl.constexpr(1), C)),
        ],
        [4, 4],
        [240, 240],
    )
