"""Device memory that shaders can bind, by sub-allocation."""

from __future__ import annotations

from collections.abc import Callable

from hal_compute.pool import DevicePool

from ._vk import Gpu, Memory


class VulkanMemoryPool(DevicePool):
    """Regions that shaders can bind. Not thread-safe: the session holds its lock."""

    def __init__(
        self,
        gpu: Gpu,
        name: str,
        *,
        host: bool,
        limit: int | None,
        exported: bool = False,
        free: Callable[[Memory], None] | None = None,
    ) -> None:
        """A pool of the device's memory.

        Args:
            host, exported: see `Gpu.allocate`. free: frees a block; None: `gpu.free`.
            limit: bytes, at most the device's memory; None for all of it.
        """
        self._gpu, adapter = gpu, gpu.adapter
        super().__init__(
            name,
            lambda nbytes: gpu.allocate(nbytes, host=host, exported=exported),
            free or gpu.free,
            alignment=max(adapter.limits["minStorageBufferOffsetAlignment"], 256),
            largest=adapter.limits["maxStorageBufferRange"],
            limit=adapter.memory if limit is None else min(limit, adapter.memory),
        )

    def abandon(self) -> None:
        """Free every block, also those of which a tensor is alive: what shares the memory keeps it."""
        for block in self._blocks:
            self._gpu.free(block.handle)
        self._blocks.clear()
        self.in_use = 0
