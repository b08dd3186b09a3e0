"""The program of a KPU: the schedule by which tiles move. Compute fires as data arrives.

Every instruction belongs to one engine, and every engine runs its instructions in order. Engines meet in buffers: a
buffer has slots, an instruction that gives a tile to a buffer needs a free slot (a credit), and one that takes a tile
waits for the oldest tile there (a token) and frees its slot when it ends. So the whole program is a graph of maxima and
sums: a faster engine, a faster memory or another slot can make no instruction later.

    program = Builder("copy")
    program.buffer("tile", "L3", slots=2, slot_bytes=4096)
    with program.loop(8):
        program.load("tile", 4096)
        program.store("tile", 4096)
    timing = run_transactional(program.build(), profile)
"""

from __future__ import annotations

import enum
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, TypeAlias

import attrs

from hal_core.plugin_api import ContractError

BANK_GROUPS, GROUP_BYTES = 4, 1 << 44
"""A byte address says the group of banks that it lies in: address // GROUP_BYTES."""

Level: TypeAlias = Literal["L3", "L2", "L1", "PE"]
Reorder: TypeAlias = Literal["identity", "transpose", "reshape", "shuffle"]


class ProgramError(ContractError):
    """A movement program that cannot be: an unknown buffer, a tile larger than its slot, an empty loop."""


class Opcode(enum.StrEnum):
    """The instructions of the engines."""

    DMA_LOAD_TILE = "DMA_LOAD_TILE"
    DMA_STORE_TILE = "DMA_STORE_TILE"
    BM_IDENTITY_TILE = "BM_IDENTITY_TILE"
    BM_TRANSPOSE_TILE = "BM_TRANSPOSE_TILE"
    BM_RESHAPE_TILE = "BM_RESHAPE_TILE"
    BM_SHUFFLE_TILE = "BM_SHUFFLE_TILE"
    STR_FEED_ROWS = "STR_FEED_ROWS"
    STR_FEED_COLS = "STR_FEED_COLS"
    STR_DRAIN_OUTPUT = "STR_DRAIN_OUTPUT"
    COMPUTE = "COMPUTE"
    VECTOR = "VECTOR"
    BARRIER = "BARRIER"


@attrs.frozen
class Buffer:
    """Slots for tiles of one kind. level: the memory they lie in ("PE": the accumulators of the array itself)."""

    name: str
    level: Level
    slots: int
    slot_bytes: int


@attrs.frozen
class Take:
    """A tile read from a buffer: the one `offset` places behind the oldest.

    keep: it stays where it is. again: it goes to the end of the queue, so that a loop finds all tiles once more.
    """

    buffer: str
    offset: int = 0
    keep: bool = False
    again: bool = False


@attrs.frozen(cache_hash=True)
class Place:
    """Where a tile lies in DRAM: `rows` pieces of `row_bytes`, `pitch` bytes apart, from byte `base` on.

    `steps`: how far it moves with each turn of the loops around the instruction, outermost first. `counts`: how often
    they turn, where that is known; the averaged memory then looks at no place that does not come.
    """

    base: int
    row_bytes: int
    rows: int = 1
    pitch: int = 0
    steps: tuple[int, ...] = ()
    counts: tuple[int, ...] = ()

    @property
    def bytes(self) -> int:
        return self.rows * self.row_bytes


@attrs.frozen
class Instruction:
    """One tile's step on one engine.

    Attributes:
        takes, gives: the tiles it waits for, and the buffers it needs a slot of.
        bytes: moved. place: where in DRAM, for DMA.
        together: a DMA shares the memory burst by burst with the DMA that follows it.
        late: a store waits in the write queue (one deep) until the next store, a barrier or the end, so that loads
            written after it go first.
        steps: cycles an operand stream takes (streamers, COMPUTE). total: of a COMPUTE that ends an array tile, the
            steps of the whole tile, else 0: the wave then leaves the array.
        preload: rows of a stationary operand shifted in before (COMPUTE). held: the same, at the end of the tile.
        array: (rows, cols) of the arrays it is for (COMPUTE).
        macs: useful multiply-accumulates (COMPUTE). operations: elements x passes (VECTOR).
    """

    opcode: Opcode
    engine: str
    takes: tuple[Take, ...] = ()
    gives: tuple[str, ...] = ()
    bytes: int = 0
    place: Place | None = None
    together: bool = False
    late: bool = False
    steps: int = 0
    total: int = 0
    preload: int = 0
    held: int = 0
    array: tuple[int, int] = (0, 0)
    macs: int = 0
    operations: int = 0
    label: str = ""


@attrs.frozen
class Loop:
    """LOOP_BEGIN count ... LOOP_END."""

    count: int
    body: tuple[Instruction | Loop, ...]


