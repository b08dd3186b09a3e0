"""`KPURuntime`: runs DFX programs at a fidelity, BEHAVIORAL for values, the others for times too."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from hal_core.plugin_api import ContractError

from ..frontend.dfx.program import DFXProgram
from ..frontend.tensors.tensor import Tensor
from ..profiles.profile import Profile
from ..simulator.array import Dataflow
from ..simulator.fidelity import CYCLE_ACCURATE, check_fidelity
from ..simulator.stats import ExecutionStats
from ..simulator.values import array_values
from .executor import Executor
from .settings import current_profile, get_fidelity
from .timing import time_program


class KPURuntime:
    """Executes programs.

    Args:
        fidelity: BEHAVIORAL (values), TRANSACTIONAL (and tile-level times), CYCLE_ACCURATE (and page-level times;
            products take their values from the PEs, stepped cycle by cycle). None: the process's.
        profile: a `Profile`, a name or a path; None: t64.
        dataflow: of products: "os", "ws" or "is".
        fuse: time operations that can run as one together (`fusion`); a program is timed as it is written otherwise.
    """

    def __init__(
        self,
        fidelity: int | None = None,
        profile: Profile | str | None = None,
        dataflow: Dataflow = "os",
        fuse: bool = False,
    ) -> None:
        self.fidelity = get_fidelity() if fidelity is None else check_fidelity(fidelity)
        self.dataflow: Dataflow = dataflow
        self._profile = profile
        self._fuse = fuse

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
        given = _in_order(program, inputs)
        stats = time_program(program, self.fidelity, self._profile, self.dataflow, self._fuse)
        if self.fidelity != CYCLE_ACCURATE:
            results = _run(program, given)
        else:
            with array_values(self.profile, self.dataflow) as counted:
                results = _run(program, given)
            stats.active_macs = counted.active_macs
        return results[0] if len(results) == 1 else tuple(results), stats


def _run(program: DFXProgram, given: list[Any]) -> list[Any]:
    return [Tensor(result) for result in Executor(program).run(given)]


def _in_order(program: DFXProgram, inputs: Mapping[str, Any] | Sequence[Any]) -> list[Any]:
    """Inputs as tensors in the program's order, checked."""
    if isinstance(inputs, Mapping):
        strange = [name for name in inputs if name not in program.inputs]
        absent = [name for name in program.inputs if name not in inputs]
        if strange or absent:
            wrong = ", ".join([*(f"{name} is missing" for name in absent), *(f"{name} is unknown" for name in strange)])
            takes = f"program {program.name} takes {', '.join(program.inputs) or 'nothing'}"
            raise ContractError(f"{takes}; {wrong}: give each once")
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


def get_runtime() -> KPURuntime:
    """A runtime at the process's fidelity, clock and profile."""
    return KPURuntime(get_fidelity())
