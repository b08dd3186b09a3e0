"""Checks of DFX programs: first the shape of what was read, then what it means. Each failure names a place."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    from .dfx import DFXOp, DFXProgram

Failure: TypeAlias = type[Exception]

DTYPE_BYTES = {
    "float64": 8,
    "float32": 4,
    "float16": 2,
    "bfloat16": 2,
    "float8_e4m3fn": 1,
    "float8_e5m2": 1,
    "int64": 8,
    "int32": 4,
    "int16": 2,
    "int8": 1,
    "uint8": 1,
    "bool": 1,
}
_KINDS = {str: "a string", bool: "true or false", int: "a whole number", list: "a list", dict: "an object"}
_TENSOR_FIELDS = {"name": str, "shape": list, "dtype": str, "memory_level": int, "is_const": bool}
_OP_FIELDS = {"opcode": str, "inputs": list, "outputs": list, "attrs": dict}


def read_program(
    data: Any, version: str, failure: Failure
) -> tuple[dict[str, Any], dict[str, dict[str, Any]], list[dict[str, Any]]]:
    """Take a program's dictionary apart: (head, tensors, ops), every field of the type it must have.

    Raises:
        failure: a field that is missing or of another type, or a version this program cannot read.
    """
    if not isinstance(data, Mapping):
        raise failure(
            f"the DFX program is {_given(data)}, and an object with name, version, tensors and ops is wanted."
        )
    _check_version(data.get("version"), version, failure)
    fields = {"name": str, "version": str, "tensors": dict, "ops": list, "inputs": list, "outputs": list}
    head = _fields(data, "the program", fields, {"metadata"}, failure)
    for key in ("inputs", "outputs"):
        _names(head[key], key, failure)
    tensors = {}
    for name, spec in head["tensors"].items():
        place = f"tensors.{name}"
        tensors[name] = _fields(
            spec, place, _TENSOR_FIELDS, set(), failure, defaults={"memory_level": 0, "is_const": False}
        )
        if tensors[name]["name"] != name:
            raise failure(f"{place}.name is {tensors[name]['name']!r}, and its key {name!r} is wanted.")
    ops = []
    for index, op in enumerate(head["ops"]):
        ops.append(_fields(op, f"ops[{index}]", _OP_FIELDS, set(), failure, defaults={"attrs": {}}))
        for key in ("inputs", "outputs"):
            _names(ops[-1][key], f"ops[{index}].{key}", failure)
    return head, tensors, ops


def _check_version(given: Any, known: str, failure: Failure) -> None:
    parts = given.split(".") if isinstance(given, str) else []
    if len(parts) != 2 or not all(part.isdecimal() for part in parts):
        raise failure(f"version is {given!r}, and two numbers such as {known!r} are wanted.")
    if tuple(map(int, parts)) > tuple(map(int, known.split("."))):
        raise failure(
            f"version is {given!r}, and this hal-kpu reads up to {known!r}: upgrade hal-kpu or write {known!r}."
        )


def _fields(
    data: Any,
    place: str,
    wanted: Mapping[str, type],
    others: set[str],
    failure: Failure,
    defaults: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    if not isinstance(data, Mapping):
        raise failure(f"{place} is {_given(data)}, and an object with {', '.join(wanted)} is wanted.")
    found = {**(defaults or {}), **data}
    for key, kind in wanted.items():
        if key not in found:
            raise failure(f"{place} has no {key!r}, and {_KINDS[kind]} is wanted there.")
        if not isinstance(found[key], kind) or (kind is int and isinstance(found[key], bool)):
            raise failure(f"{place}.{key} is {_given(found[key])}, and {_KINDS[kind]} is wanted.")
    unknown = next((key for key in found if key not in wanted and key not in others), None)
    if unknown is not None:
        raise failure(
            f"{place} has an unknown field {unknown!r}; the fields are {', '.join([*wanted, *sorted(others)])}."
        )
    return {key: found[key] for key in wanted}


def _names(names: Sequence[Any], place: str, failure: Failure) -> None:
    for index, name in enumerate(names):
        if not isinstance(name, str):
            raise failure(f"{place}[{index}] is {_given(name)}, and the name of a tensor is wanted.")


def _given(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{type(value).__name__} {text[:36]}..."


def check_program(program: DFXProgram, failure: Failure) -> None:
    """Check what a program means; see `DFXProgram.validate`."""
    from .opcodes import OPCODES

    _check_version(program.version, "1.0", failure)
    for name, spec in program.tensors.items():
        _check_tensor(name, spec, failure)
    for index, op in enumerate(program.ops):
        place = f"ops[{index}]"
        if op.opcode not in OPCODES:
            near = difflib.get_close_matches(op.opcode, OPCODES, 3) or sorted(OPCODES)[:8]
            raise failure(f"{place}.opcode is {op.opcode!r}, which is not known: use one of {', '.join(near)}.")
        _check_operands(place, op, program, failure)
    for key, names in (("inputs", program.inputs), ("outputs", program.outputs)):
        for index, name in enumerate(names):
            if name not in program.tensors:
                raise failure(f"{key}[{index}] is {name!r}, which is not among the tensors: add it there.")
    _check_order(program, failure)
    _check_shapes(program, failure)


def _check_tensor(name: str, spec: Any, failure: Failure) -> None:
    place = f"tensors.{name}"
    for index, size in enumerate(spec.shape):
        if isinstance(size, bool) or not isinstance(size, int) or size < 0:
            raise failure(f"{place}.shape[{index}] is {_given(size)}, and a whole number from 0 is wanted.")
    if spec.dtype not in DTYPE_BYTES:
        raise failure(f"{place}.dtype is {spec.dtype!r}, and one of {', '.join(DTYPE_BYTES)} is wanted.")
    if not 0 <= spec.memory_level <= 4:
        raise failure(f"{place}.memory_level is {spec.memory_level}, and 0 (external) to 4 (register) is wanted.")


def _check_operands(place: str, op: DFXOp, program: DFXProgram, failure: Failure) -> None:
    from .opcodes import OPCODES

    opcode = OPCODES[op.opcode]
    fewest, most = opcode.arity
    if not fewest <= len(op.inputs) <= most:
        wanted = str(fewest) if fewest == most else f"{fewest} to {most}"
        raise failure(f"{place}.inputs has {len(op.inputs)} tensors, and {op.opcode} wants {wanted}.")
    if len(op.outputs) != opcode.outputs:
        raise failure(f"{place}.outputs has {len(op.outputs)} tensors, and {op.opcode} writes {opcode.outputs}.")
    for key, names in (("inputs", op.inputs), ("outputs", op.outputs)):
        for index, name in enumerate(names):
            if name not in program.tensors:
                raise failure(f"{place}.{key}[{index}] is {name!r}, which is not among the tensors: add it there.")
    missing = sorted(opcode.required - op.attrs.keys())
    if missing:
        raise failure(
            f"{place}.attrs has no {missing[0]!r}, and {op.opcode} wants {', '.join(sorted(opcode.required))}."
        )
    unknown = sorted(op.attrs.keys() - opcode.required - opcode.optional)
    if unknown:
        known = ", ".join(sorted(opcode.required | opcode.optional)) or "none"
        raise failure(f"{place}.attrs has {unknown[0]!r}, which {op.opcode} does not know; its attributes: {known}.")


def _check_order(program: DFXProgram, failure: Failure) -> None:
    """Every tensor written once, before it is read."""
    writer: dict[str, int] = {}
    given = set(program.inputs)
    if len(given) != len(program.inputs):
        twice = next(name for name in program.inputs if program.inputs.count(name) > 1)
        raise failure(f"inputs names {twice!r} twice, and each input is wanted once.")
    for index, op in enumerate(program.ops):
        for name in op.outputs:
            if name in given or name in writer:
                before = "an input" if name in given else f"written by ops[{writer[name]}]"
                raise failure(f"ops[{index}].outputs writes {name!r}, which is {before} already: write a new tensor.")
            writer[name] = index
    cycle = _cycle(program, writer)
    if cycle:
        raise failure(
            f"the operations form a cycle, {' -> '.join(cycle)}: an operation may read only what was written before."
        )
    for index, op in enumerate(program.ops):
        for name in op.inputs:
            if name not in given and name not in writer:
                raise failure(f"ops[{index}] reads {name!r}, which no operation writes: make it an input or write it.")
            if name not in given and writer[name] >= index:
                raise failure(
                    f"ops[{index}] reads {name!r}, which ops[{writer[name]}] writes later: put that one first."
                )
    for index, name in enumerate(program.outputs):
        if name not in given and name not in writer:
            raise failure(f"outputs[{index}] is {name!r}, which no operation writes: make it an input or write it.")


def _cycle(program: DFXProgram, writer: Mapping[str, int]) -> list[str]:
    """Operations that wait on each other in a ring, as places; empty where there is none."""
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


def _check_shapes(program: DFXProgram, failure: Failure) -> None:
    """Run every operation on torch's meta device, where no value is computed, and compare what it gives with the
    specs.
    """
    import torch

    from .opcodes import OPCODES

    def empty(name: str) -> torch.Tensor:
        spec = program.tensors[name]
        return torch.empty(spec.shape, dtype=getattr(torch, spec.dtype), device="meta")

    for index, op in enumerate(program.ops):
        read = ", ".join(f"{program.tensors[n].dtype}{list(program.tensors[n].shape)}" for n in op.inputs)
        try:
            with torch.device("meta"):
                given = OPCODES[op.opcode].value(tuple(map(empty, op.inputs)), op.attrs)
        except Exception as error:
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise failure(f"ops[{index}] {op.opcode} cannot take {read} with attrs {op.attrs}: {reason}.") from None
        for name, tensor in zip(op.outputs, given, strict=True):
            spec = program.tensors[name]
            dtype = str(tensor.dtype).removeprefix("torch.")
            if tuple(tensor.shape) != spec.shape or dtype != spec.dtype:
                raise failure(
                    f"tensors.{name} is {spec.dtype}{list(spec.shape)}, and ops[{index}] {op.opcode} of {read} gives "
                    f"{dtype}{list(tensor.shape)}: write that."
                )
