"""Which Vulkan devices there are, or why there are none. Nothing here raises for absent hardware."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

from hal_core import Device, Fidelity

from ._vk import Adapter, UnavailableError, adapters


class Found(NamedTuple):
    """Adapters by device id, the devices, and why there are none."""

    adapters: dict[str, Adapter]
    devices: tuple[Device, ...]
    reason: str


@lru_cache(maxsize=1)
def find() -> Found:
    """All Vulkan devices, GPUs first. Looked for once in a process."""
    try:
        found = {f"vulkan:{n}": adapter for n, adapter in enumerate(adapters())}
    except UnavailableError as reason:
        return Found({}, (), str(reason))
    return Found(found, tuple(_describe(device_id, adapter) for device_id, adapter in found.items()), "")


def ladder(adapter: Adapter) -> str:
    """The kernel that attention runs on this device."""
    return "streamed uniform buffers, tiles in single subgroups" if adapter.is_cpu else "shared-memory tiles"


def _describe(device_id: str, adapter: Adapter) -> Device:
    limits = adapter.limits
    features = [
        f"Vulkan {'.'.join(map(str, adapter.api))}", f"subgroups of {limits['subgroupSize']}",
        f"{limits['maxComputeSharedMemorySize'] >> 10} KiB shared memory",
        f"{limits['maxStorageBufferRange'] >> 20} MiB per buffer range", *sorted(adapter.features),
        f"kernel: {ladder(adapter)}",
    ]  # fmt: skip
    return Device(
        id=device_id, family="vulkan", vendor=adapter.vendor, model=adapter.name,
        fidelity=Fidelity.EMULATED if adapter.is_cpu else Fidelity.HARDWARE, reads=("cpu",), memory=adapter.memory,
        driver=adapter.driver, features=tuple(features),
    )  # fmt: skip
