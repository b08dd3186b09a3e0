# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
"""Which thread of a warpgroup holds which elements of a tile."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.constexpr_function
def accumulator(columns):
    # Layout of a product's result, [64, columns]; of a part that is not there, one that is never used.
    return gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, columns or 16, 16])


@gluon.constexpr_function
def row_sums(keys):
    # Layout of what `sums` gives.
    scores = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, keys, 16])
    part = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 8, 16])
    return part if keys > 64 else gl.SliceLayout(1, scores)


@gluon.constexpr_function
def left_side(parent):
    # Layout of a product's left side where it comes from registers.
    return gl.DotOperandLayout(operand_index=0, parent=parent, k_width=2)
