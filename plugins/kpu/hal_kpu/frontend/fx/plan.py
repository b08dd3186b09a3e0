"""A partition of a graph at one set of sizes: its program, ready to run, and what a run of it costs."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...runtime.executor import Executor
from ...runtime.settings import current_profile
from ...runtime.timing import time_program
from ...simulator.opcodes.table import OPCODES
from ...simulator.stats import ExecutionStats
from ..dfx.program import DFXProgram


class Plan:
    """A partition at one set of sizes: its program, ready to run, and what a run of it costs."""

    def __init__(self, program: DFXProgram, outputs: list[Any], layouts: list[tuple[int, ...] | None]) -> None:
        self.program, self._outputs, self._layouts = program, outputs, layouts
        self._executor = Executor(program)
        self._timed: tuple[Any, ExecutionStats] | None = None

    def time(self, fidelity: int) -> ExecutionStats:
        """What a run costs at a timed fidelity on the process's machine; computed once."""
        machine = (fidelity, current_profile())
        if self._timed is None or self._timed[0] != machine:
            self._timed = machine, time_program(self.program, fidelity, machine[1], fuse=True)
        return self._timed[1]

    def run(self, inputs: Sequence[Tensor]) -> list[Any]:
        tensors = iter(self._executor.run(inputs))
        return arrange([next(tensors) if isinstance(item, str) else item for item in self._outputs], self._layouts)

    @functools.cached_property
    def macs(self) -> int:
        return self.program.total_macs()

    @functools.cached_property
    def bytes(self) -> int:
        """Read and written by all operations, each operand once."""
        program = self.program
        work = (
            OPCODES[op.opcode].work(program.specs(op.inputs), program.specs(op.outputs), op.attrs) for op in program.ops
        )
        return sum(part.reads_bytes + part.writes_bytes for one in work for part in one.parts)


def arrange(outputs: list[Any], layouts: list[tuple[int, ...] | None]) -> list[Any]:
    """Outputs with the order of axes in memory that the graph promised: later `view`s rely on it."""
    for index, order in enumerate(layouts):
        tensor = outputs[index]
        if order is None or not isinstance(tensor, Tensor):
            continue
        strides, step = [0] * len(order), 1
        for axis in reversed(order):
            strides[axis] = step
            step *= max(tensor.shape[axis], 1)
        same = zip(tensor.stride(), strides, tensor.shape, strict=True)
        if any(got != want and size > 1 for got, want, size in same):
            outputs[index] = torch.empty_strided(tensor.shape, strides, dtype=tensor.dtype).copy_(tensor)
    return outputs
