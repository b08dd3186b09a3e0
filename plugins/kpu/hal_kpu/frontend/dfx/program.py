"""DFX: the operator-level program of a KPU. A list of operations in running order over named tensors, with JSON both
ways.

    {"name": "main", "version": "1.0",
     "tensors": {"x": {"name": "x", "shape": [4, 8], "dtype": "f32", "memory_level": 0, "is_const": false}, ...},
     "ops": [{"opcode": "matmul", "inputs": ["x", "w"], "outputs": ["y"], "attrs": {"M": 4, "K": 8, "N": 2}}],
     "inputs": ["x", "w"], "outputs": ["y"],
     "metadata": {"num_ops": 1, "num_tensors": 3, "total_matmul_flops": 128, "op_counts": {"matmul": 1}}}

Every tensor is written once: by the caller (an input) or by one operation. What is read from a file is checked whole.

Version 1.0 has the operators of models by their names (relu, conv2d, maxpool2d, ...) and eight types, f32 to bool. 1.1
adds the machine's general operations (maximum, convolution, max_pool, ...), attributes and types that 1.0 has not, and
writes types as torch names them. Both are read.
"""

from __future__ import annotations

import collections
import json
from collections.abc import Iterable, Mapping
from typing import Any

import attrs

from ...simulator.opcodes.specs import TensorSpec
from .checks import check_program
from .opcodes import SHORT_DTYPES
from .reading import read_program, written_values
from .records import VERSION, VERSIONS, DFXError, DFXOp, names_of


def _operations(ops: Iterable[DFXOp]) -> tuple[DFXOp, ...]:
    return tuple(ops)


@attrs.frozen
class DFXProgram:
    """Operations in running order, the tensors they speak of, and which of those come from and go to the caller."""

    name: str
    version: str = VERSION
    tensors: dict[str, TensorSpec] = attrs.field(factory=dict)
    ops: tuple[DFXOp, ...] = attrs.field(factory=tuple, converter=_operations)
    inputs: tuple[str, ...] = attrs.field(factory=tuple, converter=names_of)
    outputs: tuple[str, ...] = attrs.field(factory=tuple, converter=names_of)

    def specs(self, names: Iterable[str]) -> tuple[TensorSpec, ...]:
        return tuple(self.tensors[name] for name in names)

    def op_counts(self) -> dict[str, int]:
        """Opcode to how many times it appears, in order of first appearance."""
        return dict(collections.Counter(str(op.opcode) for op in self.ops))

    def total_macs(self) -> int:
        """Multiply-accumulates that the array does: matrix products and convolutions."""
        from .forms import macs_of

        return sum(macs_of(op, self.specs(op.inputs), self.specs(op.outputs)) for op in self.ops)

    def validate(self) -> DFXProgram:
        """This program, checked.

        Raises:
            DFXError: the first thing wrong: an unknown opcode, a tensor read before it is written or written twice,
                a cycle, an attribute that is missing, shapes or types that the operation does not give.
        """
        check_program(self)
        return self

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready. The metadata is for people; reading recomputes it."""
        return {
            "name": self.name,
            "version": self.version,
            "tensors": {name: self._written(spec) for name, spec in self.tensors.items()},
            "ops": [
                {
                    "opcode": str(op.opcode),
                    "inputs": list(op.inputs),
                    "outputs": list(op.outputs),
                    "attrs": written_values(op.attrs),
                }
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

    def _written(self, spec: TensorSpec) -> dict[str, Any]:
        dtype = SHORT_DTYPES.get(spec.dtype, spec.dtype) if self.version == VERSIONS[0] else spec.dtype
        return attrs.asdict(spec) | {"shape": list(spec.shape), "dtype": dtype}

    def to_json(self, indent: int | None = 2) -> str:
        return json.dumps(self.to_dict(), indent=indent, allow_nan=False)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> DFXProgram:
        """The program a dictionary describes, checked.

        Raises:
            DFXError: what is wrong first, with its place and what is wanted there.
        """
        head, tensors, ops = read_program(data)
        return cls(
            name=head["name"],
            version=head["version"],
            tensors={name: TensorSpec(**spec) for name, spec in tensors.items()},
            ops=[DFXOp(**op) for op in ops],
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
                f"the DFX text is not JSON: {error.msg} at line {error.lineno}, column {error.colno}; "
                f"give what to_json wrote."
            ) from None
        except RecursionError:
            raise DFXError("the DFX text is nested too deep to be read: give what to_json wrote.") from None
        except ValueError as error:  # an integer of more digits than Python converts
            raise DFXError(f"the DFX text cannot be read ({error}): give what to_json wrote.") from None
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
