# ruff: noqa: N803
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
"""Reads begun before anything waits for them."""

import triton
import triton.language as tl

LINE = tl.constexpr(128)  # bytes of a line of the second-level cache


@triton.jit
def prefetched(base, stride, first, end, WIDTH: tl.constexpr, ROWS: tl.constexpr):
    """Ask for rows first to first + ROWS, those before `end`, of WIDTH elements, in the second-level cache."""
    SIZE: tl.constexpr = base.dtype.element_ty.primitive_bitwidth // 8
    LINES: tl.constexpr = triton.next_power_of_2((WIDTH * SIZE + LINE - 1) // LINE)
    places = tl.arange(0, ROWS * LINES)
    rows = first + places // LINES
    at = base + rows.to(tl.int64) * stride + places % LINES * (LINE // SIZE)
    tl.inline_asm_elementwise(
        "{ .reg .pred p; setp.ne.s32 p, $2, 0; @p prefetch.global.L2 [$1]; mov.u32 $0, 0; }",
        "=r,l,r",
        [at.to(tl.int64), (rows < end).to(tl.int32)],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )
