"""Device memory that shaders can bind, by sub-allocation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from hal_compute.cost import HOST_BLOCK
from hal_compute.memory import ComputeMemory, HostBlock
from hal_compute.pool import BLOCK, DevicePool, Region
from torch import Tensor

from hal_core.plugin_api import DeviceUnavailableError

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
        memory: Callable[[], ComputeMemory] | None = None,
    ) -> None:
        """A pool of the device's memory.

        Args:
            host, exported: see `Gpu.allocate`. free: frees a block; None: `gpu.free`.
            limit: bytes, at most the device's memory; None for all of it.
            memory: the manager whose host buffers the driver imports as blocks; None: the driver allocates them.
        """
        self._gpu, adapter = gpu, gpu.adapter
        self._memory, self._give_back = memory, free or gpu.free
        self._host: dict[Any, tuple[Tensor, HostBlock | None]] = {}  # bytes of mapped blocks, by VkDeviceMemory
        self._options = {"host": host, "exported": exported}
        super().__init__(
            name,
            self._create_block,
            self._destroy_block,
            alignment=max(adapter.limits["minStorageBufferOffsetAlignment"], 256),
            largest=adapter.limits["maxStorageBufferRange"],
            limit=adapter.memory if limit is None else min(limit, adapter.memory),
            block=BLOCK if memory is None else HOST_BLOCK,
            borrows=memory is not None,
        )

    def _create_block(self, nbytes: int) -> Memory:
        if self._memory is not None:
            return self._import_block(self._memory(), nbytes)
        block = self._gpu.allocate(nbytes, **self._options)
        if block.mapped is not None:
            self._host[block.memory] = torch.frombuffer(block.mapped, dtype=torch.uint8, count=nbytes), None
        return block

    def _import_block(self, memory: ComputeMemory, nbytes: int) -> Memory:
        host = memory.allocate_block(nbytes)
        try:
            block = self._gpu.import_host(host.bytes.data_ptr(), host.bytes.numel())
            if block is None:
                raise DeviceUnavailableError(f"{self._gpu.name} does not take the host's memory: update its driver")
        except BaseException:
            memory.free(host.buffer)
            raise
        self._host[block.memory] = host.bytes, host
        self.borrowed += host.buffer.reserved
        return block

    def _destroy_block(self, block: Memory) -> None:
        _, host = self._host.pop(block.memory, (None, None))
        self._give_back(block)
        if host is not None and self._memory is not None:
            self.borrowed -= host.buffer.reserved
            self._memory().free(host.buffer)

    def host(self, region: Region, nbytes: int) -> Tensor | None:
        """The first bytes of a region as the host sees them; None where its memory is not mapped."""
        found = self._host.get(region.block.memory)
        return None if found is None else found[0][region.offset : region.offset + nbytes]

    def abandon(self) -> None:
        """Free every block, also those of which a tensor is alive: what shares the memory keeps it."""
        for block in self._blocks:
            self._gpu.free(block.handle)
        self._blocks.clear()
        self.in_use = 0
