"""Memory of a Vulkan device: blocks that the driver allocates, cut by the pool, and what all of it comes to."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import attrs
import torch
from hal_compute.pool import DevicePool, Region
from hal_compute.session import ComputeMemory
from torch import Tensor

from hal_core.plugin_api import DTYPE_BYTES, Buffer, ContractError, DeviceUnavailableError, MemoryStats, PooledMemory

from ._vk import Bound, Gpu, Memory

if TYPE_CHECKING:
    from .recorder import Recorder


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
            host, exported: see `Gpu.allocate`. free: gives a block back; the driver's own way without it.
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
        """Give every block back, those too of which somebody has a tensor: what shares the memory keeps it alive."""
        for block in self._blocks:
            self._gpu.free(block.handle)
        self._blocks.clear()
        self.in_use = 0


@attrs.define(eq=False)
class _Loan:
    """A region that a buffer's tensors have."""

    region: Region
    freed: bool = False


class VulkanMemory(ComputeMemory):
    """Buffers that travel by DLPack: CUDA tensors in the device's own memory where the card is shared, on the host
    elsewhere.

    All memory of the device is counted in; what recordings keep counts as pooled.
    """

    def __init__(self, recorder: Recorder, limit: int | None, lock: AbstractContextManager[Any]) -> None:
        super().__init__(recorder, limit)
        self._recorder, self._device_lock = recorder, lock
        self._loans: WeakKeyDictionary[Buffer, _Loan] = WeakKeyDictionary()
        self._ended: deque[_Loan] = deque()  # that nobody has a tensor of any more
        self._lingering = 0  # bytes of buffers that were freed while somebody still has a tensor of them

    def allocate(self, shape: Sequence[int], dtype: str) -> Buffer:
        with self._device_lock:
            self._collect()
            if self._recorder.closed:
                raise DeviceUnavailableError(f"{self._name}'s session was closed: take a new one with hal.session()")
            card = self._recorder.card
            if card is None:
                return super().allocate(shape, dtype)
            if dtype not in DTYPE_BYTES or any(size < 0 for size in shape):
                given = f"shape {tuple(shape)} of {dtype} was given"
                raise ContractError(f"{given}: use sizes >= 0 and one of {sorted(DTYPE_BYTES)}")
            nbytes = math.prod(shape) * DTYPE_BYTES[dtype]
            region = self._recorder.cut(self._recorder.pool, nbytes)
            loan = _Loan(region)
            try:
                whole = card.lend(Bound(region.block, region.offset, region.size), partial(self._ended.append, loan))
            except BaseException:
                self._recorder.pool.free(region)
                raise
            buffer = Buffer(whole[:nbytes].view(getattr(torch, dtype)).view(tuple(shape)), self, region.size)
            self._loans[buffer] = loan
            return buffer

    def free(self, buffer: Buffer) -> None:
        with self._device_lock:
            loan = self._loans.pop(buffer, None)
            if loan is None:
                super().free(buffer)
                return
            loan.freed = True
            self._lingering += loan.region.size
            buffer.release()
            self._collect()

    def to_backend(self, tensor: Tensor) -> Buffer:
        if not tensor.is_cuda or self._recorder.lies(tensor):
            return Buffer(tensor.detach(), self, 0)
        return super().to_backend(tensor)

    def _collect(self) -> None:
        """Take regions back whose last tensor is gone. Tensors end in any thread, so that they only leave a note."""
        ended = len(self._ended)  # a tensor that ends from here on may still have work under way after the wait
        if self._recorder.closed:  # its memory is gone, but for what shares it
            self._ended.clear()
            self._lingering = 0
            return
        if self._recorder.stuck:  # neither wait again nor take back what still runs
            return
        if ended:
            self._recorder.settle()
        for _ in range(ended):
            loan = self._ended.popleft()
            self._recorder.pool.free(loan.region)
            self._lingering -= loan.region.size if loan.freed else 0

    def stats(self) -> MemoryStats:
        with self._device_lock:
            self._collect()
            recorder, host = self._recorder, PooledMemory.stats(self)
            pools = recorder.pool, recorder.staging
            in_use = sum(pool.in_use for pool in pools) - recorder.kept_bytes - self._lingering
            reserved = sum(pool.reserved for pool in pools) + recorder.ring.nbytes
            return attrs.evolve(
                host,
                in_use=host.in_use + in_use,
                pooled=host.pooled + reserved - in_use,
                peak=host.peak + sum(pool.peak for pool in pools),
                allocations=host.allocations + sum(pool.allocations for pool in pools),
                reuses=host.reuses + sum(pool.reuses for pool in pools),
                copies=host.copies + recorder.copies,
                copied=host.copied + recorder.copied,
            )

    def trim(self) -> int:
        with self._device_lock:
            self._collect()
            return super().trim()
