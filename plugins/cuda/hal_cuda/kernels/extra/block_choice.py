# ruff: noqa: N803
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
"""The blocks with the largest shares, chosen without sorting them and without waiting for the device.

The threshold is the total-th largest number, digit by digit: a share's bits as a whole number have the order of the
shares, and four histograms, of 8, 8, 8 and 7 bits, each of the numbers that begin like the threshold, name it exactly.
Every program counts a part for itself, and the next launch adds the parts up: nothing is added in memory, where many
equal digits would stand in line.
"""

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
from .checks import aligned, check_tensors, chip_of, refuse, shapes

#: Programs that count, at most, and numbers that each takes at a time; the same of those that list.
COUNTERS, COUNTED = 128, 8192
LISTERS, LISTED = 128, 2048
#: Most blocks in a row.
MOST = 1 << 13
#: Values of a digit, and whole numbers of a batch entry: four histograms of each counter, then prefix and rest of each;
#: counters that are added up at a time.
BINS = tl.constexpr(256)
WORDS = 4 * COUNTERS * 256 + 16
PART, STATE, ENTRY, TOGETHER = (tl.constexpr(n) for n in (COUNTERS * 256, 4 * COUNTERS * 256, WORDS, 32))
FORCED = tl.constexpr(0x7FFFFFFF)


@triton.jit
def key_of(share, hidden, forced):
    """Whole numbers in the order of the choice: 0 hidden, then visible by share, then those that are read anyway."""
    key = tl.where(share > 0, share, 0.0).to(tl.int32, bitcast=True) + 1
    return tl.where(hidden != 0, 0, tl.where(forced != 0, FORCED, key))


@triton.jit
def digit_of(own, level, wanted, counters):
    """The digit of the wanted-th largest of what `level` counted, which of those with that digit it is, and how many
    have it.
    """
    place, many = tl.arange(0, BINS), tl.zeros([BINS], tl.int32)
    for first in range(0, counters, TOGETHER):
        part = first + tl.arange(0, TOGETHER)
        counted = own + level * PART + part[:, None] * BINS + place[None, :]
        many += tl.sum(tl.load(counted, mask=(part < counters)[:, None], other=0), 0)
    above = tl.sum(many, 0) - tl.cumsum(many, 0)
    digit = tl.sum((above >= wanted).to(tl.int32), 0)
    rest = wanted - tl.sum(tl.where(place > digit, many, 0), 0)
    return digit, rest, tl.sum(tl.where(place == digit, many, 0), 0)


@triton.jit
def count_keys(
    share, hidden, forced, counts, many, pairs, wanted, LEVEL: tl.constexpr, SHIFT: tl.constexpr, SIZE: tl.constexpr
):
    """Count the LEVEL-th digit of the keys that begin as the threshold does. Grid: (counters, entries).

    share: [entries, many]. hidden, forced: bytes [pairs], repeated over many. counts: [entries, WORDS].
    """
    entry, counters = tl.program_id(1).to(tl.int64), tl.num_programs(0)
    own = counts + entry * ENTRY
    prefix = 0
    if LEVEL > 0:
        rest = wanted
        if LEVEL > 1:
            prefix, rest = tl.load(own + STATE + 2 * LEVEL - 2), tl.load(own + STATE + 2 * LEVEL - 1)
        digit, rest, _ = digit_of(own, LEVEL - 1, rest, counters)
        prefix = (prefix << 8) + digit
        if tl.program_id(0) == 0:
            tl.store(own + STATE + 2 * LEVEL, prefix)
            tl.store(own + STATE + 2 * LEVEL + 1, rest)
    found = tl.zeros([BINS], tl.int32)
    for step in range(tl.program_id(0), tl.cdiv(many, SIZE), counters):
        at = step * SIZE + tl.arange(0, SIZE)
        there, pair = at < many, at % pairs
        given = tl.load(share + entry * many + at, mask=there, other=0.0)
        key = key_of(given, tl.load(hidden + pair, mask=there, other=1), tl.load(forced + pair, mask=there, other=0))
        if LEVEL == 3:
            there, digits = there & (key >> 7 == prefix), key & 127
        elif LEVEL > 0:
            there, digits = there & (key >> (SHIFT + 8) == prefix), (key >> SHIFT) & 255
        else:
            digits = key >> SHIFT
        found += tl.histogram(digits, BINS, mask=there)
    tl.store(own + LEVEL * PART + tl.program_id(0) * BINS + tl.arange(0, BINS), found)


