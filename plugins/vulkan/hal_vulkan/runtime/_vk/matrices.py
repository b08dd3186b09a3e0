"""The cooperative matrices that a device multiplies in a subgroup."""

from __future__ import annotations

from typing import Any, NamedTuple

#: VkComponentTypeKHR of the types that attention is computed in.
TYPES = {0: "float16", 1: "float32", 1000141000: "bfloat16"}
_SUBGROUP = 3  # VkScopeKHR


class MatrixShape(NamedTuple):
    """A product of [rows, depth] and [depth, columns] of `inputs`, added to [rows, columns] of `sums`: names of
    dtypes.
    """

    rows: int
    columns: int
    depth: int
    inputs: str
    sums: str


def matrix_shapes(ffi: Any, lib: Any, instance: Any, handle: Any) -> tuple[MatrixShape, ...]:
    """What VK_KHR_cooperative_matrix lists for subgroups, in the driver's order; the extension must be listed."""
    name = b"vkGetPhysicalDeviceCooperativeMatrixPropertiesKHR"
    function = lib.vkGetInstanceProcAddr(instance, ffi.new("char[]", name))
    if function == ffi.NULL:
        return ()
    listing = ffi.cast(f"PFN_{name.decode()}", function)
    count = ffi.new("uint32_t*")
    listing(handle, count, ffi.NULL)
    listed = ffi.new("VkCooperativeMatrixPropertiesKHR[]", [{"sType": 1000506001}] * count[0])
    listing(handle, count, listed)
    return tuple(
        MatrixShape(m.MSize, m.NSize, m.KSize, TYPES[m.AType], TYPES[m.CType])
        for m in (listed[n] for n in range(count[0]))
        if m.scope == _SUBGROUP and m.AType == m.BType and m.CType == m.ResultType and {m.AType, m.CType} <= set(TYPES)
    )
