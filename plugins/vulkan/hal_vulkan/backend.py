"""Vulkan devices: what they are, what they run, what a call would cost."""

from __future__ import annotations

from collections.abc import Sequence

from hal_compute.backend import ComputeBackend

from hal_core import Device, DeviceUnavailableError, Session

from .detect import find


class VulkanBackend(ComputeBackend):
    """All Vulkan devices of the machine, GPUs first."""

    calibration_length = 512

    def devices(self) -> Sequence[Device]:
        return find().devices

    def why_absent(self) -> str:
        return find().reason

    def room(self, device: Device) -> tuple[int, int]:
        adapter = find().adapters[device.id]
        return adapter.memory, adapter.limits["maxStorageBufferRange"]

    def assumed(self, device: Device) -> tuple[tuple[float, float], tuple[float, float]]:
        return (1e-4, 2e-2), (5e8, 2e10) if find().adapters[device.id].is_cpu else (1e11, 2e13)

    def open(self, device: Device) -> Session:
        adapter = find().adapters.get(device.id)
        if adapter is None:
            raise DeviceUnavailableError(f"{device.id} is not present: {find().reason or 'see `hal devices`'}")
        from .session import VulkanSession

        return VulkanSession(device, adapter)
