"""TRANSACTIONAL: tile-level events on the same engines, buffers and memory order, without stepping the PEs.

An array tile takes the cycles of its closed form. A short program's transfers visit their DRAM pages one by one; in a
longer one a transfer takes the time of its pages on average, refreshes included, and iterations that repeat an earlier
state are reused exactly (`Engines`), so that a large product costs no more than a small one. An average is no help
where a program ends before anything repeats: its few refreshes and conflicts of banks are where they are.
"""

from __future__ import annotations

from ..profiles.profile import Profile
from .dram.averaged import AveragedMemory
from .dram.banked import BankedMemory, Timing
from .engines import Engines, Fault, TooSlow
from .movement import Program
from .stats import Run

SHORT_ROWS, SHORT_BYTES, SHORT_STEPS, SHORT_OPERATIONS = 50_000, 6 << 20, 50_000, 1 << 20
"""Of a short program: rows and bytes moved to and from DRAM, operand vectors through the arrays, operations of the
vector units. They are of the program alone: a faster machine runs it in the same way, and therefore no slower.
"""


def is_short(program: Program) -> bool:
    """Whether a program's transfers are timed page by page."""
    rows = size = steps = operations = 0
    for instruction, times in program.instructions():
        if instruction.place is not None:
            rows += instruction.place.rows * times
            size += instruction.bytes * times
        steps += (instruction.steps + instruction.preload) * times
        operations += instruction.operations * times
    return rows <= SHORT_ROWS and size <= SHORT_BYTES and steps <= SHORT_STEPS and operations <= SHORT_OPERATIONS


def memory_for(program: Program, profile: Profile) -> AveragedMemory | BankedMemory:
    """A machine's DRAM at the detail that the program's length asks for."""
    return (BankedMemory if is_short(program) else AveragedMemory)(Timing.of(profile))


def run_transactional(program: Program, profile: Profile, fault: Fault | None = None) -> Run:
    """Time a movement program.

    Raises:
        BufferTooSmallError: its buffers do not fit the machine.
        DeadlockError: engines wait for each other.
    """
    memory = memory_for(program, profile)
    timeline = Engines(program, profile, memory, fault=fault).run()
    return Run(program=program, profile=profile, fidelity="transactional", timeline=timeline, memory=memory.counters)


def cycles_below(program: Program, profile: Profile, limit: int) -> int | None:
    """Cycles of a program if they stay below `limit` (0: no limit), else None, returned as early as
    possible.
    """
    try:
        cycles = Engines(program, profile, memory_for(program, profile), limit=limit).run().makespan
    except TooSlow:
        return None
    return cycles if not limit or cycles < limit else None
