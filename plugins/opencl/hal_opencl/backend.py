"""The OpenCL backend: devices, capabilities, estimates."""

from __future__ import annotations

from collections.abc import Sequence

import attrs
from hal_compute.backend import CAPABILITIES, ComputeBackend

from hal_core.plugin_api import AttentionRequest, Capabilities, Choice, Device, DeviceUnavailableError, Session

from . import cost
from .discovery import find, is_cpu
from .tiling import TILE_SIZES, tiling_of


class OpenClBackend(ComputeBackend):
    """All OpenCL devices of the machine, GPUs first."""

    def devices(self) -> Sequence[Device]:
        return find().devices

    def why_absent(self) -> str:
        return find().reason

    def room(self, device: Device) -> tuple[int, int]:
        handle = find().handles[device.id]
        return int(handle.global_mem_size), int(handle.max_mem_alloc_size)

    def assumed(self, device: Device) -> tuple[tuple[float, float], tuple[float, float]]:
        return cost.assumed(find().handles[device.id])

    def capabilities(self, device: Device) -> Capabilities:
        """A CPU's kernel is built for the block sizes of a caller's tiling; a GPU's has its own."""
        cpu = is_cpu(find().handles[device.id])
        return attrs.evolve(CAPABILITIES, tile_sizes=Choice(TILE_SIZES)) if cpu else CAPABILITIES

    def memory(self, request: AttentionRequest, device: Device) -> int:
        handle = find().handles[device.id]
        return cost.memory(request, tiling_of(handle), max(int(handle.mem_base_addr_align) // 8, 64))

    def largest_buffer(self, request: AttentionRequest, device: Device) -> int:
        return cost.largest_buffer(request, tiling_of(find().handles[device.id]))

    def loaded_before_fork(self) -> bool:
        return find().process.forked

    def open(self, device: Device) -> Session:
        find().process.check(device.id)
        handle = find().handles.get(device.id)
        if handle is None:
            raise DeviceUnavailableError(f"{device.id} is not present: {find().reason or 'see `hal devices`'}")
        from .session import OpenClSession

        return OpenClSession(device, handle)
