"""What the operations of a DFX program cost, one after the other."""

from __future__ import annotations

import functools

from ..frontend.dfx.program import DFXProgram
from ..profiles.profile import Profile
from ..simulator.array import Dataflow
from ..simulator.cycle_accurate import run_cycle_accurate
from ..simulator.fidelity import BEHAVIORAL, FIDELITIES, TRANSACTIONAL, check_fidelity
from ..simulator.opcodes.table import OPCODES
from ..simulator.opcodes.work import Work
from ..simulator.products.lowering import lower
from ..simulator.stats import ExecutionStats, Run
from ..simulator.transactional import run_transactional
from .settings import current_profile


def time_work(work: Work, profile: Profile, fidelity: int, dataflow: Dataflow = "os") -> Run | None:
    """Timing of one operation; equal operations are timed once. None: it moves nothing, or the fidelity is
    BEHAVIORAL.
    """
    if fidelity == BEHAVIORAL:
        return None
    return (_transactional if fidelity == TRANSACTIONAL else _cycle_accurate)(work, profile, dataflow)


@functools.lru_cache(maxsize=1 << 14)
def _transactional(work: Work, profile: Profile, dataflow: Dataflow) -> Run | None:
    program = lower(work, profile, dataflow)
    return None if program is None else run_transactional(program, profile)


@functools.lru_cache(maxsize=128)  # these hold every span
def _cycle_accurate(work: Work, profile: Profile, dataflow: Dataflow) -> Run | None:
    program = lower(work, profile, dataflow, accurate=True)
    return None if program is None else run_cycle_accurate(program, profile)


def works(program: DFXProgram) -> list[Work]:
    """What each operation of a program asks of the machine."""
    tensors = program.tensors
    return [
        OPCODES[op.opcode].work([tensors[n] for n in op.inputs], [tensors[n] for n in op.outputs], op.attrs)
        for op in program.ops
    ]


def time_program(
    program: DFXProgram, fidelity: int, profile: Profile | str | None = None, dataflow: Dataflow = "os"
) -> ExecutionStats:
    """What a program costs: its operations one after the other, each between barriers, tensors in DRAM between them.

    In BEHAVIORAL the counts are there and the cycles are 0.
    """
    machine = current_profile(profile)
    stats = ExecutionStats(
        clock_hz=machine["clock.frequency"],
        profile=machine.name,
        execution_backend=FIDELITIES[check_fidelity(fidelity)],
    )
    for op, work in zip(program.ops, works(program), strict=True):
        run = time_work(work, machine, fidelity, dataflow)
        stats.add(run, op.opcode)
        if fidelity == BEHAVIORAL:
            stats.count(work.macs, work.elements * work.passes, work.dtype)
    return stats
