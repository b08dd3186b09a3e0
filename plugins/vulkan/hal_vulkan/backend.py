"""The Vulkan backend: devices, capabilities, estimates."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import attrs
from hal_compute.backend import CAPABILITIES, ComputeBackend
from hal_compute.sizes import PACK_BELOW, padded_dim

from hal_core.plugin_api import (
    AttentionRequest,
    Capabilities,
    Choice,
    Code,
    Device,
    DeviceUnavailableError,
    Numerics,
    Range,
    Refusal,
    Session,
)

from . import cost
from .discovery import find
from .tiling import TILE_SIZES, VulkanTiling, foreign_cut

_CAPABILITIES = attrs.evolve(
    CAPABILITIES,
    dtypes=CAPABILITIES.dtypes | {"bfloat16"},
    numerics={**CAPABILITIES.numerics, "bfloat16": Numerics(relative=5e-3, lse=1e-3, gradient=2e-2)},
)

_LEAST_ROWS = 8  # of a work group, for calls with more rows


class VulkanBackend(ComputeBackend):
    """All Vulkan devices of the machine, GPUs first."""

    calibration_length = 512

    def devices(self) -> Sequence[Device]:
        return find().devices

    def why_absent(self) -> str:
        return find().reason

    def capabilities(self, device: Device) -> Capabilities:
        """Heads are bounded by the work groups of one dispatch. Batch entries beyond it take several dispatches."""
        limits = find().adapters[device.id].limits
        most = min(limits[f"maxComputeWorkGroupCount{axis}"] for axis in "XY")
        return attrs.evolve(_CAPABILITIES, heads=Range(1, most), tile_sizes=Choice(TILE_SIZES))

    def check(self, request: AttentionRequest, device: Device) -> Iterable[Refusal]:
        """Memory, the work groups of one dispatch, which bound the rows of a unit, and a tiling's shared memory."""
        yield from super().check(request, device)
        if request.tiling is not None:
            needed, shared = (
                foreign_cut(*request.tiling[1:]).shared_bytes(padded_dim(request)),
                self._tiling(device).shared,
            )
            if needed > shared:
                given, offered = f"{needed:,} bytes of shared memory", f"{shared:,} bytes"
                yield Refusal(Code.TILING, "tiling", given, offered, "use smaller blocks")
        together = request.heads_q // request.heads_kv if request.len_q < PACK_BELOW else 1
        most = _LEAST_ROWS * find().adapters[device.id].limits["maxComputeWorkGroupCountX"] // max(together, 1)
        if request.len_q > most:
            yield Refusal(Code.LENGTH, "len_q", f"{request.len_q:,}", f"at most {most:,}", "split the queries")

    def room(self, device: Device) -> tuple[int, int]:
        adapter = find().adapters[device.id]
        return adapter.memory, adapter.limits["maxStorageBufferRange"]

    def assumed(self, device: Device) -> tuple[tuple[float, float], tuple[float, float]]:
        return cost.assumed(find().adapters[device.id])

    def _tiling(self, device: Device) -> VulkanTiling:
        adapter = find().adapters[device.id]
        return VulkanTiling(adapter, adapter.memory)

    def _memory_of(self, request: AttentionRequest, device: Device) -> cost.CallMemory:
        return cost.CallMemory(request, find().adapters[device.id], self._tiling(device))

    def memory(self, request: AttentionRequest, device: Device) -> int:
        return self._memory_of(request, device).total()

    def largest_buffer(self, request: AttentionRequest, device: Device) -> int:
        return self._memory_of(request, device).largest_buffer()

    def loaded_before_fork(self) -> bool:
        return find().process.forked

    def open(self, device: Device) -> Session:
        find().process.check(device.id)
        adapter = find().adapters.get(device.id)
        if adapter is None:
            raise DeviceUnavailableError(f"{device.id} is not present: {find().reason or 'see `hal devices`'}")
        from .session import VulkanSession

        return VulkanSession(device, adapter)
