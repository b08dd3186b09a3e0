"""When each engine did what. Turns of a loop that repeat exactly are kept once, with how often and how far apart."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence

import attrs

from .movement import Instruction


@attrs.frozen
class Span:
    """One instruction on one engine, in cycles: from `start` to before `end`."""

    engine: str
    name: str
    start: int
    end: int
    bytes: int
    kind: str


@attrs.frozen
class EngineTime:
    """Cycles of one engine; they add to the makespan.

    Attributes:
        busy: it worked.
        stall: it held an instruction that waited for a tile, a slot or the memory.
        idle: it had no instruction left.
    """

    busy: int
    stall: int
    idle: int

    @property
    def total(self) -> int:
        return self.busy + self.stall + self.idle


@attrs.frozen
class Repeat:
    """Entries `first` to before `last` happened `times` times more, each time `period` cycles later."""

    first: int
    last: int
    times: int
    period: int


@attrs.frozen(kw_only=True)
class Timeline:
    """What an engine simulator returns.

    Attributes:
        makespan: end of the last span, in cycles.
        engines: busy, stall and idle cycles by engine.
        entries: (instruction number, start, end), or `Repeat`, in no particular order of time.
        instructions: by number.
        reused: instructions whose timing was copied from an exact repetition.
    """

    makespan: int
    engines: Mapping[str, EngineTime]
    entries: Sequence[tuple[int, int, int] | Repeat]
    instructions: Sequence[Instruction]
    reused: int = 0

    def spans(self, limit: int | None = None) -> Iterator[Span]:
        """Every span, repetitions written out; at most `limit` of them."""
        for count, (number, start, end) in enumerate(self._expand(0, len(self.entries), 0)):
            if limit is not None and count >= limit:
                return
            done = self.instructions[number]
            yield Span(done.engine, done.label or done.opcode.value, start, end, done.bytes, done.opcode.value)

    def _expand(self, first: int, last: int, shift: int) -> Iterator[tuple[int, int, int]]:
        for entry in self.entries[first:last]:
            if isinstance(entry, Repeat):
                for turn in range(1, entry.times + 1):
                    yield from self._expand(entry.first, entry.last, shift + turn * entry.period)
            else:
                yield entry[0], entry[1] + shift, entry[2] + shift

    def sums(self) -> dict[str, tuple[int, int, int]]:
        """By engine, from the entries themselves: busy cycles, number of spans, end of the last one."""
        busy: dict[str, int] = defaultdict(int)
        number: dict[str, int] = defaultdict(int)
        last: dict[str, int] = defaultdict(int)
        for engine, cycles, times, end in self._weighted(0, len(self.entries), 1, 0):
            busy[engine] += cycles * times
            number[engine] += times
            last[engine] = max(last[engine], end)
        return {engine: (busy[engine], number[engine], last[engine]) for engine in busy}

    def _weighted(self, first: int, last: int, times: int, shift: int) -> Iterator[tuple[str, int, int, int]]:
        for entry in self.entries[first:last]:
            if isinstance(entry, Repeat):
                if entry.times:
                    furthest = shift + entry.times * entry.period
                    yield from self._weighted(entry.first, entry.last, times * entry.times, furthest)
            else:
                yield self.instructions[entry[0]].engine, entry[2] - entry[1], times, entry[2] + shift
