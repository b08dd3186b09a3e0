"""What an operation asks of the machine, and what an opcode is."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import attrs

from .specs import TensorSpec

if TYPE_CHECKING:
    from torch import Tensor

Attributes: TypeAlias = Mapping[str, Any]
Specs: TypeAlias = Sequence[TensorSpec]
Engine: TypeAlias = Literal["array", "vector", "mover", "none"]


@attrs.frozen(kw_only=True)
class Work:
    """What an operation asks of the machine.

    Attributes:
        engine: "array": `batch` products of [M, K] by [K, N] on the PE array. "vector": `passes` operations on each of
            `elements` on the vector unit. "mover": the block mover copies, permutes or gathers bytes. "none": a new
            name for the same bytes, or no bytes at all.
        reads_bytes, writes_bytes: each operand and result once, as they cross the outermost buffer when nothing is
            kept.
        dtype: of the operands that are computed with.
        epilogue, epilogue_bytes: vector operations on a product's results as they leave the arrays, all together, and
            what these read beside them; `writes_bytes` is then what they leave behind.
        rest: work that comes after this one in the same operation, counted in `macs` alone; see `parts`.
    """

    engine: Engine
    batch: int = 0
    M: int = 0
    N: int = 0
    K: int = 0
    elements: int = 0
    passes: int = 0
    reads_bytes: int = 0
    writes_bytes: int = 0
    dtype: str = "float32"
    epilogue: int = 0
    epilogue_bytes: int = 0
    rest: Work | None = None

    @property
    def macs(self) -> int:
        """Multiply-accumulates on the array."""
        return self.batch * self.M * self.N * self.K + (self.rest.macs if self.rest else 0)

    @property
    def parts(self) -> tuple[Work, ...]:
        """What runs one after the other: itself, then the rest."""
        return (self,) if self.rest is None else (attrs.evolve(self, rest=None), *self.rest.parts)


def _names(names: Iterable[str]) -> frozenset[str]:
    return frozenset(names)


@attrs.frozen
class Opcode:
    """An operation of the machine.

    Attributes:
        name: as programs write it.
        value: (inputs, attrs) -> outputs, on torch tensors of any device, the meta device too: shapes are found so.
            Operands of different types are widened by torch's promotion rules as they are read.
        work: (input specs, output specs, attrs) -> `Work`.
        arity: fewest and most inputs.
        required: attributes that must be there. optional: others that may be.
        outputs: how many tensors it writes.
    """

    name: str
    value: Callable[[tuple[Tensor, ...], Attributes], tuple[Tensor, ...]]
    work: Callable[[Specs, Specs, Attributes], Work]
    arity: tuple[int, int]
    required: frozenset[str] = attrs.field(default=frozenset(), converter=_names)
    optional: frozenset[str] = attrs.field(default=frozenset(), converter=_names)
    outputs: int = 1


def traffic(inputs: Specs, outputs: Specs) -> dict[str, Any]:
    """The byte counts and the type of a `Work`, from its tensors."""
    return {
        "reads_bytes": sum(spec.nbytes for spec in inputs),
        "writes_bytes": sum(spec.nbytes for spec in outputs),
        "dtype": (inputs or outputs)[0].dtype,
    }


def vector_work(
    passes: int, over: Literal["inputs", "outputs"] = "outputs"
) -> Callable[[Specs, Specs, Attributes], Work]:
    """`passes` operations on each element of the first output, or of the first input where an operation reduces."""

    def work(inputs: Specs, outputs: Specs, attrs: Attributes) -> Work:
        elements = (inputs if over == "inputs" else outputs)[0].numel
        return Work(engine="vector", elements=elements, passes=passes, **traffic(inputs, outputs))

    return work


def mover_work(inputs: Specs, outputs: Specs, attrs: Attributes) -> Work:
    """A copy: what is written is read once, with the indices that say where from."""
    written = sum(spec.nbytes for spec in outputs)
    indices = sum(spec.nbytes for spec in inputs[1:] if spec.dtype.startswith("int"))
    read = min(written, sum(spec.nbytes for spec in inputs)) + indices
    dtype = (inputs or outputs)[0].dtype
    elements = math.prod(outputs[0].shape)
    return Work(engine="mover", elements=elements, reads_bytes=read, writes_bytes=written, dtype=dtype)


def no_work(inputs: Specs, outputs: Specs, attrs: Attributes) -> Work:
    """No byte moves."""
    return Work(engine="none", dtype=(inputs or outputs)[0].dtype)
