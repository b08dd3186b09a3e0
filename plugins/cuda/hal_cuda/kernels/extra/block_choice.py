# ruff: noqa: N803
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
"""The blocks with the largest shares, chosen without sorting them and without waiting for the device.

The threshold is the total-th largest number, digit by digit: a share's bits as a whole number have the order of the
shares, and three histograms, of the upper 11 bits, of the next 10 among those that begin like the threshold, and of the
last 10, name it exactly.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...discovery import Chip
from ...runtime import binaries
from ...runtime.launch import Launcher, launcher
from .checks import aligned, check_tensors, chip_of, refuse, shapes

#: Numbers that a program counts; numbers of the rows that one lists.
COUNTED, LISTED = 4096, 1024
#: Most blocks in a row.
MOST = 1 << 13
#: Whole numbers of a batch entry: three histograms, then threshold and rest of the first two.
WORDS = 2048 + 1024 + 1024 + 16
FIRST, SECOND, STATE, ENTRY = (tl.constexpr(n) for n in (2048, 3072, 4096, WORDS))
FORCED = tl.constexpr(0x7FFFFFFF)


@triton.jit
def key_of(share, hidden, forced):
    """Whole numbers in the order of the choice: 0 hidden, then visible by share, then those that are read anyway."""
    key = tl.where(share > 0, share, 0.0).to(tl.int32, bitcast=True) + 1
    return tl.where(hidden != 0, 0, tl.where(forced != 0, FORCED, key))


@triton.jit
def digit_of(counted, wanted, BINS: tl.constexpr):
    """(bin of the wanted-th largest of what a histogram counted, which of that bin it is)."""
    place = tl.arange(0, BINS)
    many = tl.load(counted + place)
    above = tl.sum(many, 0) - tl.cumsum(many, 0)
    digit = tl.sum((above >= wanted).to(tl.int32), 0)
    return digit, wanted - tl.sum(tl.where(place > digit, many, 0), 0)


@triton.jit
def count_keys(share, hidden, forced, counts, many, pairs, wanted, LEVEL: tl.constexpr, SIZE: tl.constexpr):
    """Count the LEVEL-th digit, 0 to 2, of the keys that begin as the threshold does. Grid: (many / SIZE, entries).

    share: [entries, many]. hidden, forced: bytes [pairs], repeated over many. counts: [entries, WORDS], 0 at first.
    """
    entry = tl.program_id(1).to(tl.int64)
    own = counts + entry * ENTRY
    at = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    there, pair = at < many, at % pairs
    given = tl.load(share + entry * many + at, mask=there, other=0.0)
    key = key_of(given, tl.load(hidden + pair, mask=there, other=1), tl.load(forced + pair, mask=there, other=0))
    if LEVEL == 0:
        found = tl.histogram(key >> 20, 2048, mask=there)
        tl.atomic_add(own + tl.arange(0, 2048), found, mask=found > 0, sem="relaxed")
    elif LEVEL == 1:
        digit, rest = digit_of(own, wanted, 2048)
        tl.atomic_add(own + FIRST + ((key >> 10) & 1023), 1, mask=there & (key >> 20 == digit), sem="relaxed")
        if tl.program_id(0) == 0:
            tl.store(own + STATE, digit)
            tl.store(own + STATE + 1, rest)
    else:
        digit, rest = digit_of(own + FIRST, tl.load(own + STATE + 1), 1024)
        digit += tl.load(own + STATE) << 10
        tl.atomic_add(own + SECOND + (key & 1023), 1, mask=there & (key >> 10 == digit), sem="relaxed")
        if tl.program_id(0) == 0:
            tl.store(own + STATE + 2, digit)
            tl.store(own + STATE + 3, rest)


@triton.jit
def list_chosen(
    share, hidden, forced, counts, indices, listed, rows, rows_q, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """Each row's chosen columns, rising, then the others, rising; listed: how many are chosen.

    Grid: (rows / ROWS, entries). share, indices: [entries, rows, columns]; hidden, forced: bytes [rows_q, columns],
    rows_q a divisor of rows. Of those equal to the threshold a row takes the part that is wanted of all, rounded down.
    """
    entry = tl.program_id(1).to(tl.int64)
    own = counts + entry * ENTRY
    digit, rest = digit_of(own + SECOND, tl.load(own + STATE + 3), 1024)
    level, equal = (tl.load(own + STATE + 2) << 10) + digit, tl.load(own + SECOND + digit)
    row, column = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    there = (row < rows)[:, None] & (column < columns)[None, :]
    at = (entry * rows + row)[:, None] * columns + column[None, :]
    pair = (row % rows_q)[:, None] * columns + column[None, :]
    key = key_of(
        tl.load(share + at, mask=there, other=0.0),
        tl.load(hidden + pair, mask=there, other=1),
        tl.load(forced + pair, mask=there, other=0),
    )
    tie = (there & (key == level) & (level > 0)).to(tl.int32)
    taken = (tl.sum(tie, 1).to(tl.int64) * rest // tl.maximum(equal, 1)).to(tl.int32)
    chosen = ((there & (key > level)) | ((tie != 0) & (tl.cumsum(tie, 1) <= taken[:, None]))).to(tl.int32)
    many, before = tl.sum(chosen, 1), tl.cumsum(chosen, 1) - chosen
    place = tl.where(chosen != 0, before, many[:, None] + column[None, :] - before)
    target = (entry * rows + row)[:, None] * columns + place
    tl.store(indices + target, tl.zeros([ROWS, COLUMNS], tl.int32) + column[None, :], mask=there)
    tl.store(listed + entry * rows + row, many, mask=row < rows)


@lru_cache(maxsize=64)
def _launchers(chip: Chip, columns: int, even: bool) -> tuple[tuple[Launcher, ...], Launcher, int]:
    known = dict.fromkeys(("share", "many", "pairs", "columns"), 16) if even else {}
    pointers = {"share": "*fp32", "hidden": "*u8", "forced": "*u8", "counts": "*i32"}
    types = pointers | dict.fromkeys(("many", "pairs", "wanted"), "i32")
    levels = tuple(
        launcher(chip, count_keys, types, {"LEVEL": level, "SIZE": COUNTED}, divisible=known, num_warps=8)
        for level in range(3)
    )
    wide = triton.next_power_of_2(columns)
    rows = max(LISTED // wide, 1)
    types = pointers | {"indices": "*i32", "listed": "*i32"} | dict.fromkeys(("rows", "rows_q", "columns"), "i32")
    listing = launcher(chip, list_chosen, types, {"ROWS": rows, "COLUMNS": wide}, divisible=known, num_warps=4)
    return levels, listing, rows


def triton_choose_blocks(share: Tensor, hidden: Tensor, forced: Tensor, total: int) -> tuple[Tensor, Tensor]:
    """The `total` largest shares of each batch entry, over all its heads and rows together, as lists of columns.

    Of the shares that equal the least one chosen, a row takes the part that is wanted of all, rounded down, its first
    ones: `total` is never exceeded, and where shares are equal at most one block a row is missing.

    Args:
        share: float32 [B, H, R, C], 0 or more; what is not, NaN too, counts as 0. C at most 2^13, H R C below 2^31.
        hidden: bool [R, C], never chosen. forced: bool [R, C], chosen before all others; not hidden.
        total: 0 to H R C.

    Returns:
        (indices int32 [B, H, R, C], counts int32 [B, H, R]): the first counts entries of a list, rising, are chosen.
        Nothing waits for the device.
    """
    name = "triton_choose_blocks"
    check_tensors(name, binaries.INTERPRETED, [share], [hidden, forced])
    refuse(
        name,
        (
            share.dim() != 4
            or share.dtype != torch.float32
            or not hidden.dtype == forced.dtype == torch.bool
            or not hidden.shape == forced.shape == share.shape[2:],
            f"{shapes(share, hidden, forced)}: use float32 [B, H, R, C], and bool [R, C] twice",
        ),
    )
    batch, heads, rows, columns = share.shape
    pairs = rows * columns
    refuse(name, (columns > MOST or heads * pairs >= 1 << 31, f"{shapes(share)}: use at most {MOST} columns"))
    refuse(name, (not 0 <= total <= heads * pairs, f"total {total} of {heads * pairs}: use at most all"))
    share, hidden, forced = share.contiguous(), hidden.contiguous(), forced.contiguous()
    indices = torch.empty(share.shape, dtype=torch.int32, device=share.device)
    listed = torch.empty(share.shape[:3], dtype=torch.int32, device=share.device)
    if not indices.numel():
        return indices, listed.zero_()
    counts = torch.zeros((batch, WORDS), dtype=torch.int32, device=share.device)
    levels, listing, together = _launchers(chip_of(share.device), columns, columns % 16 == 0 and aligned(share))
    grid = (-(-heads * pairs // COUNTED), batch, 1)
    given = share, hidden, forced, counts
    for level in levels:
        level(grid, given, [heads * pairs, pairs, max(total, 1)])
    listing((-(-heads * rows // together), batch, 1), (*given, indices, listed), [heads * rows, rows, columns])
    return indices, listed
