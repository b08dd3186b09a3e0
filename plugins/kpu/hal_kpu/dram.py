"""DRAM shared by the DMA channels: banks, open pages, refresh, and an arbitration that cannot make faster memory slower.

Both memories serve transfers in the order of the program; transfers written `together` are interleaved, the one with the
fewest bytes served first, so equal ones get half each. Every time is a maximum of sums of what came before:

* a page visit starts when the bus is free, its bank open and its bank not in refresh;
* the bank of a visit may be opened once the visit `lookahead` places before has ended;
* every `refresh_interval` all banks are refreshed, one after the other; the bus waits, and pages are open again at the end.

So a later event cannot make another one earlier (a greedy arbiter could: who comes first would change).
Pages are spread over the banks by a permutation (as Zhang, Zhu & Zhang 2000), so that no power-of-two pitch stays in one bank.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Protocol

import attrs

from .movement import Place
from .profile import Profile

TICKS = 1 << 12  # of the banked memory in a cycle
COARSE = 16  # of the averaged memory in a cycle


@attrs.frozen
class Transfer:
    """One DMA of a group. ready: cycle from which it may touch the memory. base: byte where its place now begins."""

    channel: int
    ready: int
    place: Place
    base: int


@attrs.define
class MemoryCounters:
    """What a memory did. bus: cycles its data bus moved bytes. refresh_stall: cycles visits waited for a refresh."""

    bytes: int = 0
    bus: float = 0.0
    page_hits: int = 0
    page_misses: int = 0
    refresh_stall: float = 0.0

    def repeat(self, since: MemoryCounters, times: int) -> None:
        """What happened since an earlier copy happened `times` times more."""
        for name in ("bytes", "bus", "page_hits", "page_misses", "refresh_stall"):
            now = getattr(self, name)
            setattr(self, name, now + times * (now - getattr(since, name)))


class Memory(Protocol):
    """What the engines need of a memory."""

    counters: MemoryCounters
    steady: bool  # equal transfers take equal time whenever they come
    activate: int  # cycles between a transfer's readiness and its first byte, at most

    def serve(self, group: Sequence[Transfer]) -> list[tuple[int, int]]:
        """(start, end) in cycles of each transfer of a group, in which bytes are interleaved."""
        ...


@attrs.frozen
class Timing:
    """A profile's DRAM in cycles of the machine's clock.

    Attributes:
        bytes_per_cycle: of the bus. channel: the same of one DMA channel.
        burst, page: bytes. banks, lookahead: numbers.
        activate: cycles to change the page of a bank. interval: between refreshes of all banks. refresh: of one bank.
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

    @classmethod
    def of(cls, profile: Profile) -> Timing:
        activate = math.ceil(profile.cycles("dram.activate"))
        return cls(
            bytes_per_cycle=profile.bytes_per_cycle("dram.bandwidth"),
            channel=profile.bytes_per_cycle("engines.dma_bandwidth"),
            burst=profile.count("dram.burst"), page=profile.count("dram.page"), banks=profile.count("dram.banks"),
            lookahead=profile.count("dram.lookahead"), activate=activate,
            interval=profile.cycles("dram.refresh_interval"),
            refresh=profile.cycles("dram.refresh_time") / profile.count("dram.banks"),
        )  # fmt: skip


