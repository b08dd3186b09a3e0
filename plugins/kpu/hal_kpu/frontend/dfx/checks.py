"""What a DFX program means: opcodes, operands, order and shapes. Each failure names a place."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any, Protocol

from ...simulator.opcodes.specs import DTYPE_BYTES, TensorSpec
from .opcodes import DFXOpCode
from .reading import LARGEST, check_version
from .records import DFXError, DFXOp, shown


class Program(Protocol):
    """The parts of a program that are checked."""

    @property
    def version(self) -> str: ...
    @property
    def tensors(self) -> Mapping[str, TensorSpec]: ...
    @property
    def ops(self) -> tuple[DFXOp, ...]: ...
    @property
    def inputs(self) -> tuple[str, ...]: ...
    @property
    def outputs(self) -> tuple[str, ...]: ...


def check_program(program: Program) -> None:
    """Check what a program means; see `DFXProgram.validate`."""
    from .forms import definition

    check_version(program.version)
    for name, spec in program.tensors.items():
        _check_tensor(name, spec)
    for index, op in enumerate(program.ops):
        place = f"ops[{index}]"
        if definition(op) is None:
            known = [*DFXOpCode]
            near = difflib.get_close_matches(op.opcode[:80], known, 3)
            wanted = f"did you mean {' or '.join(near)}?" if near else f"use one of {', '.join(known)}."
            raise DFXError(f"{place}.opcode is {shown(str(op.opcode))}, which is not known: {wanted}")
        _check_operands(place, op, program)
    for key, names in (("inputs", program.inputs), ("outputs", program.outputs)):
        for index, name in enumerate(names):
            if name not in program.tensors:
                raise DFXError(f"{key}[{index}] is {name!r}, which is not among the tensors: add it there.")
    _check_order(program)
    _check_shapes(program)


def _check_tensor(name: str, spec: Any) -> None:
    place = f"tensors.{name}"
    for index, size in enumerate(spec.shape):
        if isinstance(size, bool) or not isinstance(size, int) or not 0 <= size <= LARGEST:
            raise DFXError(
                f"{place}.shape[{index}] is {shown(size)}, and a whole number from 0 to 2**63 - 1 is wanted."
            )
    if spec.dtype not in DTYPE_BYTES:
        raise DFXError(f"{place}.dtype is {spec.dtype!r}, and one of {', '.join(DTYPE_BYTES)} is wanted.")
    if not 0 <= spec.memory_level <= 4:
        raise DFXError(f"{place}.memory_level is {spec.memory_level}, and 0 (external) to 4 (register) is wanted.")


def _check_operands(place: str, op: DFXOp, program: Program) -> None:
    from .forms import definition

    opcode = definition(op)
    assert opcode is not None
    fewest, most = opcode.arity
    if not fewest <= len(op.inputs) <= most:
        wanted = str(fewest) if fewest == most else f"{fewest} to {most}"
        raise DFXError(f"{place}.inputs has {len(op.inputs)} tensors, and {op.opcode} wants {wanted}.")
    if len(op.outputs) != opcode.outputs:
        raise DFXError(f"{place}.outputs has {len(op.outputs)} tensors, and {op.opcode} writes {opcode.outputs}.")
    for key, names in (("inputs", op.inputs), ("outputs", op.outputs)):
        for index, name in enumerate(names):
            if name not in program.tensors:
                raise DFXError(f"{place}.{key}[{index}] is {name!r}, which is not among the tensors: add it there.")
    missing = sorted(opcode.required - op.attrs.keys())
    if missing:
        raise DFXError(
            f"{place}.attrs has no {missing[0]!r}, and {op.opcode} wants {', '.join(sorted(opcode.required))}."
        )
    unknown = sorted(op.attrs.keys() - opcode.required - opcode.optional)
    if unknown:
        known = ", ".join(sorted(opcode.required | opcode.optional)) or "none"
        raise DFXError(f"{place}.attrs has {unknown[0]!r}, which {op.opcode} does not know; its attributes: {known}.")


def _check_order(program: Program) -> None:
    """Every tensor written once, before it is read."""
    writer: dict[str, int] = {}
    given = set(program.inputs)
    if len(given) != len(program.inputs):
        twice = next(name for name in program.inputs if program.inputs.count(name) > 1)
        raise DFXError(f"inputs names {twice!r} twice, and each input is wanted once.")
    for index, op in enumerate(program.ops):
        for name in op.outputs:
            if name in given or name in writer:
                before = "an input" if name in given else f"written by ops[{writer[name]}]"
                raise DFXError(f"ops[{index}].outputs writes {name!r}, which is {before} already: write a new tensor.")
            writer[name] = index
    cycle = _cycle(program, writer)
    if cycle:
        raise DFXError(
            f"the operations form a cycle, {' -> '.join(cycle)}: an operation may read only what was written before."
        )
    for index, op in enumerate(program.ops):
        for name in op.inputs:
            if name not in given and name not in writer:
                raise DFXError(f"ops[{index}] reads {name!r}, which no operation writes: make it an input or write it.")
            if name not in given and writer[name] >= index:
                raise DFXError(
                    f"ops[{index}] reads {name!r}, which ops[{writer[name]}] writes later: put that one first."
                )
    for index, name in enumerate(program.outputs):
        if name not in given and name not in writer:
            raise DFXError(f"outputs[{index}] is {name!r}, which no operation writes: make it an input or write it.")


def _cycle(program: Program, writer: Mapping[str, int]) -> list[str]:
    """The operations of a dependency cycle, as places; empty where there is none."""
    needs = [sorted({writer[name] for name in op.inputs if name in writer}) for op in program.ops]
    state = [0] * len(needs)  # 0 unseen, 1 on the path, 2 done
    for start in range(len(needs)):
        path, pending = [], [(start, iter(needs[start]))] if state[start] == 0 else []
        if pending:
            state[start], path = 1, [start]
        while pending:
            step = next(pending[-1][1], None)
            if step is None:
                state[path.pop()] = 2
                pending.pop()
            elif state[step] == 1:
                ring = [*path[path.index(step) :], step]
                return [f"ops[{index}] {program.ops[index].opcode}" for index in ring]
            elif state[step] == 0:
                state[step] = 1
                path.append(step)
                pending.append((step, iter(needs[step])))
    return []


def _check_shapes(program: Program) -> None:
    """Run every operation on torch's meta device, where no value is computed, and compare what it gives with the
    specs.
    """
    import torch

    from .forms import definition, form_of

    def empty(name: str) -> torch.Tensor:
        spec = program.tensors[name]
        return torch.empty(spec.shape, dtype=getattr(torch, spec.dtype), device="meta")

    for index, op in enumerate(program.ops):
        read = ", ".join(f"{program.tensors[n].dtype}{list(program.tensors[n].shape)}" for n in op.inputs)
        try:
            with torch.device("meta"):
                found = definition(op)
                assert found is not None
                given = found.value(tuple(map(empty, op.inputs)), op.attrs)
        except Exception as error:
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise DFXError(
                f"ops[{index}] {op.opcode} cannot take {read} with attrs {shown(op.attrs)}: {reason}."
            ) from error
        for name, tensor in zip(op.outputs, given, strict=True):
            spec = program.tensors[name]
            dtype = str(tensor.dtype).removeprefix("torch.")
            shapes = [tuple(tensor.shape)]
            if shapes == [(1,)] and form_of(op):  # of a sum of everything, as some writers of 1.0 have it
                shapes.append(())
            if spec.shape not in shapes or dtype != spec.dtype:
                raise DFXError(
                    f"tensors.{name} is {spec.dtype}{list(spec.shape)}, and ops[{index}] {op.opcode} of {read} gives "
                    f"{dtype}{list(tensor.shape)}: write that."
                )
