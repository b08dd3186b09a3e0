"""Vulkan devices: what they are, what they run, what a call would cost."""

from __future__ import annotations

from collections.abc import Sequence

import attrs
from hal_compute.backend import CAPABILITIES, ComputeBackend

from hal_core import Capabilities, Device, DeviceUnavailableError, Numerics, Session

from .detect import find
from .ladder import matrix_step

_CAPABILITIES = attrs.evolve(
    CAPABILITIES, dtypes=CAPABILITIES.dtypes | {"bfloat16"},
    numerics={**CAPABILITIES.numerics, "bfloat16": Numerics(relative=5e-3, lse=1e-3, gradient=2e-2)},
)  # fmt: skip


class VulkanBackend(ComputeBackend):
    """All Vulkan devices of the machine, GPUs first."""

    calibration_length = 512

    def devices(self) -> Sequence[Device]:
        return find().devices

    def why_absent(self) -> str:
        return find().reason

    def capabilities(self, device: Device) -> Capabilities:
        return _CAPABILITIES

    def room(self, device: Device) -> tuple[int, int]:
        adapter = find().adapters[device.id]
        return adapter.memory, adapter.limits["maxStorageBufferRange"]

    def assumed(self, device: Device) -> tuple[tuple[float, float], tuple[float, float]]:
        adapter = find().adapters[device.id]
        fast = 2e14 if matrix_step(adapter, "float16") else 2e13
        return (1e-4, 2e-2), (5e8, 2e10) if adapter.is_cpu else (1e11, fast)

    def open(self, device: Device) -> Session:
        adapter = find().adapters.get(device.id)
        if adapter is None:
            raise DeviceUnavailableError(f"{device.id} is not present: {find().reason or 'see `hal devices`'}")
        from .session import VulkanSession

        return VulkanSession(device, adapter)
