"""Writes a DFX program by running it: each operation is computed as it is emitted, and its result gives shape and type.

On torch's meta device only shapes are computed. Operations whose results are unused are removed at the end.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from ..simulator.opcodes.specs import TensorSpec
from ..simulator.opcodes.table import OPCODES
from .dfx.program import DFXProgram
from .dfx.records import DFXOp

Number: TypeAlias = int | float | bool


class Value:
    """A tensor of the program being written: its name there, and its values (or a meta tensor)."""

    __slots__ = ("emitter", "name", "tensor")

    def __init__(self, emitter: Emitter, name: str, tensor: Tensor) -> None:
        self.emitter, self.name, self.tensor = emitter, name, tensor

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.tensor.shape)

    @property
    def dtype(self) -> torch.dtype:
        return self.tensor.dtype

    @property
    def ndim(self) -> int:
        return self.tensor.dim()

    def __add__(self, other: Value | Number) -> Value:
        return self.emitter.one("add", self, other)

    def __sub__(self, other: Value | Number) -> Value:
        return self.emitter.one("sub", self, other)

    def __rsub__(self, other: Number) -> Value:
        return self.emitter.one("sub", other, self)

    def __mul__(self, other: Value | Number) -> Value:
        return self.emitter.one("mul", self, other)

    def __truediv__(self, other: Value | Number) -> Value:
        return self.emitter.one("div", self, other)

    def __neg__(self) -> Value:
        return self.emitter.one("neg", self)

    __radd__ = __add__
    __rmul__ = __mul__


class Emitter:
    """Collects operations. `one` and `many` emit; `reshape`, `cast` and the like leave out what changes nothing.

    Args:
        optimize: fold transpositions into the products that read them, and remove operations whose results are unused.
    """

    def __init__(self, name: str = "main", optimize: bool = True) -> None:
        self.name, self.optimize = name, optimize
        self._specs: dict[str, TensorSpec] = {}
        self._inputs: list[str] = []
        self._ops: list[DFXOp] = []
        self._writer: dict[str, tuple[DFXOp, tuple[Value, ...]]] = {}

    def input(self, tensor: Tensor, name: str | None = None, is_const: bool = False) -> Value:
        """A tensor that the caller gives at each run."""
        value = self._value(tensor, name or f"in{len(self._inputs)}", is_const)
        self._inputs.append(value.name)
        return value

    def _value(self, tensor: Tensor, name: str, is_const: bool = False) -> Value:
        dtype = str(tensor.dtype).removeprefix("torch.")
        self._specs[name] = TensorSpec(name, tuple(tensor.shape), dtype, is_const=is_const)
        return Value(self, name, tensor)

    def many(self, opcode: str, *operands: Value | Number, **attrs: Any) -> tuple[Value, ...]:
        """Emit one operation. Of two operands one may be a number: it goes into the instruction."""
        inputs = tuple(operand for operand in operands if isinstance(operand, Value))
        if len(inputs) != len(operands):
            attrs["scalar"] = next(operand for operand in operands if not isinstance(operand, Value))
            if not isinstance(operands[0], Value):
                attrs["scalar_first"] = True
        tensors = OPCODES[opcode].value(tuple(value.tensor for value in inputs), attrs)
        written = tuple(self._value(tensor, f"t{len(self._specs)}") for tensor in tensors)
        op = DFXOp(opcode, [value.name for value in inputs], [value.name for value in written], attrs)
        self._ops.append(op)
        for value in written:
            self._writer[value.name] = (op, inputs)
        return written

    def one(self, opcode: str, *operands: Value | Number, **attrs: Any) -> Value:
        """Emit one operation that writes one tensor."""
        return self.many(opcode, *operands, **attrs)[0]

    def cast(self, x: Value, dtype: torch.dtype | None) -> Value:
        return x if dtype is None or x.dtype == dtype else self.one("cast", x, dtype=str(dtype).removeprefix("torch."))

    def copy(self, x: Value) -> Value:
        """The same values in memory of their own."""
        return self.one("cast", x, dtype=str(x.dtype).removeprefix("torch."))

    def reshape(self, x: Value, shape: Sequence[int]) -> Value:
        return x if x.shape == tuple(shape) else self.one("reshape", x, shape=tuple(shape))

    def transpose(self, x: Value, permutation: Sequence[int]) -> Value:
        order = tuple(axis % max(x.ndim, 1) for axis in permutation)
        return x if order == tuple(range(x.ndim)) else self.one("transpose", x, permutation=order)

    def broadcast(self, x: Value, shape: Sequence[int]) -> Value:
        return x if x.shape == tuple(shape) else self.one("broadcast", x, shape=tuple(shape))

    def slice(self, x: Value, axis: int, start: int, stop: int, step: int = 1) -> Value:
        """x[..., start:stop:step, ...] for 0 <= start <= stop <= size."""
        if (start, stop, step) == (0, x.shape[axis], 1):
            return x
        return self.one("slice", x, axis=axis % x.ndim, start=start, stop=stop, step=step)

    def sum(self, x: Value, axes: Sequence[int] | None = None, keepdims: bool = False) -> Value:
        return self.one("sum", x, axes=None if axes is None else tuple(axes), keepdims=keepdims)

    def mean(self, x: Value, axes: Sequence[int] | None = None, keepdims: bool = False) -> Value:
        """The sum, times the reciprocal of how many."""
        count = x.tensor.numel() if axes is None else _product(x.shape[axis] for axis in axes)
        return self.sum(x, axes, keepdims) / count

    def matmul(self, a: Value, b: Value, start: Value | None = None, **flags: Any) -> Value:
        """a[..., M, K] @ b[..., K, N] (+ start). A transposition of an operand is done by the streamer, not the
        mover. flags: other attributes of the opcode.
        """
        sides = []
        for side, value in (("transpose_a", a), ("transpose_b", b)):
            source = self._transposed(value)
            if source is not None:
                flags[side] = True
            sides.append(source or value)
        sizes = {"M": a.shape[-2], "K": a.shape[-1], "N": b.shape[-1]}
        return self.one("matmul", *sides, *(() if start is None else (start,)), **sizes, **flags)

    def _transposed(self, value: Value) -> Value | None:
        """What `value` is the transposition of, in its last two axes alone."""
        if not self.optimize:
            return None
        op, inputs = self._writer.get(value.name, (None, ()))
        swapped = (*range(value.ndim - 2), value.ndim - 1, value.ndim - 2)
        found = op is not None and op.opcode == "transpose" and op.attrs["permutation"] == swapped
        return inputs[0] if found else None

    def program(self, outputs: Sequence[Value]) -> DFXProgram:
        """The program that computes `outputs`, without operations whose results are unused."""
        needed = {value.name for value in outputs}
        kept: list[DFXOp] = []
        for op in reversed(self._ops):
            if not self.optimize or needed.intersection(op.outputs):
                kept.append(op)
                needed.update(op.inputs)
        kept.reverse()
        names = [*self._inputs, *(name for op in kept for name in op.outputs)]
        return DFXProgram(
            name=self.name,
            tensors={name: self._specs[name] for name in names},
            ops=kept,
            inputs=self._inputs,
            outputs=[value.name for value in outputs],
        )


def _product(sizes: Any) -> int:
    out = 1
    for size in sizes:
        out *= size
    return out
