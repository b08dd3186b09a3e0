"""Which kernel a device runs attention with, from the features it reports. Calls and `hal doctor` both ask here.

The paths, best first: matrices of VK_NV_cooperative_matrix2, matrices of VK_KHR_cooperative_matrix, lanes that share a
key (for few rows), streams of keys (on a CPU's driver), tiles in shared memory. A path needs every feature bit and
every subgroup operation that its shader uses.
"""

from __future__ import annotations

from typing import NamedTuple

from .runtime._vk import Adapter

_KHR = frozenset({"cooperative_matrix", "memory_model", "float16", "full_subgroups"})
_DTYPES = {"float16": frozenset[str](), "bfloat16": frozenset({"bfloat16_matrix"})}
_NEEDS = {"nv2": _KHR | {"nv2_reductions", "nv2_conversions", "nv2_per_element_operations"}, "khr": _KHR}
_EXTENSIONS = {"nv2": "VK_NV_cooperative_matrix2", "khr": "VK_KHR_cooperative_matrix"}
_ROWS = frozenset({"full_subgroups", "device_scope"})
_VOTE, _SHUFFLE = 0x2, 0x10  # VkSubgroupFeatureFlagBits
_OPERATIONS = {"nv2": _VOTE, "khr": _VOTE | _SHUFFLE}
_SIDES = (16, 8)  # rows, columns and depth of the matrices that the shaders are written for


#: Bytes from which a host tensor is read where it lies, where the device can: importing a smaller one costs more than a
#: copy.
IMPORT_FROM = 1 << 20


class MatrixStep(NamedTuple):
    """A shader on cooperative matrices, and what it is specialised for on a device.

    Attributes:
        name: "nv2" or "khr", after the extension. side: rows, columns and depth of the matrices.
        subgroup: invocations of a subgroup. shared: bytes of shared memory that a work group may have.
    """

    name: str
    side: int
    subgroup: int
    shared: int

    def __str__(self) -> str:
        return f"{self.side}x{self.side}x{self.side} matrices in subgroups ({_EXTENSIONS[self.name]})"


def matrix_steps(adapter: Adapter, dtype: str) -> list[MatrixStep]:
    """The matrix steps of which a device reports every feature, best first."""
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
    """Whether subgroups support all of some operations."""
    return adapter.limits["subgroupOperations"] & operations == operations


def matrix_step(adapter: Adapter, dtype: str) -> MatrixStep | None:
    """The matrix step that calls take; None on a CPU's driver, which computes matrices element by element."""
    steps = [] if adapter.is_cpu else matrix_steps(adapter, dtype)
    return steps[0] if steps else None


class RowStep(NamedTuple):
    """forward_rows.comp, for few query rows. `subgroup`: invocations. `shared`: bytes that a work group may have."""

    subgroup: int
    shared: int

    def __str__(self) -> str:
        return "lanes that share a key"


def row_step(adapter: Adapter) -> RowStep | None:
    """The step for few rows: it needs full subgroups that vote and shuffle, and work groups that see each other's
    memory.

    None on a CPU's driver, where other kernels are faster.
    """
    if adapter.is_cpu or not adapter.features >= _ROWS or not _does(adapter, _VOTE | _SHUFFLE):
        return None
    return RowStep(adapter.limits["subgroupSize"], adapter.limits["maxComputeSharedMemorySize"])


def kernel_names(adapter: Adapter) -> str:
    """The kernels that run attention on this device, by dtype, in words."""
    plain = "streams of keys, or tiles, in subgroups" if adapter.is_cpu else "tiles in shared memory"
    found = {dtype: str(matrix_step(adapter, dtype) or plain) for dtype in ("float16", "bfloat16", "float32")}
    text = plain if set(found.values()) == {plain} else "; ".join(f"{dtype}: {step}" for dtype, step in found.items())
    few = row_step(adapter)
    return text if few is None else f"{text}; few query rows: {few}"
