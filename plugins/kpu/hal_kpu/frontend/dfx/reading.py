"""Reads the dictionary of a DFX program: every field of the type that it must have. Each failure names a place."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from .opcodes import LONG_DTYPES
from .records import VERSION, VERSIONS, DFXError, shown

_KINDS = {str: "a string", bool: "true or false", int: "a whole number", list: "a list", dict: "an object"}
_TENSOR_FIELDS = {"name": str, "shape": list, "dtype": str, "memory_level": int, "is_const": bool}
#: The deepest nesting of lists and objects in a program, and the largest size or attribute (int64).
DEEPEST, LARGEST = 32, 2**63 - 1
_OP_FIELDS = {"opcode": str, "inputs": list, "outputs": list, "attrs": dict}


def read_program(data: Any) -> tuple[dict[str, Any], dict[str, dict[str, Any]], list[dict[str, Any]]]:
    """The parts of a program's dictionary, (head, tensors, ops), with every field of the type it must have.

    Raises:
        DFXError: a field that is missing or of another type, or a version this program cannot read.
    """
    _check_limits(data)
    if not isinstance(data, Mapping):
        raise DFXError(
            f"the DFX program is {shown(data)}, and an object with name, version, tensors and ops is wanted."
        )
    check_version(data.get("version"))
    fields = {"name": str, "version": str, "tensors": dict, "ops": list, "inputs": list, "outputs": list}
    head = _fields(data, "the program", fields, {"metadata"})
    for key in ("inputs", "outputs"):
        _names(head[key], key)
    tensors = {}
    for name, spec in head["tensors"].items():
        place = f"tensors.{name}"
        tensors[name] = _fields(spec, place, _TENSOR_FIELDS, set(), defaults={"memory_level": 0, "is_const": False})
        if head["version"] == VERSIONS[0]:
            tensors[name]["dtype"] = LONG_DTYPES.get(tensors[name]["dtype"], tensors[name]["dtype"])
        if tensors[name]["name"] != name:
            raise DFXError(f"{place}.name is {tensors[name]['name']!r}, and its key {name!r} is wanted.")
    ops = []
    for index, op in enumerate(head["ops"]):
        ops.append(_fields(op, f"ops[{index}]", _OP_FIELDS, set(), defaults={"attrs": {}}))
        for key in ("inputs", "outputs"):
            _names(ops[-1][key], f"ops[{index}].{key}")
        ops[-1]["attrs"] = read_values(ops[-1]["attrs"], f"ops[{index}].attrs")
    return head, tensors, ops


def check_version(given: Any) -> None:
    """Raises DFXError for a version that is not one of `VERSIONS`."""
    wanted = " or ".join(map(repr, VERSIONS))
    parts = given.split(".") if isinstance(given, str) else []
    if len(parts) != 2 or not all(part.isdecimal() and len(part) < 10 for part in parts):
        raise DFXError(
            f"version is {shown(given)}, and two numbers such as {VERSIONS[0]!r} are wanted: write {wanted}, whichever "
            f"the program is of."
        )
    if given in VERSIONS:
        return
    if tuple(map(int, parts)) > tuple(map(int, VERSION.split("."))):
        raise DFXError(
            f"version is {given!r}, and {wanted} is wanted: upgrade hal-kpu, which reads up to {VERSION!r}, or write "
            f"the program as {VERSION!r}."
        )
    raise DFXError(f"version is {given!r}, and {wanted} is wanted: there was none before {VERSIONS[0]!r}.")


def _fields(
    data: Any,
    place: str,
    wanted: Mapping[str, type],
    others: set[str],
    defaults: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    if not isinstance(data, Mapping):
        raise DFXError(f"{place} is {shown(data)}, and an object with {', '.join(wanted)} is wanted.")
    found = {**(defaults or {}), **data}
    for key, kind in wanted.items():
        if key not in found:
            raise DFXError(f"{place} has no {key!r}, and {_KINDS[kind]} is wanted there.")
        if not isinstance(found[key], kind) or (kind is int and isinstance(found[key], bool)):
            raise DFXError(f"{place}.{key} is {shown(found[key])}, and {_KINDS[kind]} is wanted.")
    unknown = next((key for key in found if key not in wanted and key not in others), None)
    if unknown is not None:
        raise DFXError(
            f"{place} has an unknown field {unknown!r}; the fields are {', '.join([*wanted, *sorted(others)])}."
        )
    return {key: found[key] for key in wanted}


def _names(names: Sequence[Any], place: str) -> None:
    for index, name in enumerate(names):
        if not isinstance(name, str):
            raise DFXError(f"{place}[{index}] is {shown(name)}, and the name of a tensor is wanted.")


def _check_limits(data: Any) -> None:
    """Refuse nesting and whole numbers that no program has and that Python or torch could not process.

    The walk is iterative: its own depth does not depend on the data.
    """
    pending = [(data, 0)]
    while pending:
        value, depth = pending.pop()
        if depth > DEEPEST:
            raise DFXError(f"the DFX program is nested more than {DEEPEST} levels deep: write flat attributes.")
        if isinstance(value, int) and not -LARGEST <= value <= LARGEST:
            raise DFXError(f"{shown(value)} is in the DFX program, and whole numbers up to 2**63 - 1 are wanted.")
        if isinstance(value, Mapping):
            pending.extend((item, depth + 1) for item in value.values())
        elif isinstance(value, (list, tuple)):
            pending.extend((item, depth + 1) for item in value)


def written_values(value: Any) -> Any:
    """JSON has neither tuples nor infinities: lists, and {"float": "inf"}."""
    if isinstance(value, Mapping):
        return {key: written_values(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [written_values(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return {"float": str(value)}
    return value


def read_values(value: Any, place: str) -> Any:
    """The inverse of `written_values`.

    Raises:
        DFXError: {"float": ...} of something other than "inf", "-inf" or "nan".
    """
    if isinstance(value, list):
        return [read_values(item, f"{place}[{index}]") for index, item in enumerate(value)]
    if not isinstance(value, Mapping):
        return value
    if set(value) != {"float"}:
        return {key: read_values(item, f"{place}.{key}") for key, item in value.items()}
    if value["float"] not in ("inf", "-inf", "nan"):
        raise DFXError(f"{place}.float is {shown(value['float'])}, and 'inf', '-inf' or 'nan' is wanted.")
    return float(value["float"])
