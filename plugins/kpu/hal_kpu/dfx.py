"""DFX: the operator-level program of a KPU. A list of operations in running order over named tensors, with JSON both
ways.

    {"name": "main", "version": "1.0",
     "tensors": {"x": {"name": "x", "shape": [4, 8], "dtype": "float32", "memory_level": 0, "is_const": false}, ...},
     "ops": [{"opcode": "matmul", "inputs": ["x", "w"], "outputs": ["y"], "attrs": {"M": 4, "K": 8, "N": 2}}],
     "inputs": ["x", "w"], "outputs": ["y"],
     "metadata": {"num_ops": 1, "num_tensors": 3, "total_matmul_flops": 128, "op_counts": {"matmul": 1}}}

Every tensor is written once: by the caller (an input) or by one operation. What is read from a file is checked whole.
"""

from __future__ import annotations

import collections
import enum
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import attrs

from hal_core.plugin_api import ContractError

from .dfx_checks import DTYPE_BYTES, check_program, read_program

VERSION = "1.0"


class DFXError(ContractError):
    """A DFX program that cannot be used. Names the place in it and what is wanted there."""


class MemoryLevel(enum.IntEnum):
    """Where a tensor lives between operations."""

    EXTERNAL = 0
    L3 = 1
    L2 = 2
    L1 = 3
    REGISTER = 4


def _sizes(shape: Iterable[int]) -> tuple[int, ...]:
    return tuple(shape)


def _names(names: Iterable[str]) -> tuple[str, ...]:
    return tuple(names)


def _frozen_attrs(values: Mapping[str, Any]) -> dict[str, Any]:
    """Lists become tuples, so that a program read from JSON equals the one written."""
    return {key: _tuples(value) for key, value in values.items()}


def _tuples(value: Any) -> Any:
    return tuple(_tuples(item) for item in value) if isinstance(value, (list, tuple)) else value


@attrs.frozen
class TensorSpec:
    """A tensor of a program.

    Attributes:
        name: unique in its program. shape: sizes. dtype: torch's name without "torch.", such as "float32".
        memory_level: a `MemoryLevel`. is_const: whether its values are the same in every run, as weights are.
    """

    name: str
    shape: tuple[int, ...] = attrs.field(converter=_sizes)
    dtype: str
    memory_level: int = 0
    is_const: bool = False

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * DTYPE_BYTES[self.dtype]


@attrs.frozen
class DFXOp:
    """One operation: an opcode of `hal_kpu.opcodes.OPCODES`, names of the tensors it reads and writes, and its
    attributes.
    """

    opcode: str
    inputs: tuple[str, ...] = attrs.field(converter=_names)
    outputs: tuple[str, ...] = attrs.field(converter=_names)
    attrs: dict[str, Any] = attrs.field(factory=dict, converter=_frozen_attrs)


def _operations(ops: Iterable[DFXOp]) -> tuple[DFXOp, ...]:
    return tuple(ops)


@attrs.frozen
class DFXProgram:
    """Operations in running order, the tensors they speak of, and which of those come from and go to the caller."""

    name: str
    version: str = VERSION
    tensors: dict[str, TensorSpec] = attrs.field(factory=dict)
    ops: tuple[DFXOp, ...] = attrs.field(factory=tuple, converter=_operations)
    inputs: tuple[str, ...] = attrs.field(factory=tuple, converter=_names)
    outputs: tuple[str, ...] = attrs.field(factory=tuple, converter=_names)

    def specs(self, names: Iterable[str]) -> tuple[TensorSpec, ...]:
        return tuple(self.tensors[name] for name in names)

    def op_counts(self) -> dict[str, int]:
        """Opcode to how many times it appears, in order of first appearance."""
        return dict(collections.Counter(op.opcode for op in self.ops))

    def total_macs(self) -> int:
        """Multiply-accumulates that the array does: matrix products and convolutions."""
        from .opcodes import OPCODES

        work = (OPCODES[op.opcode].work(self.specs(op.inputs), self.specs(op.outputs), op.attrs) for op in self.ops)
        return sum(one.macs for one in work)

    def validate(self) -> DFXProgram:
        """This program, checked.

        Raises:
            DFXError: the first thing wrong: an unknown opcode, a tensor read before it is written or written twice,
                a cycle, an attribute that is missing, shapes or types that the operation does not give.
        """
        check_program(self, DFXError)
        return self

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready. The metadata is for people; reading recomputes it."""
        return {
            "name": self.name,
            "version": self.version,
            "tensors": {name: attrs.asdict(spec) | {"shape": list(spec.shape)} for name, spec in self.tensors.items()},
            "ops": [
                {"opcode": op.opcode, "inputs": list(op.inputs), "outputs": list(op.outputs), "attrs": _plain(op.attrs)}
                for op in self.ops
            ],
            "inputs": list(self.inputs),
            "outputs": list(self.outputs),
            "metadata": {
                "num_ops": len(self.ops),
                "num_tensors": len(self.tensors),
                "total_matmul_flops": 2 * self.total_macs(),
                "op_counts": self.op_counts(),
            },
        }

    def to_json(self, indent: int | None = 2) -> str:
        return json.dumps(self.to_dict(), indent=indent, allow_nan=False)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> DFXProgram:
        """The program a dictionary describes, checked.

        Raises:
            DFXError: what is wrong first, with its place and what is wanted there.
        """
        head, tensors, ops = read_program(data, VERSION, DFXError)
        return cls(
            name=head["name"],
            version=head["version"],
            tensors={name: TensorSpec(**spec) for name, spec in tensors.items()},
            ops=[DFXOp(**{**op, "attrs": _special(op["attrs"])}) for op in ops],
            inputs=head["inputs"],
            outputs=head["outputs"],
        ).validate()

    @classmethod
    def from_json(cls, text: str) -> DFXProgram:
        """As `from_dict`, from JSON."""
        try:
            data = json.loads(text)
        except json.JSONDecodeError as error:
            raise DFXError(
                f"the DFX text is not JSON: {error.msg} at line {error.lineno}, column {error.colno}; give what to_json wrote."
            ) from None
        return cls.from_dict(data)

    def summary(self) -> str:
        """One line per operation with shapes, for people."""
        lines = [f"{self.name}: {len(self.ops)} operations, {len(self.tensors)} tensors, {self.total_macs():,} MACs"]
        for op in self.ops:
            read, written = (", ".join(map(_describe, self.specs(names))) for names in (op.inputs, op.outputs))
            lines.append(f"  {op.opcode}({read}) -> {written}")
        return "\n".join(lines)


def _describe(spec: TensorSpec) -> str:
    return f"{spec.name}: {spec.dtype}[{', '.join(map(str, spec.shape))}]"


def _plain(value: Any) -> Any:
    """JSON has neither tuples nor infinities: lists, and {"float": "inf"}."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return {"float": str(value)}
    return value


def _special(value: Any) -> Any:
    """The inverse of `_plain` for infinities and not-a-number."""
    if isinstance(value, Mapping):
        return (
            float(value["float"]) if set(value) == {"float"} else {key: _special(item) for key, item in value.items()}
        )
    return [_special(item) for item in value] if isinstance(value, list) else value
