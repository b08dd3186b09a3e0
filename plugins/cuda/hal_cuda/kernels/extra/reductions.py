# ruff: noqa: N803
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
"""Sums and maxima in Triton."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...runtime import binaries
from ...runtime.launch import launcher
from .checks import TYPES, aligned, chip_of
from .forms import pieces_of, reduce

#: Numbers that a program reads in one step, of rows and of columns.
ROW_STEP, COLUMN_STEP = 4096, (32, 128)
#: Numbers of all the short rows of a program: 32 of a thread, several loads in flight.
SHORT_ROWS = 8192
#: Shortest piece of a row, and fewest rows of a piece of a column, that are worth a program of their own.
LEAST_ROW, LEAST_COLUMN = 1 << 14, 64
ALL = tl.constexpr(tl.PropagateNan.ALL)


@triton.jit
def larger(a, b):
    return tl.maximum(a, b, propagate_nan=ALL)


@triton.jit
def over(found, axis: tl.constexpr, MAX: tl.constexpr):
    """The sum or the maximum along an axis; NaN where one is."""
    if MAX:
        marked = tl.max((found != found).to(tl.int32), axis) != 0
        whole = tl.where(marked, float("nan"), tl.max(found, axis))
    else:
        whole = tl.sum(found, axis)
    return whole


@triton.jit
def reduce_rows(x, out, length, piece, rows, MAX: tl.constexpr, ROWS: tl.constexpr, STEP: tl.constexpr):
    """Reduce pieces of contiguous rows. Grid: (rows / ROWS, pieces). x: [rows, length]; out: [rows, pieces]."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS).to(tl.int64)
    first = tl.program_id(1).to(tl.int64) * piece
    last = tl.minimum(first + piece, length)
    neutral = float("-inf") if MAX else 0.0
    found = tl.full([ROWS, STEP], neutral, tl.float32)
    for start in range(first, last, STEP):
        at = start + tl.arange(0, STEP)
        there = (row < rows)[:, None] & (at < last)[None, :]
        some = tl.load(x + (row * length)[:, None] + at[None, :], mask=there, other=neutral).to(tl.float32)
        found = larger(found, some) if MAX else found + some
    whole = over(found, 1, MAX)
    tl.store(out + row * tl.num_programs(1) + tl.program_id(1), whole.to(out.dtype.element_ty), mask=row < rows)


@triton.jit
def reduce_columns(x, out, length, inner, blocks, piece, MAX: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Reduce pieces of the middle dimension. Grid: (outer * blocks, pieces). x: [outer, length, inner]; blocks: of
    COLUMNS in inner; out: [pieces, outer, inner].
    """
    outer, block = tl.program_id(0).to(tl.int64) // blocks, tl.program_id(0) % blocks
    first = tl.program_id(1).to(tl.int64) * piece
    last = tl.minimum(first + piece, length)
    column = block.to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    neutral = float("-inf") if MAX else 0.0
    found = tl.full([ROWS, COLUMNS], neutral, tl.float32)
    for start in range(first, last, ROWS):
        at = start + tl.arange(0, ROWS)
        there = (at < last)[:, None] & (column < inner)[None, :]
        source = x + ((outer * length + at) * inner)[:, None] + column[None, :]
        some = tl.load(source, mask=there, other=neutral).to(tl.float32)
        found = larger(found, some) if MAX else found + some
    whole = over(found, 0, MAX)
    target = (tl.program_id(1) * (tl.num_programs(0) // blocks) + outer) * inner + column
    tl.store(out + target, whole.to(out.dtype.element_ty), mask=column < inner)


def _run(source: Tensor, out: Tensor, outer: int, length: int, inner: int, *, largest: bool) -> None:
    """A `forms.Reduce` by the Triton kernels; two launches where the result is small and the rows are long."""
    chip = chip_of(source.device)
    if inner == 1:
        step = min(triton.next_power_of_2(length), ROW_STEP)
        rows = SHORT_ROWS // step if step < ROW_STEP else 1
        pieces, piece = pieces_of(-(-outer // rows), length, LEAST_ROW, chip)
        made = out if pieces == 1 else out.new_empty((outer, pieces), dtype=torch.float32)
        even = length % 8 == 0 and piece % 8 == 0 and aligned(source)
        types = {"x": f"*{TYPES[source.dtype]}", "out": f"*{TYPES[made.dtype]}"} | dict.fromkeys(
            ("length", "piece", "rows"), "i64"
        )
        constants = {"MAX": largest, "ROWS": rows, "STEP": step}
        divisible = {"x": 16, "length": 8, "piece": 8} if even else {}
        launch = launcher(chip, reduce_rows, types, constants, num_warps=8, divisible=divisible)
        launch((-(-outer // rows), pieces, 1), (source, made), [length, piece, outer])
        if pieces > 1:
            _run(made, out, outer, pieces, 1, largest=largest)
        return
    blocks = -(-inner // COLUMN_STEP[1])
    pieces, piece = pieces_of(outer * blocks, length, LEAST_COLUMN, chip)
    made = out if pieces == 1 else out.new_empty((pieces, outer, inner), dtype=torch.float32)
    even = inner % 8 == 0 and aligned(source)
    types = {"x": f"*{TYPES[source.dtype]}", "out": f"*{TYPES[made.dtype]}"} | dict.fromkeys(
        ("length", "inner", "blocks", "piece"), "i64"
    )
    constants = {"MAX": largest, "ROWS": COLUMN_STEP[0], "COLUMNS": COLUMN_STEP[1]}
    divisible = {"x": 16, "inner": 8} if even else {}
    launch = launcher(chip, reduce_columns, types, constants, num_warps=8, divisible=divisible)
    launch((outer * blocks, pieces, 1), (source, made), [length, inner, blocks, piece])
    if pieces > 1:
        _run(made, out, 1, pieces, outer * inner, largest=largest)


def _on_device(form: tuple[Tensor, Tensor, int, int, int], *, largest: bool) -> None:
    with torch.cuda.device_of(form[0]):
        _run(*form, largest=largest)


def triton_reduce_sum(input: Tensor, dim: int | None = -1) -> Tensor:
    """`hal_cuda.kernels.reduce_sum` in Triton."""
    return reduce("triton_reduce_sum", input, dim, binaries.INTERPRETED, lambda *form: _on_device(form, largest=False))


def triton_reduce_max(input: Tensor, dim: int | None = None) -> Tensor:
    """`hal_cuda.kernels.reduce_max` in Triton."""
    return reduce("triton_reduce_max", input, dim, binaries.INTERPRETED, lambda *form: _on_device(form, largest=True))