@attrs.frozen(kw_only=True)
class Program:
    """A movement program. arrays: how many PE arrays, with their L3, L2, movers and vector units, work in step."""

    name: str
    arrays: int
    buffers: tuple[Buffer, ...]
    body: tuple[Instruction | Loop, ...]
    dtype: str = "float32"

    def instructions(self) -> Iterator[tuple[Instruction, int]]:
        """Every instruction once, with how often it runs."""
        yield from _walk(self.body, 1)

    def total(self, what: str, *opcodes: Opcode) -> int:
        """Sum of "bytes", "macs" or "operations" over everything that runs."""
        return sum(
            getattr(instruction, what) * times
            for instruction, times in self.instructions()
            if not opcodes or instruction.opcode in opcodes
        )

    @property
    def length(self) -> int:
        """Instructions that run."""
        return sum(times for _, times in self.instructions())

    def listing(self) -> str:
        """The program as text, one instruction a line."""
        lines = [f"PROGRAM {self.name}, {self.arrays} arrays"]
        lines += [f"BUFFER {b.name} {b.level} {b.slots} x {b.slot_bytes} B" for b in self.buffers]
        return "\n".join([*lines, *_lines(self.body, "")])


def _walk(body: Sequence[Instruction | Loop], times: int) -> Iterator[tuple[Instruction, int]]:
    for item in body:
        if isinstance(item, Loop):
            yield from _walk(item.body, times * item.count)
        else:
            yield item, times


def _lines(body: Sequence[Instruction | Loop], indent: str) -> Iterator[str]:
    for item in body:
        if isinstance(item, Loop):
            yield f"{indent}LOOP_BEGIN {item.count}"
            yield from _lines(item.body, indent + "  ")
            yield f"{indent}LOOP_END"
            continue
        taken = [
            f"{t.buffer}{f'[{t.offset}]' if t.offset else ''}{' kept' if t.keep else ' again' if t.again else ''}"
            for t in item.takes
        ]
        flow = f"{', '.join(taken) or '-'} -> {', '.join(item.gives) or '-'}"
        size = f"{item.bytes} B" if item.bytes else f"{item.steps or item.operations}"
        yield f"{indent}{item.opcode} {item.engine}: {flow}, {size}{' together' if item.together else ''}"


