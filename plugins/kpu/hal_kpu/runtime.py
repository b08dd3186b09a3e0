"""Runs DFX programs at a fidelity: BEHAVIORAL values, TRANSACTIONAL and CYCLE_ACCURATE times; and the process's
settings.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import attrs

from hal_core.plugin_api import ContractError

from .array import Dataflow
from .cycle_accurate import run_cycle_accurate
from .dfx import DFXProgram
from .lowering import lower
from .profile import Profile, load
from .stats import ExecutionStats, Run
from .transactional import run_transactional
from .work import Work

BEHAVIORAL, TRANSACTIONAL, CYCLE_ACCURATE = 0, 1, 2
FIDELITIES = ("behavioral", "transactional", "cycle_accurate")
DEFAULT_PROFILE = "t64"


@attrs.define
class _Settings:
    fidelity: int = BEHAVIORAL
    clock_ghz: float | None = None
    profile: str = DEFAULT_PROFILE


_settings, _lock = _Settings(), threading.Lock()


def check_fidelity(fidelity: Any) -> int:
    """The fidelity, if it is one.

    Raises:
        ContractError: it is none.
    """
    if isinstance(fidelity, bool) or fidelity not in (BEHAVIORAL, TRANSACTIONAL, CYCLE_ACCURATE):
        raise ContractError(
            f"fidelity {fidelity!r} was given: use BEHAVIORAL (0), TRANSACTIONAL (1) or CYCLE_ACCURATE (2)"
        )
    return int(fidelity)


def set_fidelity(fidelity: int) -> None:
    """The fidelity of the process, where none is given."""
    with _lock:
        _settings.fidelity = check_fidelity(fidelity)


def get_fidelity() -> int:
    """The fidelity of the process."""
    return _settings.fidelity


def get_fidelity_name() -> str:
    """ "BEHAVIORAL", "TRANSACTIONAL" or "CYCLE_ACCURATE"."""
    return FIDELITIES[_settings.fidelity].upper()


def set_clock_frequency(ghz: float | None) -> None:
    """The clock of every engine, in GHz; the DRAM keeps its own speed. None: the profile's."""
    if ghz is not None and (isinstance(ghz, bool) or not isinstance(ghz, int | float) or not 1e-6 <= ghz <= 100):
        raise ContractError(f"clock frequency {ghz!r} was given: a number of GHz from 1e-6 to 100 is wanted")
    with _lock:
        _settings.clock_ghz = ghz


def get_clock_frequency() -> float:
    """In GHz."""
    if _settings.clock_ghz is not None:
        return _settings.clock_ghz
    return load(_settings.profile)["clock.frequency"] / 1e9


def current_profile(profile: Profile | str | None = None) -> Profile:
    """A profile, or the process's, at the process's clock."""
    found = profile if isinstance(profile, Profile) else load(profile or _settings.profile)
    if _settings.clock_ghz is None:
        return found
    return _clocked(found, _settings.clock_ghz)


@functools.lru_cache(maxsize=64)
def _clocked(profile: Profile, ghz: float) -> Profile:
    return profile.replace(clock__frequency=ghz * 1e9)


def get_runtime() -> KPURuntime:
    """A runtime at the process's fidelity, clock and profile."""
    return KPURuntime(get_fidelity())


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


@functools.cache
def _load_opcodes() -> Mapping[str, Any]:
    from .opcodes import OPCODES

    return OPCODES


def works(program: DFXProgram) -> list[Work]:
    """What each operation of a program asks of the machine."""
    tensors, opcodes = program.tensors, _load_opcodes()
    return [
        opcodes[op.opcode].work([tensors[n] for n in op.inputs], [tensors[n] for n in op.outputs], op.attrs)
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


class KPURuntime:
    """Executes programs.

    Args:
        fidelity: BEHAVIORAL (values), TRANSACTIONAL (and tile-level times), CYCLE_ACCURATE (and page-level times;
            products take their values from the PEs, stepped cycle by cycle). None: the process's.
        profile: a `Profile`, a name or a path; None: t64.
        dataflow: of products: "os", "ws" or "is".
    """

    def __init__(
        self, fidelity: int | None = None, profile: Profile | str | None = None, dataflow: Dataflow = "os"
    ) -> None:
        self.fidelity = get_fidelity() if fidelity is None else check_fidelity(fidelity)
        self.dataflow: Dataflow = dataflow
        self._profile = profile

    @property
    def profile(self) -> Profile:
        """The machine, at the process's clock."""
        return current_profile(self._profile)

    def execute(self, program: DFXProgram, inputs: Mapping[str, Any] | Sequence[Any]) -> tuple[Any, ExecutionStats]:
        """Run a program.

        Args:
            inputs: tensors by name, or in the order of program.inputs; whatever torch.as_tensor takes.

        Returns:
            (outputs, stats): one `hal_kpu.Tensor`, or a tuple of them where the program has several outputs.

        Raises:
            ContractError: an input is missing, unknown, or of another shape or type than the program says.
            BufferTooSmallError: a tile that the machine cannot hold.
        """
        from .values import array_values

        given = _in_order(program, inputs)
        stats = time_program(program, self.fidelity, self._profile, self.dataflow)
        if self.fidelity != CYCLE_ACCURATE:
            results = _run(program, given)
        else:
            with array_values(self.profile, self.dataflow) as counted:
                results = _run(program, given)
            stats.active_macs = counted.active_macs
        return results[0] if len(results) == 1 else tuple(results), stats


def _run(program: DFXProgram, given: list[Any]) -> list[Any]:
    from .executor import Executor
    from .tensor import Tensor

    return [Tensor(result) for result in Executor(program).run(given)]


def _in_order(program: DFXProgram, inputs: Mapping[str, Any] | Sequence[Any]) -> list[Any]:
    """Inputs as tensors in the program's order, checked."""
    import torch

    from .tensor import Tensor

    if isinstance(inputs, Mapping):
        strange = [name for name in inputs if name not in program.inputs]
        absent = [name for name in program.inputs if name not in inputs]
        if strange or absent:
            raise ContractError(
                f"program {program.name} takes {', '.join(program.inputs) or 'nothing'}; "
                f"{', '.join([*(f'{n} is missing' for n in absent), *(f'{n} is unknown' for n in strange)])}: give each once"
            )
        values = [inputs[name] for name in program.inputs]
    else:
        values = list(inputs)
        if len(values) != len(program.inputs):
            raise ContractError(
                f"program {program.name} takes {len(program.inputs)} inputs, {len(values)} were given: give each"
            )
    tensors = [value.values() if isinstance(value, Tensor) else torch.as_tensor(value) for value in values]
    for name, tensor in zip(program.inputs, tensors, strict=True):
        spec = program.tensors[name]
        dtype = str(tensor.dtype).removeprefix("torch.")
        if tuple(tensor.shape) != tuple(spec.shape) or dtype != spec.dtype:
            raise ContractError(
                f"program {program.name}, input {name}: {dtype} {list(tensor.shape)} was given, {spec.dtype} "
                f"{list(spec.shape)} is wanted: convert or trace again"
            )
    return tensors
