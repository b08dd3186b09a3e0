"""The kernel ladder: which kernel a device runs attention with, from the features it reports. Used by the calls and by
`hal doctor`, so that what is said is what runs.

The steps, best first: matrices of VK_NV_cooperative_matrix2, matrices of VK_KHR_cooperative_matrix, lanes that share a
key for few rows, streams for subgroups of a processor's driver, plain tiles in shared memory. Every feature bit and
every operation of subgroups that a step's shader uses is asked for.
"""

from __future__ import annotations

from typing import NamedTuple

from ._vk import Adapter

_KHR = frozenset({"cooperative_matrix", "memory_model", "float16", "full_subgroups"})
_DTYPES = {"float16": frozenset[str](), "bfloat16": frozenset({"bfloat16_matrix"})}
_NEEDS = {"nv2": _KHR | {"nv2_reductions", "nv2_conversions", "nv2_per_element_operations"}, "khr": _KHR}
_EXTENSIONS = {"nv2": "VK_NV_cooperative_matrix2", "khr": "VK_KHR_cooperative_matrix"}
_ROWS = frozenset({"full_subgroups", "device_scope"})
_VOTE, _SHUFFLE = 0x2, 0x10  # VkSubgroupFeatureFlagBits
_OPERATIONS = {"nv2": _VOTE, "khr": _VOTE | _SHUFFLE}
_SIDES = (16, 8)  # rows, columns and depth of the matrices that the shaders are written for


class MatrixStep(NamedTuple):
    """A shader on cooperative matrices, and what a device specialises it for.

    Attributes:
        name: "nv2" or "khr", of the shader's extension. side: rows, columns and depth of its matrices.
        subgroup: invocations of a subgroup. shared: bytes of shared memory that a work group may have.
    """

    name: str
    side: int
    subgroup: int
    shared: int

    def __str__(self) -> str:
        return f"{self.side}x{self.side}x{self.side} matrices in subgroups ({_EXTENSIONS[self.name]})"


def matrix_steps(adapter: Adapter, dtype: str) -> list[MatrixStep]:
    """The matrix steps that a device reports every feature of, best first."""
    lanes, shared = adapter.limits["subgroupSize"], adapter.limits["maxComputeSharedMemorySize"]
    shapes = {(m.rows, m.columns, m.depth) for m in adapter.matrices if (m.inputs, m.sums) == (dtype, "float32")}
    sides = [side for side in _SIDES if (side, side, side) in shapes and side <= lanes]
    if not sides or dtype not in _DTYPES or not _DTYPES[dtype] <= adapter.features:
        return []
    names = [
        name for name, needed in _NEEDS.items() if needed <= adapter.features and _does(adapter, _OPERATIONS[name])
    ]
    if adapter.api < (1, 3, 0):
        names = [name for name in names if name != "nv2"]  # the extension's SPIR-V is of Vulkan 1.3
    return [MatrixStep(name, sides[0], lanes, shared) for name in names]


def _does(adapter: Adapter, operations: int) -> bool:
    """Whether subgroups do all of some operations."""
    return adapter.limits["subgroupOperations"] & operations == operations


def matrix_step(adapter: Adapter, dtype: str) -> MatrixStep | None:
    """The matrix step that calls take; None on a processor's driver, which would compute a matrix element by
    element.
    """
    steps = [] if adapter.is_cpu else matrix_steps(adapter, dtype)
    return steps[0] if steps else None


class RowStep(NamedTuple):
    """forward_rows.comp, for few query rows. `subgroup`: its invocations. `shared`: bytes that a work group may
    have.
    """

    subgroup: int
    shared: int

    def __str__(self) -> str:
        return "lanes that share a key"


def row_step(adapter: Adapter) -> RowStep | None:
    """The step for few rows: full subgroups that vote and shuffle, work groups that see each other's memory.

    A processor's driver has better ways.
    """
    if adapter.is_cpu or not adapter.features >= _ROWS or not _does(adapter, _VOTE | _SHUFFLE):
        return None
    return RowStep(adapter.limits["subgroupSize"], adapter.limits["maxComputeSharedMemorySize"])


def ladder(adapter: Adapter) -> str:
    """The kernels that attention runs on this device, by dtype."""
    plain = "streams of keys, or tiles, in subgroups" if adapter.is_cpu else "tiles in shared memory"
    found = {dtype: str(matrix_step(adapter, dtype) or plain) for dtype in ("float16", "bfloat16", "float32")}
    said = plain if set(found.values()) == {plain} else "; ".join(f"{dtype}: {step}" for dtype, step in found.items())
    few = row_step(adapter)
    return said if few is None else f"{said}; few query rows: {few}"
