"""TRANSACTIONAL: tile-level events on the same engines, buffers and memory order, without stepping the PEs.

An array tile takes the cycles of its closed form and a transfer the time of its pages on average, refreshes included.
Iterations that repeat an earlier state are reused exactly (`Engines`), so that a large product costs no more than a
small one.
"""

from __future__ import annotations

from ..profiles.profile import Profile
from .dram.averaged import AveragedMemory
from .dram.banked import Timing
from .engines import Engines, Fault, TooSlow
from .movement import Program
from .stats import Run


def run_transactional(program: Program, profile: Profile, fault: Fault | None = None) -> Run:
    """Time a movement program.

    Raises:
        BufferTooSmallError: its buffers do not fit the machine.
        DeadlockError: engines wait for each other.
    """
    memory = AveragedMemory(Timing.of(profile))
    timeline = Engines(program, profile, memory, fault=fault).run()
    return Run(program=program, profile=profile, fidelity="transactional", timeline=timeline, memory=memory.counters)


def cycles_below(program: Program, profile: Profile, limit: int) -> int | None:
    """Cycles of a program if they stay below `limit` (0: no limit), else None, returned as early as
    possible.
    """
    try:
        cycles = Engines(program, profile, AveragedMemory(Timing.of(profile)), limit=limit).run().makespan
    except TooSlow:
        return None
    return cycles if not limit or cycles < limit else None
