"""What the operations of a DFX program cost, one after the other."""

from __future__ import annotations

import functools
from collections.abc import Sequence

from ..frontend.dfx.program import DFXProgram
from ..frontend.expansion import general
from ..profiles.profile import Profile
from ..simulator.array import Dataflow
from ..simulator.cycle_accurate import run_cycle_accurate
from ..simulator.engines import BufferTooSmallError
from ..simulator.fidelity import BEHAVIORAL, FIDELITIES, TRANSACTIONAL, check_fidelity
from ..simulator.opcodes.table import OPCODES
from ..simulator.opcodes.work import Work
from ..simulator.products.lowering import lower
from ..simulator.stats import ExecutionStats, Run
from ..simulator.transactional import run_transactional
from .fusion import Group, groups
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
    """What each operation of a program of general opcodes asks of the machine."""
    tensors = program.tensors
    return [
        OPCODES[op.opcode].work([tensors[n] for n in op.inputs], [tensors[n] for n in op.outputs], op.attrs)
        for op in program.ops
    ]


def time_program(
    program: DFXProgram,
    fidelity: int,
    profile: Profile | str | None = None,
    dataflow: Dataflow = "os",
    fuse: bool = False,
) -> ExecutionStats:
    """What a program costs: its operations one after the other, each between barriers, tensors in DRAM between them.

    In BEHAVIORAL the counts are there and the cycles are 0.

    Args:
        fuse: operations that can run as one (`fusion`) do, where that takes less time.
    """
    machine = current_profile(profile)
    stats = ExecutionStats(
        clock_hz=machine["clock.frequency"],
        profile=machine.name,
        execution_backend=FIDELITIES[check_fidelity(fidelity)],
    )
    operations, program = len(program.ops), general(program)
    asked = works(program)
    fused = {group.members[0]: group for group in groups(program, asked)} if fuse and fidelity != BEHAVIORAL else {}
    done: set[int] = set()
    for index, (op, work) in enumerate(zip(program.ops, asked, strict=True)):
        if index in done:
            continue
        group = fused.get(index)
        together = None if group is None else _together(group, asked, machine, fidelity, dataflow)
        if group is not None and together is not None:
            stats.add(together, group.label, len(group.members))
            done.update(group.members)
            continue
        for number, part in enumerate(work.parts):
            stats.add(time_work(part, machine, fidelity, dataflow), op.opcode, operations=int(number == 0))
        if fidelity == BEHAVIORAL:
            stats.count(work.macs, work.elements * work.passes, work.dtype)
    stats.ops_executed = operations
    return stats


def _together(group: Group, asked: Sequence[Work], profile: Profile, fidelity: int, dataflow: Dataflow) -> Run | None:
    """The run of a group as one; None where it is one operation, does not fit, or is faster one by one."""
    if len(group.members) == 1 or (group.work.engine == "array" and dataflow != "os"):
        return None
    try:
        run = time_work(group.work, profile, fidelity, dataflow)
    except BufferTooSmallError:
        return None
    apart = [time_work(asked[member], profile, fidelity, dataflow) for member in group.members]
    return run if run is not None and run.cycles < sum(one.cycles for one in apart if one is not None) else None
