"""Memory of a Vulkan device: blocks that the driver allocates, cut by the pool."""

from __future__ import annotations

from hal_compute.pool import DevicePool

from ._vk import Gpu


class VulkanMemoryPool(DevicePool):
    """Regions that shaders can bind. Not thread-safe: the session holds its lock."""

    def __init__(self, gpu: Gpu, name: str, *, host: bool, limit: int | None) -> None:
        """`host`: whether blocks are mapped. `limit`: bytes, at most the device's memory; None for all of it."""
        adapter = gpu.adapter
        whole = adapter.memory
        super().__init__(
            name, lambda nbytes: gpu.allocate(nbytes, host=host), gpu.free,
            alignment=max(adapter.limits["minStorageBufferOffsetAlignment"], 256),
            largest=adapter.limits["maxStorageBufferRange"], limit=whole if limit is None else min(limit, whole),
        )  # fmt: skip
