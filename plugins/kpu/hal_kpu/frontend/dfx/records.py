"""What a DFX program is made of: operations, memory levels, and the error of a program that cannot be used."""

from __future__ import annotations

import enum
from collections.abc import Iterable, Mapping
from typing import Any

import attrs

from hal_core.plugin_api import ContractError

from .opcodes import DFXOpCode

#: Versions that can be read, oldest first; the last is written where a program has general forms.
VERSIONS = ("1.0", "1.1")
VERSION = VERSIONS[-1]


def _opcode(name: str) -> str:
    """A member of `DFXOpCode`; an unknown name as it is, which checking a program refuses."""
    try:
        return DFXOpCode(name)
    except ValueError:
        return name


class DFXError(ContractError):
    """A DFX program that cannot be used. Names the place in it and what is wanted there."""


class MemoryLevel(enum.IntEnum):
    """Where a tensor lives between operations."""

    EXTERNAL = 0
    L3 = 1
    L2 = 2
    L1 = 3
    REGISTER = 4


def names_of(names: Iterable[str]) -> tuple[str, ...]:
    return tuple(names)


def _frozen_attrs(values: Mapping[str, Any]) -> dict[str, Any]:
    """Lists become tuples, so that a program read from JSON equals the one written."""
    return {key: _tuples(value) for key, value in values.items()}


def _tuples(value: Any) -> Any:
    return tuple(_tuples(item) for item in value) if isinstance(value, (list, tuple)) else value


@attrs.frozen
class DFXOp:
    """One operation: an opcode (`DFXOpCode`, or its text), names of the tensors it reads and writes, and its
    attributes.
    """

    opcode: str = attrs.field(converter=_opcode)
    inputs: tuple[str, ...] = attrs.field(converter=names_of)
    outputs: tuple[str, ...] = attrs.field(converter=names_of)
    attrs: dict[str, Any] = attrs.field(factory=dict, converter=_frozen_attrs)


def shown(value: Any) -> str:
    """A short text of a value for a message; also of one that Python cannot print whole."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # an integer of more digits than Python prints, or endless nesting
        return f"a {type(value).__name__} too large to print"
    return text if len(text) <= 40 else f"{type(value).__name__} {text[:36]}..."
