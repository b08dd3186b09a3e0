"""Pages that a program comes back to and finds closed, by itself: for the tile-level simulator.

Which page a bank holds depends on the order of the visits alone, never on their time, and the order is the program's.
So
the program is walked through the banks once, without a clock: a matrix of nine pages in the eight banks of its group
has two pages in one bank, and what comes back to both of them opens each again every time, although a tile by itself,
or one loop by itself, never meets the other page.

Left out are regions of more than `_FAR` times as many pages as their group has banks (most of their tiles open pages of
their own, which `dram.group_cost` measures), so that the walk stays short.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import TypeAlias

import attrs

from ..movement import BANK_GROUPS, GROUP_BYTES, Instruction, Loop, Opcode, Place, Program
from .pages import bank_of, burst_order

_FAR = 4
"""Pages of a region to a bank of its group, at most."""
_INNER, _OUTER = 32, 3
"""Turns that are walked of a loop without loops in it, and of any other."""


@attrs.define
class Reopening:
    """Of a group of transfers, over all its turns.

    Attributes:
        turns, closed: how often it runs, and how often it then finds a page closed that it had open before.
        bytes: of the bursts before the first such page, summed over those turns.
    """

    turns: float = 0.0
    closed: float = 0.0
    bytes: float = 0.0

    @property
    def share(self) -> float:
        """Of its turns, those that find a page closed."""
        return self.closed / self.turns

    @property
    def before(self) -> float:
        """Bytes before the first page found closed, on average of the turns that find one."""
        return self.bytes / self.closed


_Group: TypeAlias = tuple[Place, ...]


@functools.lru_cache(maxsize=1 << 10)
def reopenings(program: Program, page: int, burst: int, banks: int) -> dict[tuple[_Group, int | None], Reopening]:
    """By the places of a group of transfers, what it finds closed: in each turn of its innermost loop, and in all
    (None).

    Of a loop that was not walked to its end, single turns are not told.

    Args:
        page, burst: bytes. banks: of one group.
    """
    watched = _watched(program, page, banks)
    if not watched:
        return {}
    walk = _Walk(watched, page, burst, banks)
    for transfers in _transfers(program.body):
        walk.visit(*transfers)
    return {key: found for key, found in walk.found.items() if found.closed}


def _watched(program: Program, page: int, banks: int) -> frozenset[int]:
    """Groups of banks in which pages can close each other, but are few."""
    spans: dict[int, tuple[int, int]] = {}
    for place, counts in _places(program.body, ()):
        moves = [step * (count - 1) for step, count in zip(place.steps, counts, strict=False)]
        first = place.base + sum(move for move in moves if move < 0)
        last = place.base + sum(move for move in moves if move > 0) + max(0, place.rows - 1) * place.pitch
        last += max(0, place.row_bytes - 1)
        group = place.base // GROUP_BYTES % BANK_GROUPS
        low, high = spans.get(group, (first, last))
        spans[group] = min(low, first), max(high, last)
    found = set()
    for group, (first, last) in spans.items():
        pages = range(first // page, last // page + 1)
        if len(pages) <= _FAR * banks and len({bank_of(number, banks) for number in pages}) < len(pages):
            found.add(group)
    return frozenset(found)


def _places(body: Sequence[Instruction | Loop], counts: tuple[int, ...]) -> Iterator[tuple[Place, tuple[int, ...]]]:
    """Every place, with the turns of the loops around it."""
    for item in body:
        if isinstance(item, Loop):
            yield from _places(item.body, (*counts, item.count))
        elif item.place is not None:
            yield item.place, counts


def _transfers(body: Sequence[Instruction | Loop]) -> Iterator[tuple[_Group, tuple[int, ...], float, int | None]]:
    """Each group of transfers, in the order the memory serves them.

    Yields:
        Its places, their first bytes, how many turns it stands for, and its turn of the innermost loop if all are
        walked.
    """
    group: list[tuple[Place, int]] = []
    late: tuple[_Group, tuple[int, ...], float, int | None] | None = None
    for instruction, at, weight, turn in _walked(body, (), 1.0, None):
        place = instruction.place
        if instruction.opcode is Opcode.BARRIER and late:
            yield late
            late = None
        if place is None:
            continue
        base = place.base + sum(map(int.__mul__, place.steps, at))
        if instruction.late:
            if late:
                yield late
            late = (place,), (base,), weight, turn
            continue
        group.append((place, base))
        if not instruction.together:
            yield tuple(each for each, _ in group), tuple(each for _, each in group), weight, turn
            group = []
    if late:
        yield late


def _walked(
    body: Sequence[Instruction | Loop], at: tuple[int, ...], weight: float, single: int | None
) -> Iterator[tuple[Instruction, tuple[int, ...], float, int | None]]:
    """Instructions in order, the first turns of every loop; those after the first stand for the turns left out."""
    for item in body:
        if isinstance(item, Instruction):
            yield item, at, weight, single
            continue
        turns = min(item.count, _OUTER if any(isinstance(inner, Loop) for inner in item.body) else _INNER)
        for turn in range(turns):
            stands = weight * ((item.count - 1) / (turns - 1) if turn else 1.0)
            yield from _walked(item.body, (*at, turn), stands, turn if turns == item.count else None)


class _Walk:
    """The open page of every watched bank, and the pages that each group of transfers had open before."""

    def __init__(self, watched: frozenset[int], page: int, burst: int, banks: int) -> None:
        self.watched, self.page, self.burst, self.banks = watched, page, burst, banks
        self.found: dict[tuple[_Group, int | None], Reopening] = {}
        self._open: dict[tuple[int, int], int] = {}
        self._seen: dict[_Group, set[tuple[int, int]]] = {}

    def visit(self, group: _Group, bases: tuple[int, ...], weight: float, turn: int | None) -> None:
        sides = [base // GROUP_BYTES % BANK_GROUPS for base in bases]
        if self.watched.isdisjoint(sides):
            return
        seen = self._seen.setdefault(group, set())
        shapes = tuple((b % self.page, p.row_bytes, p.rows, p.pitch) for b, p in zip(bases, group, strict=True))
        closed, before = False, 0  # bursts
        for which, number, bursts in burst_order(shapes, self.page, self.burst):
            side, there = sides[which], bases[which] // self.page + number
            bank = side, bank_of(there, self.banks)
            if side in self.watched and self._open.get(bank) != there:
                self._open[bank] = there
                closed = closed or (side, there) in seen
            seen.add((side, there))
            before += 0 if closed else bursts
        for key in {turn, None}:
            found = self.found.setdefault((group, key), Reopening())
            found.turns += weight
            if closed:
                found.closed += weight
                found.bytes += weight * before * self.burst
