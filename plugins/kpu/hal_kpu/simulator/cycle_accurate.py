"""CYCLE_ACCURATE: the same program with every DRAM page visit, every refresh, and array tiles timed by their PEs."""

from __future__ import annotations

import functools

import numpy as np

from ..profiles.profile import Profile
from .array import multiply
from .dram.averaged import AveragedMemory
from .dram.banked import BankedMemory, Timing
from .engines import Engines, Fault, TooSlow
from .movement import Program
from .stats import Run

REUSE_ABOVE = 50_000
"""Instructions above which the timing of equal tiles is reused; the run then says so."""


@functools.lru_cache(maxsize=65536)
def stepped_cycles(rows: int, cols: int, total: int, preload: int) -> int:
    """Cycles of one array tile, found by stepping its PEs. Operands of any value take the same time.

    total: operand vectors streamed. preload: rows of a stationary operand shifted in before; 0 for output-stationary.
    """
    ones = np.ones
    if preload:
        done = multiply(ones((total, rows), np.int32), ones((rows, cols), np.int32), rows, cols, "ws")
    else:
        done = multiply(ones((rows, total), np.int32), ones((total, cols), np.int32), rows, cols, "os")
    return int(done.tile_cycles[0])


def run_cycle_accurate(
    program: Program,
    profile: Profile,
    fault: Fault | None = None,
    skip_refresh: int | None = None,
    reuse_above: int = REUSE_ABOVE,
) -> Run:
    """Time a movement program.

    Args:
        fault, skip_refresh: something broken, for tests: a lost credit, a bank that is never refreshed.
        reuse_above: programs of more instructions take over loop turns that repeat, with the memory's time averaged.

    Raises:
        BufferTooSmallError: its buffers do not fit the machine.
        DeadlockError: engines wait for each other.
    """
    reuse = program.length > reuse_above
    memory = AveragedMemory(Timing.of(profile)) if reuse else BankedMemory(Timing.of(profile), skip_refresh)
    timeline = Engines(program, profile, memory, stepped_cycles, fault).run()
    refreshes = tuple(memory.refreshes(timeline.makespan)) if isinstance(memory, BankedMemory) else ()
    return Run(
        program=program,
        profile=profile,
        fidelity="cycle_accurate",
        timeline=timeline,
        memory=memory.counters,
        refreshes=refreshes,
        reused=reuse,
    )


def accurate_below(program: Program, profile: Profile, limit: int) -> int | None:
    """Cycles of a program if they stay below `limit` (0: no limit), else None, returned as early as
    possible.
    """
    memory = BankedMemory(Timing.of(profile))
    try:
        cycles = Engines(program, profile, memory, stepped_cycles, limit=limit).run().makespan
    except TooSlow:
        return None
    return cycles if not limit or cycles < limit else None
