# ruff: noqa: N803, E741
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
"""Which thread of a warpgroup holds which elements of a tile, and weights in FP8 as the second product reads them.

A thread holds of a row, in 16 keys of the first product's result, keys 2 c, 2 c + 1, 8 + 2 c and 9 + 2 c, where c is
its place among the four threads of the row. As left side of the second product it holds elements 4 c to 4 c + 3. So
nothing moves between threads where element 4 c + 2 j + e of 16 stands for key 8 j + 2 c + e, in the weights and in the
values, which are quantised in that order (see `quantise_values`).
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

# Four floats to four e4m3 in a word; cvt's first source is the upper half.
TO_FP8 = gl.constexpr(
    "{ .reg .b16 a, b; cvt.rn.satfinite.e4m3x2.f32 a, $2, $1; cvt.rn.satfinite.e4m3x2.f32 b, $4, $3; "
    "mov.b32 $0, {a, b}; }"
)
# Copies its operands. The barrier is never reached, as sums of weights are never negative; but ptxas may not move the
# wait for a product above it, so what the operands depend on is computed beside the product.
BESIDE = gl.constexpr(
    "{ .reg .pred q; .reg .f32 s, t; add.f32 s, $4, $5; add.f32 t, $6, $7; add.f32 s, s, t; "
    "setp.lt.f32 q, s, 0f00000000; @q bar.arrive 15, 128; "
    "mov.b32 $0, $4; mov.b32 $1, $5; mov.b32 $2, $6; mov.b32 $3, $7; }"
)


@gluon.constexpr_function
def accumulator(columns):
    # Layout of a product's result, [64, columns].
    return gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, columns, 32])


@gluon.constexpr_function
def left_side(parent):
    # Layout of a product's left side where it comes from registers.
    return gl.DotOperandLayout(operand_index=0, parent=parent, k_width=4)


@gluon.constexpr_function
def row_sums(keys):
    # Layout of what `sums` gives.
    part = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 8, 32])
    return part if keys > 64 else gl.SliceLayout(1, accumulator(keys))


@gluon.jit
def narrow(p, BM: gl.constexpr, BN: gl.constexpr):
    # Weights in e4m3, four in a whole number, [BM, BN // 16, 4].
    p = gl.permute(p.reshape([BM, BN // 16, 2, 4, 2]), (0, 1, 3, 2, 4))
    first, second = gl.split(p)
    low, next_low = gl.split(first)
    high, next_high = gl.split(second)
    return gl.inline_asm_elementwise(
        TO_FP8, "=r,r,r,r,r", [low, high, next_low, next_high], dtype=gl.int32, is_pure=True, pack=1
    )


@gluon.jit
def operand(w, BM: gl.constexpr, BN: gl.constexpr, PL: gl.constexpr):
    # The left side of P V from what `narrow` gave.
    first = gl.join(w.to(gl.int8), (w >> 16).to(gl.int8))
    second = gl.join((w >> 8).to(gl.int8), (w >> 24).to(gl.int8))
    p = gl.join(first, second).reshape([BM, BN]).to(gl.float8e4nv, bitcast=True)
    return gl.convert_layout(p, PL, assert_trivial=True)


@gluon.jit
def beside(l, WIDE: gl.constexpr):
    # The sums of weights as they are, once they are there: see `BESIDE`.
    if WIDE:
        l = gl.inline_asm_elementwise(BESIDE, "=f,=f,=f,=f,f,f,f,f", [l], dtype=gl.float32, is_pure=False, pack=4)
    return l