class Builder:
    """Writes a program, instruction by instruction; what cannot be is refused where it is written.

    Engines: "dma0", "dma1", ... (channels), "mover0", ... (block movers), "rows", "cols", "drain" (streamers),
    "array", "vector". All channels share the DRAM, which serves them in the order of the program. An order in which
    each tile is given before it is taken, and each slot is freed before it is needed, is simulated fastest; any other
    works as long as the engines can run it.
    """

    def __init__(self, name: str, arrays: int = 1, dtype: str = "float32") -> None:
        self.name, self.arrays, self.dtype = name, arrays, dtype
        self._buffers: dict[str, Buffer] = {}
        self._open: list[list[Instruction | Loop]] = [[]]
        self._end = self._regions = 0
        self._together = False

    def buffer(self, name: str, level: Level, slots: int, slot_bytes: int) -> str:
        """A new buffer; returns its name."""
        if name in self._buffers:
            raise ProgramError(f"program {self.name}: buffer {name!r} was made twice: give another name")
        if slots < 1 or slot_bytes < 0:
            raise ProgramError(
                f"program {self.name}: buffer {name!r}: {slots} slots of {slot_bytes} B: one slot at least"
            )
        self._buffers[name] = Buffer(name, level, slots, slot_bytes)
        return name

    def region(self, size: int, align: int = 1 << 16) -> int:
        """First byte of a new region of `size` bytes in DRAM. Regions take turns in the groups of banks
        (`BANK_GROUPS`): streams from different groups do not close each other's pages."""
        base = self._regions % BANK_GROUPS * GROUP_BYTES + self._end
        self._regions += 1
        self._end += -(-size // align) * align
        return base

    @contextmanager
    def loop(self, count: int) -> Iterator[None]:
        """What is written inside runs `count` times; nothing is left of it where count is 0."""
        self._open.append([])
        try:
            yield
        finally:
            body = self._open.pop()
        if count > 0 and body:
            self._open[-1].append(Loop(count, tuple(body)))

    @contextmanager
    def together(self) -> Iterator[None]:
        """The DMAs written inside share the memory equally, burst by burst."""
        self._together = True
        try:
            yield
        finally:
            self._together = False
        for index in range(len(self._open[-1]) - 1, -1, -1):
            last = self._open[-1][index]
            if isinstance(last, Instruction) and last.together:  # the last of the group closes it
                self._open[-1][index] = attrs.evolve(last, together=False)
                return

    def load(self, gives: str, size: int, *, channel: int = 0, place: Place | None = None, label: str = "") -> None:
        """DRAM -> a buffer."""
        self._dma(Opcode.DMA_LOAD_TILE, (), (gives,), size, channel, place, label)

    def store(
        self,
        takes: str | Take,
        size: int,
        *,
        channel: int = 0,
        place: Place | None = None,
        late: bool = False,
        label: str = "",
    ) -> None:
        """A buffer -> DRAM."""
        self._dma(Opcode.DMA_STORE_TILE, (takes,), (), size, channel, place, label, late)

    def _dma(
        self,
        opcode: Opcode,
        takes: Sequence[str | Take],
        gives: Sequence[str],
        size: int,
        channel: int,
        place: Place | None,
        label: str,
        late: bool = False,
    ) -> None:
        place = place or Place(0, size)
        if place.bytes != size:
            raise ProgramError(
                f"program {self.name}: a DMA of {size} B lies in a place of {place.bytes} B: make them equal"
            )
        if late and self._together:
            raise ProgramError(
                f"program {self.name}: a late store shares no group of transfers: write it outside together()"
            )
        self._add(
            opcode,
            f"dma{channel}",
            takes,
            gives,
            bytes=size,
            place=place,
            together=self._together,
            late=late,
            label=label,
        )

    def move(
        self,
        takes: str | Take | Sequence[str | Take],
        gives: str | Sequence[str],
        size: int,
        *,
        mover: int = 0,
        reorder: Reorder = "identity",
        label: str = "",
    ) -> None:
        """Block mover: a tile from buffers to buffers."""
        self._add(Opcode(f"BM_{reorder.upper()}_TILE"), f"mover{mover}", takes, gives, bytes=size, label=label)

    def feed_rows(self, takes: str | Take, gives: str, size: int, steps: int, label: str = "") -> None:
        """Streamer: a tile into the lanes of the rows, `steps` elements a lane."""
        self._add(Opcode.STR_FEED_ROWS, "rows", takes, gives, bytes=size, steps=steps, label=label)

    def feed_cols(self, takes: str | Take, gives: str, size: int, steps: int, label: str = "") -> None:
        """Streamer: a tile into the lanes of the columns, `steps` elements a lane."""
        self._add(Opcode.STR_FEED_COLS, "cols", takes, gives, bytes=size, steps=steps, label=label)

    def compute(
        self,
        takes: Sequence[str | Take],
        gives: Sequence[str] | str = (),
        *,
        steps: int,
        total: int = 0,
        preload: int = 0,
        held: int = 0,
        array: tuple[int, int],
        macs: int = 0,
        label: str = "",
    ) -> None:
        """The arrays: `steps` operand vectors of a tile; the last part of a tile says its `total` of steps.

        Where an operand is stationary, the first part says the rows to `preload`, the last part the rows `held`.
        """
        self._add(
            Opcode.COMPUTE,
            "array",
            takes,
            gives,
            steps=steps,
            total=total,
            preload=preload,
            held=held,
            array=array,
            macs=macs,
            label=label,
        )

    def drain(self, takes: str | Take, gives: str, size: int, steps: int, label: str = "") -> None:
        """Streamer: outputs out of the arrays, `steps` cycles."""
        self._add(Opcode.STR_DRAIN_OUTPUT, "drain", takes, gives, bytes=size, steps=steps, label=label)

    def vector(
        self,
        takes: str | Take | Sequence[str | Take],
        gives: str | Sequence[str] = (),
        *,
        operations: int,
        size: int = 0,
        label: str = "",
    ) -> None:
        """The vector units: `operations` = elements x passes over them. size: bytes read and written, for the
        record.
        """
        self._add(Opcode.VECTOR, "vector", takes, gives, operations=operations, bytes=size, label=label)

    def barrier(self) -> None:
        """Nothing that follows starts before all that precedes has ended."""
        self._open[-1].append(Instruction(Opcode.BARRIER, "all"))

    def build(self) -> Program:
        """The finished program."""
        if len(self._open) != 1:
            raise ProgramError(f"program {self.name}: {len(self._open) - 1} loops are still open: close them")
        return Program(
            name=self.name,
            arrays=self.arrays,
            buffers=tuple(self._buffers.values()),
            body=tuple(self._open[0]),
            dtype=self.dtype,
        )

    def _add(
        self,
        opcode: Opcode,
        engine: str,
        takes: str | Take | Sequence[str | Take],
        gives: str | Sequence[str],
        **rest: Any,
    ) -> None:
        taken = (takes,) if isinstance(takes, str | Take) else takes
        tiles = tuple(Take(take) if isinstance(take, str) else take for take in taken)
        given = (gives,) if isinstance(gives, str) else tuple(gives)
        for name in (*(tile.buffer for tile in tiles), *given):
            if name not in self._buffers:
                raise ProgramError(f"program {self.name}: {opcode} names buffer {name!r}: make it with buffer() first")
        for name in given:
            need, buffer = rest.get("bytes", 0), self._buffers[name]
            if len(given) == 1 and opcode is not Opcode.VECTOR and need > buffer.slot_bytes:
                raise ProgramError(
                    f"program {self.name}: {opcode} gives {need} B to buffer {name!r} in {buffer.level}, whose slots "
                    f"hold {buffer.slot_bytes} B: split the tile or make the slots larger"
                )
        self._open[-1].append(Instruction(opcode, engine, tiles, given, **rest))
