# ruff: noqa: N803
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
"""Scores of blocks for plans that are made from queries and keys: pooled rows, and shares from scores of squares."""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...discovery import Chip
from ...runtime import binaries
from ...runtime.launch import Launcher, launcher
from .checks import TYPES, check_tensors, chip_of, refuse, shapes

#: Numbers that a program of `pool` reads at a time, without and with extremes, and one of `square_sums`.
POOLED, EXTREME, SCORED = 8192, 4096, 1 << 14
#: Forms of calls that are kept, of each kernel.
MOST_KEPT = 256
LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def pool(
    x,
    out,
    x_b,
    x_h,
    x_n,
    heads,
    length,
    size,
    blocks,
    dim,
    scale,
    EXTREMES: tl.constexpr,
    GROUPS: tl.constexpr,
    ROWS: tl.constexpr,
    DIM: tl.constexpr,
):
    """out[block] = scale * mean of the block's rows; with EXTREMES mean, maximum and minimum beside one another.

    Grid: (blocks / GROUPS, batch entries * heads). x: [batch, heads, length, dim], dim contiguous; out: contiguous
    [batch, heads, blocks, dim or 3 dim]. ROWS rows of a block are read at a time.
    """
    entry = tl.program_id(1).to(tl.int64)
    block = tl.program_id(0) * GROUPS + tl.arange(0, GROUPS)
    lane, column = tl.arange(0, ROWS), tl.arange(0, DIM)
    source = x + (entry // heads) * x_b + (entry % heads) * x_h
    last = tl.minimum((block + 1) * size, length)
    sums = tl.zeros([GROUPS, ROWS, DIM], tl.float32)
    most, least = sums + float("-inf"), sums + float("inf")
    for start in range(0, size, ROWS):
        row = block[:, None] * size + (start + lane)[None, :]
        there = ((row < last[:, None]) & ((start + lane) < size)[None, :])[:, :, None] & (column < dim)[None, None, :]
        at = row.to(tl.int64)[:, :, None] * x_n + column[None, None, :]
        given = tl.load(source + at, mask=there, other=0.0).to(tl.float32)
        sums += given
        if EXTREMES:
            most = tl.maximum(most, tl.where(there, given, float("-inf")))
            least = tl.minimum(least, tl.where(there, given, float("inf")))
    many = tl.maximum(last - block * size, 1).to(tl.float32)
    kept = (block < blocks)[:, None] & (column < dim)[None, :]
    wide = dim * 3 if EXTREMES else dim
    target = out + (entry * blocks + block)[:, None] * wide + column[None, :]
    tl.store(target, (tl.sum(sums, 1) / many[:, None] * scale).to(out.dtype.element_ty), mask=kept)
    if EXTREMES:
        tl.store(target + dim, tl.max(most, 1).to(out.dtype.element_ty), mask=kept)
        tl.store(target + 2 * dim, tl.min(least, 1).to(out.dtype.element_ty), mask=kept)


@triton.jit
def squares(
    scores,
    row,
    start,
    rows,
    columns,
    per_row,
    per_column,
    stride,
    low,
    high,
    first,
    scale,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    GROUPS: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Scores in base 2 of the squares of GROUPS blocks of keys, -inf where there is none: [rows, GROUPS, WIDE]."""
    lane = tl.arange(0, WIDE)
    column = (start + tl.arange(0, GROUPS))[:, None] * per_column + lane[None, :]
    there = ((column < columns) & (lane < per_column)[None, :])[None, :, :] & (row < rows)[:, None, None]
    place, position = ((row + first) * stride)[:, None, None], (column * stride)[None, :, :]
    # Blocks that are hidden whole are not read: with causal half of all. Asked by block, so that a load stays wide.
    begin = ((start + tl.arange(0, GROUPS)) * per_column * stride)[None, :, None]
    if HIGH:
        there = there & (begin <= place + stride - 1 + high)
    if LOW:
        there = there & (begin + per_column * stride - 1 >= place + low)
    at = row.to(tl.int64)[:, None, None] * columns + column[None, :, :]
    found = tl.load(scores + at, mask=there, other=float("-inf")).to(tl.float32) * (scale * LOG2E)
    if HIGH:
        found = tl.where(position > place + stride - 1 + high, float("-inf"), found)
    if LOW:
        found = tl.where(position + stride - 1 < place + low, float("-inf"), found)
    return tl.where(there, found, float("-inf"))


@triton.jit
def square_sums(
    scores,
    out,
    rows,
    columns,
    per_row,
    per_column,
    blocks_q,
    blocks_k,
    stride,
    low,
    high,
    first,
    scale,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    ROWS: tl.constexpr,
    GROUPS: tl.constexpr,
    WIDE: tl.constexpr,
    ONE: tl.constexpr,
):
    """Softmax of each row of scores, summed over the columns of a block and averaged over its rows.

    Grid: (blocks_q, batch entries * heads). scores: [.., rows, columns], out: float32 [.., blocks_q, blocks_k], both
    contiguous. ONE: all columns are read at once, so that they are read once.
    """
    block, entry = tl.program_id(0), tl.program_id(1).to(tl.int64)
    source = scores + entry * rows * columns
    lane = tl.arange(0, ROWS)
    row = tl.where(lane < per_row, block * per_row + lane, rows)
    most, total = tl.full([ROWS], float("-inf"), tl.float32), tl.zeros([ROWS], tl.float32)
    target = out + (entry * blocks_q + block) * blocks_k
    many = tl.maximum(tl.minimum(rows - block * per_row, per_row), 1).to(tl.float32)
    if ONE:
        found = squares(source, row, 0, rows, columns, per_row, per_column, stride, low, high, first, scale,
                        LOW, HIGH, GROUPS, WIDE)  # fmt: skip
        most = tl.max(tl.max(found, 2), 1)
        floor = tl.where(most == float("-inf"), 0.0, most)
        weight = tl.exp2(found - floor[:, None, None])
        sums = tl.sum(weight, 2)
        total = tl.sum(sums, 1)
        share = tl.sum(sums / tl.where(total == 0, 1.0, total)[:, None], 0) / many
        group = tl.arange(0, GROUPS)
        tl.store(target + group, share, mask=group < blocks_k)
    else:
        for start in range(0, blocks_k, GROUPS):
            found = squares(source, row, start, rows, columns, per_row, per_column, stride, low, high, first, scale,
                            LOW, HIGH, GROUPS, WIDE)  # fmt: skip
            now = tl.maximum(most, tl.max(tl.max(found, 2), 1))
            floor = tl.where(now == float("-inf"), 0.0, now)
            total = total * tl.exp2(most - floor) + tl.sum(tl.sum(tl.exp2(found - floor[:, None, None]), 2), 1)
            most = now
        floor = tl.where(most == float("-inf"), 0.0, most)
        total = tl.where(total == 0, 1.0, total)
        for start in range(0, blocks_k, GROUPS):
            found = squares(source, row, start, rows, columns, per_row, per_column, stride, low, high, first, scale,
                            LOW, HIGH, GROUPS, WIDE)  # fmt: skip
            sums = tl.sum(tl.exp2(found - floor[:, None, None]), 2) / total[:, None]
            group = start + tl.arange(0, GROUPS)
            tl.store(target + group, tl.sum(sums, 0) / many, mask=group < blocks_k)


@lru_cache(maxsize=64)
def _pooling(
    chip: Chip, given: str, made: str, extremes: bool, size: int, dim: int, even: bool
) -> tuple[Launcher, int]:
    wide, held = triton.next_power_of_2(dim), EXTREME if extremes else POOLED
    rows = min(triton.next_power_of_2(size), max(held // wide, 1))
    groups = max(held // (wide * rows), 1)
    types = dict.fromkeys(("x_b", "x_h", "x_n"), "i64")
    types |= dict.fromkeys(("heads", "length", "size", "blocks", "dim"), "i32")
    types |= {"x": f"*{given}", "out": f"*{made}", "scale": "fp32"}
    divisible = dict.fromkeys(("x", "out"), 16) | dict.fromkeys(("x_b", "x_h", "x_n", "dim"), 8) if even else {}
    constants = {"EXTREMES": extremes, "GROUPS": groups, "ROWS": rows, "DIM": wide}
    return launcher(chip, pool, types, constants, divisible=divisible, num_warps=4), groups


class Form(NamedTuple):
    """A checked call of one form: the shape and dtype of its result, and its launch."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    launch: Launcher
    grid: tuple[int, int, int]
    arguments: list[Any]


_forms: dict[Any, Form] = {}


def _kept(form: Any, made: Form) -> Form:
    if len(_forms) >= MOST_KEPT:
        _forms.clear()
    _forms[form] = made
    return made


def _pooled(name: str, x: Tensor, size: int, scale: float, extremes: bool, wide: bool) -> Tensor:
    form = (name, x.shape, x.stride(), x.dtype, x.device, x.data_ptr() % 16, size, scale, wide)
    made = None if x.requires_grad else _forms.get(form)
    if made is None:
        check_tensors(name, binaries.INTERPRETED, [x])
        wrong = x.dim() != 4 or type(size) is not int or size < 1
        refuse(name, (wrong, f"{shapes(x)} and size {size}: use [B, H, N, D] and 1 up"))
        if x.stride(3) != 1:
            return _pooled(name, x.contiguous(), size, scale, extremes, wide)
        batch, heads, length, dim = x.shape
        blocks, kind = -(-length // size), torch.float32 if wide else x.dtype
        steps = x.stride()[:3]
        even = dim % 8 == 0 and not any(step % 8 for step in steps) and x.data_ptr() % 16 == 0
        chip = chip_of(x.device)
        launch, groups = _pooling(chip, TYPES[x.dtype], TYPES[kind], extremes, size, max(dim, 1), even)
        shape = (batch, heads, blocks, 3 * dim if extremes else dim)
        arguments = [*steps, heads, length, size, blocks, dim, float(scale)]
        made = _kept(form, Form(shape, kind, launch, (-(-blocks // groups), batch * heads, 1), arguments))
    out = torch.empty(made.shape, dtype=made.dtype, device=x.device)
    if out.numel():
        made.launch(made.grid, (x, out), made.arguments)
    return out


def triton_pool_rows(x: Tensor, size: int, scale: float = 1.0, wide: bool = False) -> Tensor:
    """Means of blocks of rows, times a factor; of the last block's own rows.

    Args:
        x: [B, H, N, D] of float32, float16 or bfloat16. wide: give float32.

    Returns:
        [B, H, ceil(N / size), D] of x's dtype; added up in float32.
    """
    return _pooled("triton_pool_rows", x, size, scale, False, wide)


def triton_pool_extremes(x: Tensor, size: int) -> Tensor:
    """Mean, maximum and minimum of blocks of rows, one beside the other: float32 [B, H, ceil(N / size), 3 D]."""
    return _pooled("triton_pool_extremes", x, size, 1.0, True, True)


@lru_cache(maxsize=64)
def _summing(
    chip: Chip, kind: str, per_row: int, per_column: int, blocks_k: int, low: bool, high: bool, even: bool
) -> Launcher:
    rows, wide = triton.next_power_of_2(per_row), triton.next_power_of_2(per_column)
    groups = min(SCORED // (rows * wide), triton.next_power_of_2(blocks_k))
    types = dict.fromkeys(("rows", "columns", "per_row", "per_column", "blocks_q", "blocks_k"), "i32")
    types |= dict.fromkeys(("stride", "low", "high", "first"), "i32")
    types |= {"scores": f"*{kind}", "out": "*fp32", "scale": "fp32"}
    constants = {"LOW": low, "HIGH": high, "ROWS": rows, "GROUPS": groups, "WIDE": wide, "ONE": groups >= blocks_k}
    divisible = {"scores": 16, "out": 16, "columns": 8, "per_column": 8} if even else {}
    return launcher(chip, square_sums, types, constants, divisible=divisible, num_warps=8)


def triton_square_sums(
    scores: Tensor,
    per_row: int,
    per_column: int,
    stride: int = 1,
    low: int | None = None,
    high: int | None = None,
    first: int = 0,
    scale: float = 1.0,
) -> Tensor:
    """The softmax of scores of squares of stride x stride pairs over all that is visible, by blocks of squares.

    Args:
        scores: [B, H, R, C]: a row for each `stride` queries, a column for each `stride` keys.
        per_row, per_column: squares in a block; their product, each rounded up to a power of two, at most 2^14.
        low, high: the band of key position less query position that is visible, None for no bound; a square that has a
            visible pair counts whole. first: number of the first row. scale: factor of the scores.

    Returns:
        float32 [B, H, ceil(R / per_row), ceil(C / per_column)]: means over a block's rows of squares, and sums over its
        columns of squares. A row that sees nothing gives 0.
    """
    name = "triton_square_sums"
    form: tuple[Any, ...] = (name, scores.shape, scores.stride(), scores.dtype, scores.device, scores.data_ptr() % 16)
    form += (per_row, per_column, stride, low, high, first, scale)
    made = None if scores.requires_grad else _forms.get(form)
    if made is None:
        check_tensors(name, binaries.INTERPRETED, [scores])
        wrong = scores.dim() != 4 or min(per_row, per_column, stride) < 1
        said = f"{shapes(scores)}, {per_row} x {per_column} squares of {stride}: use [B, H, R, C] and 1 or more"
        refuse(name, (wrong, said))
        fits = triton.next_power_of_2(per_row) * triton.next_power_of_2(per_column) <= SCORED
        refuse(name, (not fits, f"blocks of {per_row} x {per_column} squares: use at most {SCORED} in one"))
        if not scores.is_contiguous():
            return triton_square_sums(scores.contiguous(), per_row, per_column, stride, low, high, first, scale)
        batch, heads, rows, columns = scores.shape
        blocks_q, blocks_k = -(-rows // per_row), -(-columns // per_column)
        even = columns % 8 == 0 and per_column % 8 == 0 and scores.data_ptr() % 16 == 0
        bounds = low is not None, high is not None
        chip, kind = chip_of(scores.device), TYPES[scores.dtype]
        launch = _summing(chip, kind, per_row, per_column, max(blocks_k, 1), *bounds, even)
        arguments: list[Any] = [rows, columns, per_row, per_column, blocks_q, blocks_k]
        arguments += [stride, low or 0, high or 0, first, float(scale)]
        shape = (batch, heads, blocks_q, blocks_k)
        made = _kept(form, Form(shape, torch.float32, launch, (blocks_q, batch * heads, 1), arguments))
    out = torch.empty(made.shape, dtype=torch.float32, device=scores.device)
    if out.numel():
        made.launch(made.grid, (scores, out), made.arguments)
    return out
