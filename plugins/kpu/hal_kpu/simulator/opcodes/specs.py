"""What is known of a tensor of a program: its shape, its type, and where it lives."""

from __future__ import annotations

import math
from collections.abc import Iterable

import attrs

#: Bytes of one element, by torch's name of the type.
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


def _sizes(shape: Iterable[int]) -> tuple[int, ...]:
    return tuple(shape)


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
