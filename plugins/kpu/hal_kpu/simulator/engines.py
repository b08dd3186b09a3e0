"""The engines: queues in order, tokens for tiles, credits for slots. Both timed fidelities run programs here."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import attrs

from hal_core.plugin_api import ContractError, HalError

from ..profiles.profile import Profile
from .dram.averaged import COARSE, AveragedMemory
from .dram.banked import Memory, MemoryCounters, Transfer
from .movement import Instruction, Loop, Opcode, Program
from .timeline import EngineTime, Repeat, Timeline

TileCycles = Callable[[int, int, int, int], int]
_FREE, _KEEP, _AGAIN = range(3)
_WORTH = 8  # turns of a loop from which looking for a repetition takes less time than it saves
_DMA = (Opcode.DMA_LOAD_TILE, Opcode.DMA_STORE_TILE)


class DeadlockError(HalError, RuntimeError):
    """Engines wait for each other. Says which instruction of which engine waits for what.

    Attributes:
        waiting: engine -> what it waits for.
    """

    def __init__(self, program: str, waiting: Mapping[str, str]) -> None:
        text = "; ".join(f"{engine} waits for {what}" for engine, what in waiting.items())
        super().__init__(
            f"program {program} cannot go on: {text}: give a buffer more slots or reorder the instructions"
        )
        self.waiting = dict(waiting)


class TooSlow(HalError):  # noqa: N818
    """A run that has passed its limit."""


class BufferTooSmallError(ContractError):
    """Tiles that do not fit a memory. Says the buffer, its size and the need."""


def capacity(profile: Profile, level: str, arrays: int) -> int:
    """Bytes of a memory level beside `arrays` arrays. L1 is counted by lane, both edges of an array."""
    if level == "L1":
        lanes = profile.count("array.rows") + profile.count("array.cols")
        return profile.count("buffers.l1") * lanes * arrays
    return profile.count(f"buffers.{level.lower()}") * arrays


def check_fit(program: Program, profile: Profile) -> None:
    """Refuse a program whose buffers do not fit.

    Raises:
        BufferTooSmallError: with the buffer, its size and the need.
    """
    used = dict.fromkeys(("L3", "L2", "L1"), 0)
    for buffer in program.buffers:
        if buffer.level == "PE":
            continue
        size, need = capacity(profile, buffer.level, program.arrays), buffer.slots * buffer.slot_bytes
        used[buffer.level] += need
        if used[buffer.level] > size:
            raise BufferTooSmallError(
                f"program {program.name} on {profile.name}: {buffer.level} holds {size:,} B beside {program.arrays} "
                f"arrays, {used[buffer.level]:,} B are needed, {need:,} B of them for buffer {buffer.name!r} "
                f"({buffer.slots} slots of {buffer.slot_bytes:,} B): use smaller tiles or fewer slots"
            )


def tile_cycles(rows: int, cols: int, total: int, preload: int) -> int:
    """Cycles of one array tile: rows of a stationary operand, the stream, and the wave leaving (SCALE-Sim's closed
    forms).
    """
    return preload + total + rows + cols - 2


@attrs.define
class Fault:
    """Something broken, for tests. lost_credit: (buffer, n): the slot freed by its n-th release is lost."""

    lost_credit: tuple[str, int] | None = None


@attrs.define(slots=True)
class _Step:
    """An instruction with everything looked up."""

    number: int
    instruction: Instruction
    engine: int
    queue: int
    takes: tuple[tuple[int, int, int], ...]
    gives: tuple[int, ...]
    cycles: int
    channel: int
    strides: tuple[int, ...]


@attrs.define(slots=True)
class _Turn:
    """A loop with everything looked up, and what its body touches. repeats: whether to look for turns like earlier
    ones.
    """

    count: int
    body: list[Any]
    engines: list[int]
    buffers: list[int]
    memory: bool
    barrier: bool
    repeats: bool


@attrs.define(slots=True)
class _Mark:
    """Where a turn of a loop ended: entries and instructions so far, busy cycles, memory counters."""

    entries: int
    done: int
    busy: list[int]
    counters: MemoryCounters


class Engines:
    """Runs one program once.

    Args:
        program, profile: what and on which machine. Checked to fit.
        memory: shared by all DMA channels.
        cycles: (rows, cols, total, preload) -> cycles of one array tile.
        fault: something broken, for tests. limit: cycles after which the run is given up (`TooSlow`); 0: none.
    """

    def __init__(
        self,
        program: Program,
        profile: Profile,
        memory: Memory,
        cycles: TileCycles = tile_cycles,
        fault: Fault | None = None,
        limit: int = 0,
    ) -> None:
        check_fit(program, profile)
        self.program, self.profile, self.memory, self._tile_cycles = program, profile, memory, cycles
        if isinstance(memory, AveragedMemory):
            memory.expect(program)
        self._lost = fault.lost_credit if fault else None
        self._steady = memory.steady and fault is None  # a fault happens once
        self._engines: list[str] = []
        self._numbers: dict[str, int] = {}
        self._instructions: list[Instruction] = []
        self._buffers = {buffer.name: index for index, buffer in enumerate(program.buffers)}
        self._tokens: list[deque[int]] = [deque() for _ in program.buffers]
        self._credits: list[deque[int]] = [deque([0] * buffer.slots) for buffer in program.buffers]
        self._freed = [0] * len(program.buffers)
        self._body = [self._prepare(item) for item in program.body]
        number = len(self._engines)
        self._free, self._busy = [0] * number, [0] * number
        self._floor = 0
        self._entries: list[Any] = []
        self._group: list[tuple[_Step, tuple[int, ...]]] = []
        self._waiting: dict[int, deque[tuple[_Step, tuple[int, ...]]]] = {}
        self._at: tuple[int, ...] = ()
        self._late: tuple[_Step, tuple[int, ...]] | None = None
        self._done = self._reused = 0
        self._limit = limit

    def run(self) -> Timeline:
        """Run it.

        Raises:
            DeadlockError: with what each engine waits for.
        """
        for item in self._body:
            self._do(item)
        self._flush()
        if self._waiting or self._group:
            raise DeadlockError(self.program.name, self._explain())
        makespan = max(self._free, default=0)
        engines = {
            name: EngineTime(self._busy[i], self._free[i] - self._busy[i], makespan - self._free[i])
            for i, name in enumerate(self._engines)
        }
        return Timeline(
            makespan=makespan,
            engines=engines,
            entries=self._entries,
            instructions=self._instructions,
            reused=self._reused,
        )

    # what is looked up once

    def _prepare(self, item: Instruction | Loop) -> _Step | _Turn:
        if isinstance(item, Instruction):
            return self._step(item)
        body = [self._prepare(inner) for inner in item.body]
        steps = list(_steps(body))
        buffers = {buffer for step in steps for buffer in (*step.gives, *(take[0] for take in step.takes))}
        engines = {step.engine for step in steps if step.engine >= 0}
        return _Turn(
            item.count,
            body,
            sorted(engines),
            sorted(buffers),
            any(step.queue == 0 for step in steps),
            any(step.engine < 0 for step in steps),
            self._steady and item.count >= _WORTH and not self._uneven(item),
        )

    def _uneven(self, loop: Loop) -> bool:
        """Whether turns of a loop differ by more than where the state before them differs."""
        places = [item.place for item in loop.body if isinstance(item, Instruction) and item.place]
        return isinstance(self.memory, AveragedMemory) and not self.memory.uneven.isdisjoint(places)

    def _step(self, instruction: Instruction) -> _Step:
        self._instructions.append(instruction)
        number = len(self._instructions) - 1
        if instruction.opcode is Opcode.BARRIER:
            return _Step(number, instruction, -1, -1, (), (), 0, 0, ())
        if instruction.engine not in self._numbers:
            self._numbers[instruction.engine] = len(self._engines)
            self._engines.append(instruction.engine)
        engine = self._numbers[instruction.engine]
        dma = instruction.opcode in _DMA
        takes = tuple(
            (self._buffers[t.buffer], t.offset, _KEEP if t.keep else _AGAIN if t.again else _FREE)
            for t in instruction.takes
        )
        gives = tuple(self._buffers[name] for name in instruction.gives)
        channel = int(instruction.engine.removeprefix("dma")) if dma else -1
        strides = instruction.place.steps if instruction.place else ()
        return _Step(
            number,
            instruction,
            engine,
            0 if dma else engine + 1,
            takes,
            gives,
            self._cost(instruction),
            channel,
            strides,
        )

    def _cost(self, instruction: Instruction) -> int:
        """Cycles on an engine other than DMA."""
        arrays, opcode = self.program.arrays, instruction.opcode
        if opcode.startswith("BM_"):
            return math.ceil(instruction.bytes / (self.profile["engines.mover_bandwidth"] * arrays))
        if opcode is Opcode.VECTOR:
            return math.ceil(instruction.operations / (self.profile["engines.vector_lanes"] * arrays))
        if opcode is Opcode.COMPUTE:
            wave = 0
            if instruction.total:
                whole = self._tile_cycles(*instruction.array, instruction.total, instruction.held)
                wave = whole - instruction.total - instruction.held
            return instruction.preload + instruction.steps + wave
        return instruction.steps

    # running

    def _do(self, item: _Step | _Turn) -> None:
        if isinstance(item, _Turn):
            self._loop(item)
        elif item.engine < 0:
            self._barrier()
        elif item.instruction.late:
            self._flush()
            self._late = (item, self._at)
        else:
            self._issue(item, self._at)

    def _flush(self) -> None:
        """Let the store in the write queue go."""
        if self._late:
            late, self._late = self._late, None
            self._issue(*late)

    def _issue(self, item: _Step, at: tuple[int, ...]) -> None:
        if item.queue in self._waiting or not self._start(item, at):
            self._waiting.setdefault(item.queue, deque()).append((item, at))
        elif self._waiting:
            self._retry()

    def _retry(self) -> None:
        """Instructions that waited, as long as one of them can start."""
        moved = True
        while moved and self._waiting:
            moved = False
            for queue in list(self._waiting):
                line = self._waiting[queue]
                while line and self._start(*line[0]):
                    line.popleft()
                    moved = True
                if not line:
                    del self._waiting[queue]

    def _barrier(self) -> None:
        self._flush()
        if self._waiting or self._group:
            raise DeadlockError(self.program.name, self._explain())
        self._floor = max(self._free, default=0)

    def _start(self, step: _Step, at: tuple[int, ...]) -> bool:
        """Run an instruction if its tiles and slots are there."""
        ready = self._floor
        for buffer, offset, _ in step.takes:
            tokens = self._tokens[buffer]
            if len(tokens) <= offset:
                return False
            if tokens[offset] > ready:
                ready = tokens[offset]
        for buffer in step.gives:
            slots = self._credits[buffer]
            if not slots:
                return False
            if slots[0] > ready:
                ready = slots[0]
        if step.queue == 0:
            return self._dma(step, at)
        free = self._free[step.engine]
        start = ready if ready > free else free
        for buffer in step.gives:
            self._credits[buffer].popleft()
        self._finish(step, start, start + step.cycles)
        return True

    def _dma(self, step: _Step, at: tuple[int, ...]) -> bool:
        """Collect a group; serve it when its last transfer can start. Slots are taken at once, tiles wait."""
        for buffer in step.gives:  # a slot is held from now on: nobody else of the group may count on it
            if len(self._credits[buffer]) <= sum(buffer in other.gives for other, _ in self._group):
                return False
        self._group.append((step, at))
        if step.instruction.together:
            return True
        group, self._group = self._group, []
        transfers = []
        for member, turns in group:
            ready = self._floor
            for buffer, offset, _ in member.takes:
                ready = max(ready, self._tokens[buffer][offset])
            for buffer in member.gives:
                ready = max(ready, self._credits[buffer].popleft())
            place = member.instruction.place
            assert place is not None
            base = place.base + sum(map(int.__mul__, member.strides, turns))
            transfers.append(Transfer(member.channel, ready, place, base, turns[-1] if turns else 0))
        for (member, _), (start, end) in zip(group, self.memory.serve(transfers), strict=True):
            start = max(start, self._free[member.engine])
            self._finish(member, start, max(start, end))
        return True

    def _finish(self, step: _Step, start: int, end: int) -> None:
        self._free[step.engine] = end
        self._busy[step.engine] += end - start
        self._done += 1
        self._entries.append((step.number, start, end))
        for buffer, offset, way in step.takes:
            if way == _KEEP:
                continue
            tokens = self._tokens[buffer]
            if way == _AGAIN:
                tokens.append(tokens[offset])
                del tokens[offset]
                continue
            del tokens[offset]
            self._freed[buffer] += 1
            if self._lost and self._lost == (self.program.buffers[buffer].name, self._freed[buffer]):
                continue
            self._credits[buffer].append(end)
        for buffer in step.gives:
            self._tokens[buffer].append(end)

    # loops

    def _loop(self, turn: _Turn) -> None:
        outside = self._at
        before_loop = [max(tokens, default=-1) for tokens in self._tokens], list(self._freed)
        seen: dict[tuple[Any, ...], tuple[int, int, _Mark]] = {}
        index = 0
        while index < turn.count:
            self._at = (*outside, index)
            for item in turn.body:
                self._do(item)
            index += 1
            if self._limit and max(self._free) > self._limit:
                raise TooSlow(f"program {self.program.name} takes more than {self._limit} cycles")
            if not turn.repeats or index >= turn.count or self._waiting or self._group:
                continue
            base, state = self._relative(turn)
            if state in seen:
                before, old_base, mark = seen[state]
                times, left = divmod(turn.count - index, index - before)
                if times:
                    self._skip(turn, mark, times, base - old_base, *before_loop)
                    index = turn.count - left
                seen = {}
            else:
                mark = _Mark(len(self._entries), self._done, list(self._busy), self.memory.counters.copy())
                seen[state] = (index, base, mark)
        self._at = outside

    def _relative(self, turn: _Turn) -> tuple[int, tuple[Any, ...]]:
        """The state that the body's future depends on, relative to a time before which nothing of it can start.

        Two turns that end in equal states are followed by equal turns, shifted: all rules are maxima and sums, and what
        lies before that time decides no maximum. So the repetition is exact, not an estimate.
        """
        memory = self.memory if isinstance(self.memory, AveragedMemory) and turn.memory else None
        bases = [self._free[engine] for engine in turn.engines if not self._engines[engine].startswith("dma")]
        if memory is not None:
            bases.append(memory.bus // COARSE)
        base = min(bases, default=0)
        low = base - self.memory.activate - 1
        state: list[Any] = [self._free[engine] - base for engine in turn.engines]
        if memory is not None:
            state.append(memory.state(base))
        state.append(max(self._floor, low) - base)
        state.append(self._late[0].number if self._late else -1)
        for buffer in turn.buffers:
            state.append(tuple([t - base if t > low else low - base for t in self._tokens[buffer]]))
            state.append(tuple([t - base if t > low else low - base for t in self._credits[buffer]]))
        return base, tuple(state)

    def _skip(
        self, turn: _Turn, mark: _Mark, times: int, period: int, newest: Sequence[int], freed: Sequence[int]
    ) -> None:
        """Repeat `times` times what happened since a mark, every `period` cycles."""
        self._entries.append(Repeat(mark.entries, len(self._entries), times, period))
        self._reused += times * (self._done - mark.done)
        self._done += times * (self._done - mark.done)
        self.memory.counters.repeat(mark.counters, times)
        for engine, busy in enumerate(mark.busy):
            self._busy[engine] += times * (self._busy[engine] - busy)
        shift = times * period
        for engine in turn.engines:
            self._free[engine] += shift
        if turn.barrier:
            self._floor += shift
        if turn.memory and isinstance(self.memory, AveragedMemory):
            self.memory.shift(shift)
        for buffer in turn.buffers:
            tokens, slots = self._tokens[buffer], self._credits[buffer]
            for index, time in enumerate(tokens):  # what came in the loop; older tiles lie before all that follows
                tokens[index] = time + shift if time > newest[buffer] else time
            for index in range(max(0, len(slots) - self._freed[buffer] + freed[buffer]), len(slots)):
                slots[index] += shift

    def _explain(self) -> dict[str, str]:
        """What the first instruction of every waiting engine waits for."""
        found: dict[str, str] = {}
        for step, _ in [*(line[0] for line in self._waiting.values()), *self._group]:
            names = [buffer.name for buffer in self.program.buffers]
            wants = [f"a tile in buffer {names[b]!r}" for b, offset, _ in step.takes if len(self._tokens[b]) <= offset]
            wants += [f"a free slot of buffer {names[b]!r}" for b in step.gives if not self._credits[b]]
            reason = " and ".join(wants) or "the rest of its group of transfers"
            found.setdefault(self._engines[step.engine], f"{reason}, to run {step.instruction.opcode}")
        return found


def _steps(body: Sequence[_Step | _Turn]) -> list[_Step]:
    found: list[_Step] = []
    for item in body:
        found += _steps(item.body) if isinstance(item, _Turn) else [item]
    return found
