"""Runs DFX programs for their values alone: the BEHAVIORAL fidelity. Prepared once, run many times."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..frontend.dfx.program import DFXProgram
from ..frontend.expansion import general
from ..simulator.opcodes.table import OPCODES


class Executor:
    """A program with its names resolved to places in a list. A tensor is released after its last use.

    `run(inputs)` takes tensors in the order of program.inputs and gives those of program.outputs.
    """

    def __init__(self, program: DFXProgram) -> None:
        self.program = program = general(program)
        place = {name: index for index, name in enumerate(program.inputs)}
        for op in program.ops:
            for name in op.outputs:
                place[name] = len(place)
        self._size = len(place)
        self._outputs = [place[name] for name in program.outputs]
        last: dict[int, int] = {}
        for index, op in enumerate(program.ops):
            last.update(dict.fromkeys((place[name] for name in (*op.inputs, *op.outputs)), index))
        kept = set(self._outputs)
        dying: dict[int, list[int]] = {}
        for slot, index in last.items():
            if slot not in kept:
                dying.setdefault(index, []).append(slot)
        self._steps = [
            (
                OPCODES[op.opcode].value,
                tuple(place[name] for name in op.inputs),
                tuple(place[name] for name in op.outputs),
                op.attrs,
                tuple(dying.get(index, ())),
            )
            for index, op in enumerate(program.ops)
        ]

    def run(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        values: list[Tensor | None] = [None] * self._size
        values[: len(inputs)] = inputs
        with torch.no_grad():
            for function, read, written, attrs, dying in self._steps:
                results = function(tuple([values[slot] for slot in read]), attrs)  # type: ignore[misc]
                for slot, result in zip(written, results, strict=True):
                    values[slot] = result
                for slot in dying:
                    values[slot] = None
        return [values[slot] for slot in self._outputs]  # type: ignore[misc]
