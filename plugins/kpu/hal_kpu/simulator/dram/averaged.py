"""DRAM tile by tile: what groups of transfers cost on average, measured on the banked memory once for each kind."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence

import attrs

from ..movement import GROUP_BYTES, Place, Program
from .banked import BankedMemory, MemoryCounters, Timing, Transfer
from .pages import page_visits
from .reopening import Reopening, reopenings

COARSE = 4  # of the averaged memory in a cycle
_STEPS = 64  # in a time of any length, unless it is shorter than that many steps of 1/COARSE


@attrs.frozen
class GroupCost:
    """Of transfers that are interleaved, in cycles and refreshes apart.

    Attributes:
        whole: from one group's last byte to the next one's, where groups wait in line. alone: from readiness to the
            last byte, where the memory waited.
        ends: of each transfer, as a share of `whole`. ports: the least at each transfer's channel.
        bus: of the bytes themselves. hits, misses: page visits. reopens: share of the groups that the memory
            waited for which find a page closed that was open before.
    """

    whole: float
    alone: float
    ends: tuple[float, ...]
    ports: tuple[float, ...]
    bus: float
    hits: float
    misses: float
    reopens: float


@attrs.frozen
class _Ticks:
    """`GroupCost` in 1/COARSE of a cycle, refreshes included; `bus` in cycles."""

    whole: int
    alone: int
    ends: list[int]
    ends_alone: list[int]
    ports: list[int]
    bus: float
    hits: float
    misses: float


_TURNS, _ROWS, _OUTER = 4, 512, (0, 1, 5)


def _burst_bytes(timing: Timing, place: Place, base: int) -> int:
    """Bytes of the bursts that hold a place."""
    visits = page_visits(base % timing.page, place.row_bytes, place.rows, place.pitch, timing.page, timing.burst)
    return sum(bursts for _, bursts in visits) * timing.burst


def _pages(timing: Timing, place: Place, base: int) -> Iterator[int]:
    """Numbers of the pages that hold a place."""
    visits = page_visits(base % timing.page, place.row_bytes, place.rows, place.pitch, timing.page, timing.burst)
    return (base // timing.page + number for number, _ in visits)


def _turns(place: Place) -> int:
    """Turns of the innermost loop to look at: no more than it has, nor than a tile that goes on along its rows stays
    there.
    """
    turns = _TURNS if place.rows > 32 else 3 * _TURNS  # short ones meet bursts at more offsets
    step = abs(sum(place.steps[-1:]))
    if place.counts:
        turns = min(turns, place.counts[-1] - 1)
    elif 0 < step < place.pitch:
        turns = min(turns, (place.pitch - place.row_bytes) // step - 1)
    return max(1, turns)


def _samples(timing: Timing, place: Place) -> Place:
    """The representative of all places that differ only in where in a page they begin.

    Its steps are where the innermost loop begins in the samples `_OUTER` of the loops around it, then that loop's own
    step.
    """
    counts = place.counts or (1 << 30,) * len(place.steps)
    outer = [
        sum(step * min(turn, count - 1) for step, count in zip(place.steps[:-1], counts[:-1], strict=True))
        for turn in _OUTER
    ]
    base = place.base // GROUP_BYTES * GROUP_BYTES + place.base % timing.burst
    return attrs.evolve(place, base=base, steps=(*outer, sum(place.steps[-1:])), counts=(_turns(place),))


def _cut(place: Place, scale: float, burst: int) -> Place:
    """A place with 1/scale of the bytes: of many rows fewer, of few rows shorter ones. Every transfer of a group is cut
    alike, so that they share the memory as the whole ones do.
    """
    rows = max(1, round(place.rows / scale))
    left = place.bytes / scale / rows
    if scale == 1 or abs(left - place.row_bytes) <= place.row_bytes / 16:  # of the rounding alone
        return attrs.evolve(place, rows=rows)
    return attrs.evolve(place, rows=rows, row_bytes=max(1, round(left / burst) * burst or round(left)))


@functools.lru_cache(maxsize=1 << 14)
def group_cost(timing: Timing, places: tuple[Place, ...]) -> GroupCost:
    """What a group costs in the steady state of its innermost loop: measured over a few turns of the banked memory.

    places: from `_samples`.
    """
    calm = attrs.evolve(timing, refresh=0.0, channel=math.inf)  # both come in later
    scale = max(1.0, *(place.rows / _ROWS for place in places))
    cut = [_cut(place, scale, timing.burst) for place in places]
    turns = min(place.counts[0] for place in cut)
    whole = alone = hits = misses = 0.0
    data = [0] * len(cut)  # bytes in whole bursts, of all turns
    number, waited, opened = len(_OUTER) * turns, 0, 0
    again = any(place.steps[1] != place.steps[0] for place in cut)  # loops around the innermost come back to open pages
    waits, seen = BankedMemory(calm), set[int]()
    for outer in range(len(_OUTER)):
        line = BankedMemory(calm)
        waits, seen = (waits, seen) if again else (BankedMemory(calm), set())
        for turn in range(turns + 1):
            at = [place.base + place.steps[outer] + turn * place.steps[-1] for place in cut]
            ready = math.ceil(waits.bus_cycles) + timing.activate  # all that came before has ended
            new = {number for pair in zip(cut, at, strict=True) for number in _pages(timing, *pair)} - seen
            before, seen = waits.counters.page_misses + len(new), seen | new
            waits.serve([Transfer(i, ready, place, base) for i, (place, base) in enumerate(zip(cut, at, strict=True))])
            if outer if again else turn:  # at first its pages are not open
                alone, waited = alone + waits.bus_cycles - ready, waited + 1
                opened += waits.counters.page_misses > before
            if turn < turns:
                data = [
                    sent + _burst_bytes(timing, *pair)
                    for sent, pair in zip(data, zip(cut, at, strict=True), strict=True)
                ]
                line.serve([Transfer(i, 0, place, base) for i, (place, base) in enumerate(zip(cut, at, strict=True))])
        # without the first opening, which is a constant: a difference of maxima would not be monotone
        whole += line.bus_cycles - timing.activate
    hits, misses = waits.counters.page_hits, waits.counters.page_misses
    share = 1 / (len(_OUTER) if again else 1) / (turns + 1)
    whole, alone, hits, misses = whole / number, alone / waited, hits * share, misses * share
    ends = tuple(sum(min(own, other) for other in data) / sum(data) for own in data)
    ports = tuple(own / number * scale / timing.channel for own in data)
    bus = sum(place.bytes for place in places) / timing.bytes_per_cycle
    return GroupCost(
        whole * scale, alone + whole * (scale - 1), ends, ports, bus, hits * scale, misses * scale, opened / waited
    )


def _ticks(cycles: float) -> int:
    """Cycles in 1/COARSE of a cycle, in steps of at most 1/_STEPS of it where it has as many.

    Coarse steps let a turn of a loop end soon in a state that was there before, after which turns are not run again. A
    longer time never becomes the shorter one.
    """
    whole = math.floor(cycles * COARSE + 0.5)
    step = 1 << max(0, min(whole.bit_length() - _STEPS.bit_length(), COARSE.bit_length() - 1))
    return (whole + step // 2) // step * step


class AveragedMemory:
    """Tile by tile: a group takes the time that its pages take on average, refreshes included. For TRANSACTIONAL."""

    steady = True

    def __init__(self, timing: Timing) -> None:
        self.timing = timing
        self.activate = timing.activate
        self.counters = MemoryCounters()
        self.bus = 0  # in 1/COARSE of a cycle
        self._reach = 0
        self._touched: set[int] = set()  # groups of banks with an open page
        self._ports: dict[int, int] = {}
        self._costs: dict[tuple[tuple[Place, ...], int | None], _Ticks] = {}
        self._reopened: dict[tuple[tuple[Place, ...], int | None], Reopening] = {}
        self.uneven: set[Place] = set()  # places whose turns differ
        self._stretch = 1 / (1 - timing.refresh * timing.banks / timing.interval)  # the bus waits for refreshes

    def expect(self, program: Program) -> None:
        """Look over the program that is to run, for the pages that it finds closed when it comes back to them."""
        self._reopened = reopenings(program, self.timing.page, self.timing.burst, self.timing.group)
        self.uneven = {place for group, turn in self._reopened if turn is not None for place in group}

    def serve(self, group: Sequence[Transfer]) -> list[tuple[int, int]]:
        key = tuple([transfer.place for transfer in group])
        groups = {transfer.base // GROUP_BYTES for transfer in group}
        cold = not groups <= self._touched
        self._touched |= groups
        turn = group[-1].turn if self.uneven and key[-1] in self.uneven else None
        if (key, turn) not in self._costs:
            each = group_cost(self.timing, tuple(_samples(self.timing, place) for place in key))
            reopened = self._reopened.get((key, None if each.reopens else turn))
            self._costs[key, turn] = self._scaled(each, reopened)
        cost = self._costs[key, turn]
        ready = max([transfer.ready for transfer in group]) * COARSE
        if cold:  # its first page is not open yet
            ready += max(0, self.timing.activate * COARSE + cost.whole - cost.alone)
        begin = max(self.bus, ready + cost.alone - cost.whole)
        spans = []
        for index, transfer in enumerate(group):
            end = max(self.bus + cost.ends[index], ready + cost.ends_alone[index])
            end = max(end, self._ports.get(transfer.channel, 0) + cost.ports[index])
            self._ports[transfer.channel] = end
            spans.append((min(begin, end) // COARSE, -(-end // COARSE)))
            self.counters.bytes += transfer.place.bytes
        self.counters.bus += cost.bus
        self.counters.page_hits += cost.hits
        self.counters.page_misses += cost.misses
        self.bus = max(begin + cost.whole, *self._ports.values())
        return spans

    def _scaled(self, cost: GroupCost, reopened: Reopening | None) -> _Ticks:
        """A cost in 1/COARSE of a cycle, longer by the refreshes and the pages that must be opened again.

        Only a transfer that the memory waited for waits for a page: in line, pages are opened ahead.
        """

        def ticks(cycles: float) -> int:
            return _ticks(cycles * self._stretch)

        waited = cost.alone
        if reopened and reopened.share > cost.reopens:
            late = self.timing.activate - reopened.before / self.timing.bytes_per_cycle
            waited += (reopened.share - cost.reopens) * max(0.0, late)
        alone = max(ticks(waited), ticks(cost.whole))
        self.activate = max(self.activate, -(-(alone - ticks(cost.whole)) // COARSE))
        self._reach = max(self._reach, *(ticks(port) for port in cost.ports))
        return _Ticks(
            ticks(cost.whole),
            alone,
            [ticks(end * cost.whole) for end in cost.ends],
            [_ticks(end * alone / COARSE) for end in cost.ends],
            [ticks(port) for port in cost.ports],
            cost.bus,
            cost.hits,
            cost.misses,
        )

    def state(self, base: int) -> tuple[int, ...]:
        """What its future depends on, relative to a cycle; a port free for long counts as free."""
        ports = [self._ports[channel] for channel in sorted(self._ports)]
        return (self.bus - base * COARSE, *(max(port - self.bus, -self._reach) for port in ports))

    def shift(self, cycles: int) -> None:
        """All that is known lies `cycles` later."""
        self.bus += cycles * COARSE
        self._ports = {channel: free + cycles * COARSE for channel, free in self._ports.items()}
