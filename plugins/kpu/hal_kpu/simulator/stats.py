"""What a run cost: cycles, bytes, pages, by engine and by memory level."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import attrs

from ..profiles.profile import Profile
from .dram.banked import MemoryCounters
from .movement import Opcode, Program
from .timeline import EngineTime, Span, Timeline

LEVELS = ("dram", "l3", "l2", "l1")
MOVERS = ("dma", "mover", "streamer")


@attrs.frozen(kw_only=True)
class Run:
    """One movement program that ran on one machine.

    Attributes:
        program, profile: what ran where. fidelity: "transactional" or "cycle_accurate".
        timeline: when. memory: what the DRAM did. refreshes: of each bank (banked memory; else empty).
        reused: the timing of equal tiles was reused from one that was simulated in less detail than the fidelity
            says.
    """

    program: Program
    profile: Profile
    fidelity: str
    timeline: Timeline
    memory: MemoryCounters
    refreshes: tuple[int, ...] = ()
    reused: bool = False

    @property
    def cycles(self) -> int:
        return self.timeline.makespan


@attrs.frozen(kw_only=True)
class Part:
    """One operation of a program in its run: its label, the cycle it begins, and its run (None: it took no time)."""

    label: str
    start: int
    run: Run | None


@attrs.define(kw_only=True)
class ExecutionStats:
    """What an execution cost. All simulated or modelled; nothing is measured on silicon.

    Attributes:
        cycles: from start to end. compute_cycles: array and vector unit busy. memory_cycles: DRAM bus busy, rounded up.
        busy_cycles, stall_cycles, idle_cycles: of the PE array; they add to `cycles`.
        drain_cycles: outputs leaving the array through the drain streamer (mostly beside the next tile's compute).
        matmul_flops: 2 x total_macs. vector_operations: elements x passes of the vector units.
        memory_bytes: moved on the chip (block movers and streamers). external_bytes: over the DRAM bus.
        page_hits, page_misses: of DRAM page visits; in TRANSACTIONAL as in the steady state of the innermost loop.
        ops_executed: operations (not instructions).
        utilization: MACs over what all PEs for this dtype could do in `cycles`.
        engines: `EngineTime` by engine. traffic: bytes by memory level ("dram", "l3", "l2", "l1") and by mover of bytes
            ("dma", "mover", "streamer"). macs_by_dtype: of the operands.
        active_macs: multiply-accumulates that the stepped PEs did; None where none were stepped.
        execution_backend: the fidelity, and whether tile timing was reused.
        fused: operations that ran as one, their opcodes with "+" between.
        parts: operation by operation, for timelines.
    """

    clock_hz: float
    profile: str
    execution_backend: str
    cycles: int = 0
    compute_cycles: int = 0
    memory_cycles: int = 0
    drain_cycles: int = 0
    busy_cycles: int = 0
    stall_cycles: int = 0
    idle_cycles: int = 0
    total_macs: int = 0
    vector_operations: int = 0
    memory_bytes: int = 0
    external_bytes: int = 0
    page_hits: int = 0
    page_misses: int = 0
    ops_executed: int = 0
    bound_cycles: int = 0
    peak_macs: int = 1
    engines: dict[str, EngineTime] = attrs.field(factory=dict)
    traffic: dict[str, int] = attrs.field(factory=lambda: dict.fromkeys((*LEVELS, *MOVERS), 0))
    macs_by_dtype: dict[str, int] = attrs.field(factory=dict)
    timing_reused: bool = False
    active_macs: int | None = None
    fused: list[str] = attrs.field(factory=list)
    parts: list[Part] = attrs.field(factory=list, repr=False)

    @property
    def seconds(self) -> float:
        return self.cycles / self.clock_hz

    @property
    def matmul_flops(self) -> int:
        return 2 * self.total_macs

    @property
    def gflops(self) -> float:
        """1e9 matmul operations a second."""
        return self.matmul_flops / self.seconds / 1e9 if self.cycles else 0.0

    @property
    def utilization(self) -> float:
        return self.total_macs / (self.cycles * self.peak_macs) if self.cycles else 0.0

    @property
    def efficiency(self) -> float:
        """The larger of each operation's compute bound and memory bound, over the cycles taken; 1 is the best."""
        return self.bound_cycles / self.cycles if self.cycles else 0.0

    @property
    def memory_bandwidth_gbps(self) -> float:
        """1e9 bytes a second over the DRAM bus."""
        return self.external_bytes / self.seconds / 1e9 if self.cycles else 0.0

    def spans(self, limit: int | None = None) -> Iterator[Span]:
        """Every span of every operation in time of the whole, at most `limit`."""
        count = 0
        for part in self.parts:
            for span in part.run.timeline.spans() if part.run else ():
                if limit is not None and count >= limit:
                    return
                count += 1
                name = f"{part.label} {span.name}" if part.label else span.name
                yield attrs.evolve(span, name=name, start=span.start + part.start, end=span.end + part.start)

    def add(self, run: Run | None, label: str = "", operations: int = 1) -> None:
        """Another operation, or so many that ran as one, after a barrier; None for one that takes no time."""
        self.parts.append(Part(label=label, start=self.cycles, run=run))
        self.ops_executed += operations
        if operations > 1:
            self.fused.append(label)
        if run is None:
            return
        program, timeline = run.program, run.timeline
        _add_engines(self.engines, timeline.engines, self.cycles, run.cycles)
        self.cycles += run.cycles
        array = timeline.engines.get("array", EngineTime(0, 0, run.cycles))
        vector = timeline.engines.get("vector", EngineTime(0, 0, run.cycles))
        self.busy_cycles += array.busy
        self.stall_cycles += array.stall
        self.idle_cycles += array.idle
        self.compute_cycles += array.busy + vector.busy
        self.drain_cycles += timeline.engines["drain"].busy if "drain" in timeline.engines else 0
        self.memory_cycles += -int(-run.memory.bus // 1)
        macs = program.total("macs")
        self.total_macs += macs
        if macs:
            self.macs_by_dtype[program.dtype] = self.macs_by_dtype.get(program.dtype, 0) + macs
        self.vector_operations += program.total("operations")
        for key, size in traffic(program).items():
            self.traffic[key] += size
        self.external_bytes += run.memory.bytes
        self.memory_bytes = self.traffic["mover"] + self.traffic["streamer"]
        self.page_hits += round(run.memory.page_hits)
        self.page_misses += round(run.memory.page_misses)
        self.bound_cycles += bound(run)
        if run.reused:
            self.timing_reused = True
            self.execution_backend = f"{run.fidelity} (timing of equal tiles reused)"
        rows, cols, number = run.profile.arrays(program.dtype)
        self.peak_macs = max(self.peak_macs, rows * cols * number) if macs else self.peak_macs

    def count(self, macs: int, operations: int, dtype: str) -> None:
        """An operation's work where nothing is timed."""
        self.total_macs += macs
        self.vector_operations += operations
        if macs:
            self.macs_by_dtype[dtype] = self.macs_by_dtype.get(dtype, 0) + macs


def new_stats(profile: Profile, fidelity: str = "transactional") -> ExecutionStats:
    """Empty counters of runs on a machine."""
    return ExecutionStats(clock_hz=profile["clock.frequency"], profile=profile.name, execution_backend=fidelity)


def _add_engines(total: dict[str, EngineTime], more: Mapping[str, EngineTime], before: int, cycles: int) -> None:
    """Engines that an operation does not have were idle."""
    for name in {*total, *more}:
        old, new = total.get(name, EngineTime(0, 0, before)), more.get(name, EngineTime(0, 0, cycles))
        total[name] = EngineTime(old.busy + new.busy, old.stall + new.stall, old.idle + new.idle)


def bound(run: Run) -> int:
    """Cycles that no schedule of this program could go below: its MACs, its vector operations, its DRAM bytes."""
    program, profile = run.program, run.profile
    rows, cols, _ = profile.arrays(program.dtype)
    lanes = profile["engines.vector_lanes"] * program.arrays
    limits = (
        program.total("macs") / (rows * cols * program.arrays),
        program.total("operations") / lanes,
        run.memory.bytes / profile.bytes_per_cycle(),
    )
    return -int(-max(limits) // 1)


def traffic(program: Program) -> dict[str, int]:
    """Bytes by level and by mover: a byte moved between two levels counts once at each."""
    loads = program.total("bytes", Opcode.DMA_LOAD_TILE, Opcode.DMA_STORE_TILE)
    moves = program.total("bytes", *(op for op in Opcode if op.startswith("BM_")))
    feeds = program.total("bytes", Opcode.STR_FEED_ROWS, Opcode.STR_FEED_COLS)
    drains = program.total("bytes", Opcode.STR_DRAIN_OUTPUT)
    vector = program.total("bytes", Opcode.VECTOR)
    return {
        "dram": loads,
        "l3": loads + moves,
        "l2": moves + feeds + drains + vector,
        "l1": 2 * feeds,
        "dma": loads,
        "mover": moves,
        "streamer": feeds + drains,
    }
