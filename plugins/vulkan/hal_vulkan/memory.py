"""Memory of a Vulkan device: blocks that the driver allocates, cut by the pool, and what all of it comes to."""

from __future__ import annotations

from typing import TYPE_CHECKING

import attrs
from hal_compute.pool import DevicePool
from hal_compute.session import ComputeMemory

from hal_core import MemoryStats, PooledMemory

from ._vk import Gpu

if TYPE_CHECKING:
    from .recorder import Recorder


class VulkanMemoryPool(DevicePool):
    """Regions that shaders can bind. Not thread-safe: the session holds its lock."""

    def __init__(self, gpu: Gpu, name: str, *, host: bool, limit: int | None) -> None:
        """`host`: whether blocks are mapped. `limit`: bytes, at most the device's memory; None for all of it."""
        adapter = gpu.adapter
        super().__init__(
            name, lambda nbytes: gpu.allocate(nbytes, host=host), gpu.free,
            alignment=max(adapter.limits["minStorageBufferOffsetAlignment"], 256),
            largest=adapter.limits["maxStorageBufferRange"],
            limit=adapter.memory if limit is None else min(limit, adapter.memory),
        )  # fmt: skip


class VulkanMemory(ComputeMemory):
    """Host buffers that travel by DLPack, with the device's own memory counted in; what recordings keep counts as pooled."""

    def __init__(self, recorder: Recorder, limit: int | None) -> None:
        super().__init__(recorder, limit)
        self._recorder = recorder

    def stats(self) -> MemoryStats:
        recorder, host = self._recorder, PooledMemory.stats(self)
        pools = recorder.pool, recorder.staging
        in_use = sum(pool.in_use for pool in pools) - recorder.kept_bytes
        reserved = sum(pool.reserved for pool in pools) + recorder.ring.nbytes
        return attrs.evolve(
            host, in_use=host.in_use + in_use, pooled=host.pooled + reserved - in_use,
            peak=host.peak + sum(pool.peak for pool in pools),
            allocations=host.allocations + sum(pool.allocations for pool in pools),
            reuses=host.reuses + sum(pool.reuses for pool in pools),
            copies=host.copies + recorder.copies, copied=host.copied + recorder.copied,
        )  # fmt: skip
