"""OpenCL devices: what they are, what they run, what a call would cost."""

from __future__ import annotations

from collections.abc import Sequence

from hal_compute.backend import ComputeBackend

from hal_core.plugin_api import Device, DeviceUnavailableError, Session

from .detect import find, is_cpu


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
        handle = find().handles[device.id]
        units = handle.max_compute_units
        return (5e-5, 2e-3), (2e9 * units, 4e10 * units) if is_cpu(handle) else (2e9 * units, 1e11 * units)

    def open(self, device: Device) -> Session:
        handle = find().handles.get(device.id)
        if handle is None:
            raise DeviceUnavailableError(f"{device.id} is not present: {find().reason or 'see `hal devices`'}")
        from .session import OpenClSession

        return OpenClSession(device, handle)
