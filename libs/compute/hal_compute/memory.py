"""The memory of a device that runs compute programs: host buffers, and pools of memory that programs work in."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from hal_core.plugin_api import Buffer, MemoryStats, PooledMemory

from .cost import PAGE, block_bytes
from .pool import DevicePool


class HostBlock(NamedTuple):
    """Host memory that a pool cuts: bytes from the start of a page, and the buffer that holds them."""

    bytes: Tensor
    buffer: Buffer


class ComputeMemory(PooledMemory):
    """Host buffers that travel by DLPack, and pools from which calls take what they need beside results.

    Where the device is a CPU, the pools' blocks are buffers of this manager.
    """

    def __init__(self, name: str, limit: int | None) -> None:
        super().__init__("cpu", name=name, limit=limit)

    def allocate_host(self, shape: Sequence[int], dtype: str) -> Buffer:
        """An uninitialised buffer on the host, also where `allocate` gives the device's own memory."""
        return PooledMemory.allocate(self, shape, dtype)

    def allocate_block(self, nbytes: int) -> HostBlock:
        """A block for a pool of host memory."""
        buffer = self.allocate_host((block_bytes(nbytes) // 4,), "float32")
        whole = buffer.tensor.view(torch.uint8)
        start = -whole.data_ptr() % PAGE
        return HostBlock(whole[start : start + -(-nbytes // PAGE) * PAGE], buffer)

    @property
    def pools(self) -> Sequence[DevicePool]:
        """The pools, the one that programs work in first."""
        return ()

    @property
    def kept(self) -> tuple[int, int]:
        """Bytes (of the pools' regions, beside the pools) that are kept for reuse rather than in use."""
        return 0, 0

    def stats(self) -> MemoryStats:
        host, pools, (regions, beside) = super().stats(), self.pools, self.kept
        cut = sum(pool.borrowed for pool in pools)  # host buffers that pools cut regions from
        in_use = sum(pool.in_use for pool in pools) - regions
        reserved = sum(pool.reserved for pool in pools)
        return host._replace(
            in_use=host.in_use - cut + in_use,
            pooled=host.pooled + reserved + beside - in_use,
            peak=host.peak + sum(pool.peak for pool in pools if not pool.borrows),
            allocations=host.allocations + sum(pool.allocations for pool in pools),
            reuses=host.reuses + sum(pool.reuses for pool in pools),
        )

    def trim(self) -> int:
        return sum(pool.trim() for pool in self.pools) + super().trim()

    @property
    def fragmentation(self) -> float:
        """Of the memory that programs work in, 0 to 1; see `DevicePool.fragmentation`."""
        return self.pools[0].fragmentation
