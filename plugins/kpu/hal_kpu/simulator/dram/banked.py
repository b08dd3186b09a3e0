"""DRAM shared by the DMA channels: banks, open pages, refresh, and an arbitration that cannot make faster memory
slower.

The banked memory and the averaged one (averaged_dram.py) serve transfers in the order of the program; transfers written
`together` are interleaved, the one with the fewest bytes served first, so equal ones get half each. Every time is a
maximum of sums of what came before:

* a page visit starts when the bus is free, its bank open and its bank not in refresh;
* the bank of a visit may be opened once the visit `lookahead` places before has ended;
* every bank is refreshed once in a `refresh_interval`, the banks evenly spread over it; the bus waits for each of them
  for its part of `refresh_time`.

So a later event cannot make another one earlier (a greedy arbiter could: who comes first would change).
Operands that stream together lie in different groups of banks (`movement.Builder.region`).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Protocol

import attrs

from ...profiles.profile import Profile
from ..movement import BANK_GROUPS, GROUP_BYTES, Place
from .pages import bank_of, burst_order

TICKS = 1 << 12  # of the banked memory in a cycle


@attrs.frozen
class Transfer:
    """One DMA of a group. ready: cycle from which it may touch the memory. base: byte where its place now begins.
    turn: of the innermost loop around it."""

    channel: int
    ready: int
    place: Place
    base: int
    turn: int = 0


@attrs.define
class MemoryCounters:
    """What a memory did. bus: cycles its data bus moved bytes. refresh_stall: cycles visits waited for a refresh."""

    bytes: int = 0
    bus: float = 0.0
    page_hits: float = 0
    page_misses: float = 0
    refresh_stall: float = 0.0

    def copy(self) -> MemoryCounters:
        """As it is now."""
        return MemoryCounters(self.bytes, self.bus, self.page_hits, self.page_misses, self.refresh_stall)

    def repeat(self, since: MemoryCounters, times: int) -> None:
        """What happened since an earlier copy happened `times` times more."""
        for name in ("bytes", "bus", "page_hits", "page_misses", "refresh_stall"):
            now = getattr(self, name)
            setattr(self, name, now + times * (now - getattr(since, name)))


class Memory(Protocol):
    """What the engines need of a memory."""

    counters: MemoryCounters
    steady: bool  # equal transfers take equal time whenever they come
    activate: int  # cycles between a transfer's readiness and its first byte, at most so far

    def serve(self, group: Sequence[Transfer]) -> list[tuple[int, int]]:
        """(start, end) in cycles of each transfer of a group, in which bytes are interleaved."""
        ...


@attrs.frozen
class Timing:
    """A profile's DRAM in cycles of the machine's clock.

    Attributes:
        bytes_per_cycle: of the bus. channel: the same of one DMA channel.
        burst, page: bytes. banks, lookahead: numbers.
        activate: cycles to change the page of a bank. interval: between two refreshes of one bank.
        refresh: the bus waits for that of one bank.
    """

    bytes_per_cycle: float
    channel: float
    burst: int
    page: int
    banks: int
    lookahead: int
    activate: int
    interval: float
    refresh: float

    @property
    def group(self) -> int:
        """Banks of one group."""
        return max(1, self.banks // BANK_GROUPS)

    @staticmethod
    @functools.lru_cache(maxsize=4096)
    def of(profile: Profile) -> Timing:
        activate = math.ceil(profile.cycles("dram.activate"))
        return Timing(
            bytes_per_cycle=profile.bytes_per_cycle("dram.bandwidth"),
            channel=profile.bytes_per_cycle("engines.dma_bandwidth"),
            burst=profile.count("dram.burst"),
            page=profile.count("dram.page"),
            banks=profile.count("dram.banks"),
            lookahead=profile.count("dram.lookahead"),
            activate=activate,
            interval=profile.cycles("dram.refresh_interval"),
            refresh=profile.cycles("dram.refresh_time") / profile.count("dram.banks"),
        )


class BankedMemory:
    """Visit by visit: banks, open pages, refresh windows. For CYCLE_ACCURATE.

    The byte where a place begins says its group of banks, the page its bank there (`pages.bank_of`).

    `skip_refresh`: a bank whose refresh is left out, for tests.
    """

    steady = False

    def __init__(self, timing: Timing, skip_refresh: int | None = None) -> None:
        self.timing = timing
        self.activate = timing.activate
        self.counters = MemoryCounters()
        self._whole = skip_refresh is None
        self.refreshes_of = [bank != skip_refresh for bank in range(timing.banks)]
        self._burst = math.ceil(timing.burst / timing.bytes_per_cycle * TICKS)
        self._port = math.ceil(timing.burst / timing.channel * TICKS)
        self._interval = round(timing.interval * TICKS / timing.banks)  # from one bank's refresh to the next one's
        self._window = math.ceil(timing.refresh * TICKS)
        self._activate, self._group = timing.activate * TICKS, timing.group
        self._bus = 0
        self._ports: dict[int, int] = {}
        self._open: list[int] = [-1] * timing.banks
        self._bank_end = [0] * timing.banks
        self._ends = [0] * timing.lookahead  # of the last visits, a ring
        self._next = 0

    @property
    def bus_cycles(self) -> float:
        """When the bus is free."""
        return self._bus / TICKS

    def refreshes(self, cycles: int) -> list[int]:
        """Refreshes of each bank up to a cycle."""
        done = cycles * TICKS // self._interval if self._window else 0
        banks = self.timing.banks
        return [max(0, (done - bank + banks - 1) // banks) * kept for bank, kept in enumerate(self.refreshes_of)]

    def serve(self, group: Sequence[Transfer]) -> list[tuple[int, int]]:
        page, burst = self.timing.page, self.timing.burst
        places = [transfer.place for transfer in group]
        order = burst_order(
            tuple((t.base % page, p.row_bytes, p.rows, p.pitch) for t, p in zip(group, places, strict=True)),
            page,
            burst,
        )
        first = [transfer.base // page for transfer in group]
        ready = [transfer.ready * TICKS for transfer in group]
        starts, ends = [-1] * len(group), [0] * len(group)
        for which, number, bursts in order:
            start, end = self._visit(group[which], first[which] + number, bursts, ready[which])
            if starts[which] < 0:
                starts[which] = start
            ends[which] = end
        self.counters.bytes += sum(place.bytes for place in places)
        return [(start // TICKS, -(-end // TICKS)) for start, end in zip(starts, ends, strict=True)]

    def _between_refreshes(self, start: int, work: int) -> tuple[int, int]:
        """(start, end) of `work` on the bus from `start` on: at the end of every interval it waits for one bank's
        refresh.
        """
        interval, part = self._interval, self._interval - self._window
        turn, inside = divmod(start, interval)
        if self._whole:
            if inside >= part:
                turn, inside = turn + 1, 0
            turns, rest = divmod(inside + work - 1, part)
            return turn * interval + inside, (turn + turns) * interval + rest + 1
        banks, first = self.timing.banks, -1
        while True:
            room = part if self.refreshes_of[turn % banks] else interval
            if inside < room:
                first = turn * interval + inside if first < 0 else first
                if work <= room - inside:
                    return first, turn * interval + inside + work
                work -= room - inside
            turn, inside = turn + 1, 0

    def _visit(self, transfer: Transfer, page: int, bursts: int, ready: int) -> tuple[int, int]:
        counters, next_, channel, group = self.counters, self._next, transfer.channel, self._group
        bank = transfer.base // GROUP_BYTES % BANK_GROUPS * group + bank_of(page, group)
        start = max(self._bus, ready, self._ports.get(channel, 0))
        if self._open[bank] == page:
            counters.page_hits += 1
        else:
            counters.page_misses += 1
            self._open[bank] = page
            opened = max(ready, self._ends[next_], self._bank_end[bank]) + self._activate
            if opened > start:
                start = opened
        work = bursts * self._burst
        end = start + work
        if self._window:
            begin = start
            start, end = self._between_refreshes(start, work)
            counters.refresh_stall += (end - begin - work) / TICKS
        self._bus = end
        counters.bus += work / TICKS
        self._ports[channel] = port = start + bursts * self._port
        self._bank_end[bank] = self._ends[next_] = end
        self._next = next_ + 1 if next_ + 1 < len(self._ends) else 0
        return start, end if end > port else port