@functools.lru_cache(maxsize=4096)
def page_visits(
    offset: int, row_bytes: int, rows: int, pitch: int, page: int, burst: int
) -> tuple[tuple[int, int], ...]:
    """(page after the first, bursts) of a place that begins `offset` bytes into a page, in order, neighbours merged."""
    visits: list[list[int]] = []
    for row in range(rows):
        at, left = offset + row * pitch, row_bytes
        while left > 0:
            here = min(left, page - at % page)
            bursts = -(-(at % burst + here) // burst)
            if visits and visits[-1][0] == at // page:
                visits[-1][1] += bursts
            else:
                visits.append([at // page, bursts])
            at, left = at + here, left - here
    return tuple((number, bursts) for number, bursts in visits)


def bank_of(page: int, banks: int) -> int:
    """Bank of a page: pages go round the banks, each round turned by one against the round before."""
    return (page + page // banks + page // (banks * banks)) % banks


class BankedMemory:
    """Visit by visit: banks, open pages, refresh windows. For CYCLE_ACCURATE.

    `skip_refresh`: a bank whose refresh is left out, for tests.
    """

    steady = False

    def __init__(self, profile: Profile, skip_refresh: int | None = None) -> None:
        self.timing = timing = Timing.of(profile)
        self.activate = timing.activate
        self.counters = MemoryCounters()
        self.refreshes_of = [bank != skip_refresh for bank in range(timing.banks)]
        self._burst = math.ceil(timing.burst / timing.bytes_per_cycle * TICKS)
        self._port = math.ceil(timing.burst / timing.channel * TICKS)
        self._interval = round(timing.interval * TICKS)
        window = timing.refresh * sum(self.refreshes_of) + timing.activate * (timing.refresh > 0)
        self._window = math.ceil(window * TICKS)
        self._activate = timing.activate * TICKS
        self._bus = 0
        self._ports: dict[int, int] = {}
        self._open: list[int] = [-1] * timing.banks
        self._bank_end = [0] * timing.banks
        self._ends = [0] * timing.lookahead  # of the last visits, a ring
        self._next = 0

    def refreshes(self, cycles: int) -> list[int]:
        """Refreshes of each bank up to a cycle."""
        times = cycles * TICKS // self._interval if self._window else 0
        return [times * refreshed for refreshed in self.refreshes_of]

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
            start, end = self._visit(first[which] + number, bursts, ready[which], group[which].channel)
            if starts[which] < 0:
                starts[which] = start
            ends[which] = end
        self.counters.bytes += sum(place.bytes for place in places)
        return [(start // TICKS, -(-end // TICKS)) for start, end in zip(starts, ends, strict=True)]

    def _visit(self, page: int, bursts: int, ready: int, channel: int) -> tuple[int, int]:
        banks, counters, next_ = self.timing.banks, self.counters, self._next
        bank = bank_of(page, banks)
        start = max(self._bus, ready, self._ports.get(channel, 0))
        if self._open[bank] == page:
            counters.page_hits += 1
        else:
            counters.page_misses += 1
            self._open[bank] = page
            opened = max(ready, self._ends[next_], self._bank_end[bank]) + self._activate
            if opened > start:
                start = opened
        phase = start % self._interval
        if phase < self._window and start >= self._interval:
            counters.refresh_stall += (self._window - phase) / TICKS
            start += self._window - phase
        self._bus = end = start + bursts * self._burst
        counters.bus += bursts * self._burst / TICKS
        self._ports[channel] = port = start + bursts * self._port
        self._bank_end[bank] = self._ends[next_] = end
        self._next = next_ + 1 if next_ + 1 < len(self._ends) else 0
        return start, end if end > port else port


@functools.lru_cache(maxsize=4096)
def burst_order(
    places: tuple[tuple[int, int, int, int], ...], page: int, burst: int
) -> tuple[tuple[int, int, int], ...]:
    """(transfer, page after its first, bursts) of a group: always the transfer with the fewest bursts so far, 4 at a time.

    places: (offset in the page, row_bytes, rows, pitch) of each transfer.
    """
    visits = [page_visits(*place, page, burst) for place in places]
    if len(visits) == 1:
        return tuple((0, number, bursts) for number, bursts in visits[0])
    order: list[tuple[int, int, int]] = []
    served, at = [0] * len(visits), [0] * len(visits)
    left = [v[0][1] if v else 0 for v in visits]
    going = [which for which, v in enumerate(visits) if v]
    while going:
        which = min(going, key=lambda w: (served[w], w))
        now = min(left[which], 4)
        order.append((which, visits[which][at[which]][0], now))
        served[which] += now
        left[which] -= now
        if not left[which]:
            at[which] += 1
            if at[which] < len(visits[which]):
                left[which] = visits[which][at[which]][1]
            else:
                going.remove(which)
    return tuple(order)


@attrs.frozen
class _Cost:
    """Of one transfer, in 1/COARSE of a cycle: time on the bus, at the channel's port, to open its first page."""

    bus: int
    port: int
    opening: int
    hits: int
    misses: int


class AveragedMemory:
    """Tile by tile: a transfer takes the time that its pages take on average, refreshes included. For TRANSACTIONAL."""

    steady = True

    def __init__(self, profile: Profile) -> None:
        self.timing = timing = Timing.of(profile)
        self.activate = timing.activate
        self.counters = MemoryCounters()
        self.bus = 0  # in 1/COARSE of a cycle
        self._ports: dict[int, int] = {}
        self._costs: dict[tuple[int, Place], _Cost] = {}

    def cost(self, place: Place, base: int) -> _Cost:
        """What a place costs, wherever the loops around it have got to."""
        key = (base % self.timing.burst, place)
        if key not in self._costs:
            self._costs[key] = self._cost(place, base % self.timing.burst)
        return self._costs[key]

    def _cost(self, place: Place, offset: int) -> _Cost:
        timing = self.timing
        rows = min(place.rows, 64)  # the pattern of many rows is that of 64
        visits = page_visits(offset, place.row_bytes, rows, place.pitch, timing.page, timing.burst)
        scale = place.rows / rows
        number, bursts = len(visits) * scale, sum(bursts for _, bursts in visits) * scale
        data = bursts * timing.burst / timing.bytes_per_cycle
        missed = self._missed(place)
        ahead = min(timing.lookahead, timing.banks)
        time = max(data, number * missed * (timing.activate + data / number) / ahead)
        if timing.refresh:
            time /= 1 - (timing.refresh * timing.banks + timing.activate) / timing.interval
        port = bursts * timing.burst / timing.channel
        misses = round(number * missed)
        return _Cost(math.ceil(time * COARSE), math.ceil(port * COARSE), math.ceil(missed * timing.activate * COARSE),
                     round(number) - misses, misses)  # fmt: skip

    def _missed(self, place: Place) -> float:
        """Share of page visits that find another page open: a loop that goes on by less than a page returns to open ones."""
        span = max(place.rows * place.pitch, place.row_bytes)
        if not place.steps or span > self.timing.page * self.timing.banks // 2:
            return 1.0
        return min(1.0, abs(place.steps[-1]) / self.timing.page)

    def serve(self, group: Sequence[Transfer]) -> list[tuple[int, int]]:
        costs = [self.cost(transfer.place, transfer.base) for transfer in group]
        begin = self.bus
        for transfer, cost in zip(group, costs, strict=True):
            begin = max(begin, transfer.ready * COARSE + cost.opening)
        ports = [max(begin, self._ports.get(transfer.channel, 0)) for transfer in group]
        spans, counters = [], self.counters
        for cost, free, transfer in zip(costs, ports, group, strict=True):
            shared = begin + sum(min(cost.bus, other.bus) for other in costs)  # equal shares until the shorter ones end
            end = max(shared, free + cost.port)
            self._ports[transfer.channel] = end
            spans.append((begin // COARSE, -(-end // COARSE)))
            counters.bytes += transfer.place.bytes
            counters.bus += transfer.place.bytes / self.timing.bytes_per_cycle
            counters.page_hits += cost.hits
            counters.page_misses += cost.misses
        self.bus = max(begin + sum(cost.bus for cost in costs), *self._ports.values())
        return spans

    def shift(self, cycles: int) -> None:
        """All that is known lies `cycles` later."""
        self.bus += cycles * COARSE
        self._ports = {channel: free + cycles * COARSE for channel, free in self._ports.items()}
