"""The memory of a device that runs compute programs: host buffers, with the device's own memory counted in."""

from __future__ import annotations

from collections.abc import Sequence

from hal_core.plugin_api import Buffer, MemoryStats, PooledMemory

from .pool import DevicePool


class ComputeMemory(PooledMemory):
    """Host buffers that travel by DLPack, and pools of the device's memory for what calls need beside results."""

    def __init__(self, name: str, limit: int | None) -> None:
        super().__init__("cpu", name=name, limit=limit)

    def allocate_host(self, shape: Sequence[int], dtype: str) -> Buffer:
        """An uninitialised buffer on the host, also where `allocate` gives the device's own memory."""
        return PooledMemory.allocate(self, shape, dtype)

    @property
    def pools(self) -> Sequence[DevicePool]:
        """Pools of the device's memory, the one that programs work in first."""
        return ()

    @property
    def kept(self) -> tuple[int, int]:
        """Bytes (of the pools' regions, beside the pools) that are kept for reuse rather than in use."""
        return 0, 0

    def stats(self) -> MemoryStats:
        host, pools, (regions, beside) = super().stats(), self.pools, self.kept
        in_use = sum(pool.in_use for pool in pools) - regions
        return MemoryStats(
            in_use=host.in_use + in_use,
            pooled=host.pooled + sum(pool.reserved for pool in pools) + beside - in_use,
            peak=host.peak + sum(pool.peak for pool in pools),
            limit=host.limit,
            allocations=host.allocations + sum(pool.allocations for pool in pools),
            reuses=host.reuses + sum(pool.reuses for pool in pools),
            copies=host.copies,
            copied=host.copied,
        )

    @property
    def fragmentation(self) -> float:
        """Of the memory that programs work in, 0 to 1; see `DevicePool.fragmentation`."""
        return self.pools[0].fragmentation