@triton.jit
def list_chosen(
    share,
    hidden,
    forced,
    counts,
    indices,
    listed,
    rows,
    rows_q,
    columns,
    counters,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Each row's chosen columns, rising, then the others, rising; listed: how many are chosen.

    Grid: (programs, entries). share, indices: [entries, rows, columns]; hidden, forced: bytes [rows_q, columns],
    rows_q a divisor of rows. Of those equal to the threshold a row takes the part that is wanted of all, rounded down.
    """
    entry = tl.program_id(1).to(tl.int64)
    own = counts + entry * ENTRY
    digit, rest, equal = digit_of(own, 3, tl.load(own + STATE + 7), counters)
    level = (tl.load(own + STATE + 6) << 7) + digit
    column = tl.arange(0, COLUMNS)
    for step in range(tl.program_id(0), tl.cdiv(rows, ROWS), tl.num_programs(0)):
        row = step * ROWS + tl.arange(0, ROWS)
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
        launcher(
            chip,
            count_keys,
            types,
            {"LEVEL": level, "SHIFT": shift, "SIZE": COUNTED},
            divisible={name: known[name] for name in known if name != "columns"},
            num_warps=8,
        )
        for level, shift in enumerate((23, 15, 7, 0))
    )
    wide = triton.next_power_of_2(columns)
    rows = max(LISTED // wide, 1)
    types = pointers | {"indices": "*i32", "listed": "*i32"}
    types |= dict.fromkeys(("rows", "rows_q", "columns", "counters"), "i32")
    known = {name: known[name] for name in known if name in ("share", "columns")}
    constants = {"ROWS": rows, "COLUMNS": wide}
    return levels, launcher(chip, list_chosen, types, constants, divisible=known, num_warps=8), rows


class Choice(NamedTuple):
    """A call of one form: its launches, their grids, and their arguments but for the total."""

    levels: tuple[Launcher, ...]
    listing: Launcher
    counters: tuple[int, int, int]
    listers: tuple[int, int, int]
    sizes: tuple[int, int]
    rows: list[int]


_forms: dict[Any, Choice] = {}


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
    form: tuple[Any, ...] = (
        share.shape,
        share.stride(),
        share.dtype,
        share.device,
        hidden.shape,
        hidden.dtype,
        hidden.device,
    )
    form += (forced.shape, forced.dtype, forced.device, share.requires_grad, share.data_ptr() % 16)
    made = _forms.get(form)
    if made is None or not 0 <= total <= made.sizes[0]:
        made = _form(share, hidden, forced, total)
        if len(_forms) >= 256:
            _forms.clear()
        if not share.requires_grad:
            _forms[form] = made
    share, hidden, forced = share.contiguous(), hidden.contiguous(), forced.contiguous()
    indices = torch.empty(share.shape, dtype=torch.int32, device=share.device)
    listed = torch.empty(share.shape[:3], dtype=torch.int32, device=share.device)
    if not indices.numel():
        return indices, listed.zero_()
    counts = torch.empty((share.shape[0], WORDS), dtype=torch.int32, device=share.device)
    given, arguments = (share, hidden, forced, counts), [*made.sizes, max(total, 1)]
    for level in made.levels:
        level(made.counters, given, arguments)
    made.listing(made.listers, (*given, indices, listed), made.rows)
    return indices, listed


def _form(share: Tensor, hidden: Tensor, forced: Tensor, total: int) -> Choice:
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
    many = heads * rows * columns
    refuse(name, (columns > MOST or many >= 1 << 31, f"{shapes(share)}: use at most {MOST} columns"))
    refuse(name, (not 0 <= total <= many, f"total {total} of {many}: use at most all"))
    even = columns % 16 == 0 and (aligned(share) or not share.is_contiguous())
    levels, listing, together = _launchers(chip_of(share.device), max(columns, 1), even)
    counters, listers = min(-(-many // COUNTED), COUNTERS), min(-(-heads * rows // together), LISTERS)
    sizes = [heads * rows, rows, columns, counters]
    return Choice(levels, listing, (counters, batch, 1), (listers, batch, 1), (many, rows * columns), sizes)
