"""The memory of an OpenCL device: host buffers, the device's own memory in a pool, and the ring of pinned slots."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import pyopencl as cl
import torch
from hal_compute.memory import ComputeMemory
from hal_compute.pool import DevicePool

from .runtime.engine import Engine
from .runtime.staging import StagingRing


class OpenClMemory(ComputeMemory):
    """Host buffers, and a pool that calls take their workspaces from. The session holds its lock for the pool."""

    def __init__(self, engine: Engine, limit: int | None = None) -> None:
        """`limit`: bytes; None for all of the device's memory."""
        super().__init__(engine.device.id, limit)
        self._engine = engine
        handle, bound = engine.handle, int(engine.handle.global_mem_size)
        self.pool = DevicePool(
            engine.device.id,
            self._create,
            self._destroy,
            alignment=max(int(handle.mem_base_addr_align) // 8, 64),
            largest=int(handle.max_mem_alloc_size),
            limit=bound if limit is None else min(limit, bound),
        )
        self.ring = StagingRing(engine)

    @property
    def pools(self) -> Sequence[DevicePool]:
        return (self.pool,)

    @property
    def kept(self) -> tuple[int, int]:
        return 0, self.ring.nbytes

    def _create(self, nbytes: int) -> tuple[Any, Any]:
        """(cl.Buffer, the same memory as a tensor where the device is a CPU)."""
        engine = self._engine
        with engine.named(f"allocate {nbytes:,} bytes", nbytes):
            if not engine.shares_memory:
                return cl.Buffer(engine.context, cl.mem_flags.READ_WRITE, nbytes), None
            host = torch.empty(nbytes, dtype=torch.uint8, device="cpu")
            flags = cl.mem_flags.READ_WRITE | cl.mem_flags.USE_HOST_PTR
            return cl.Buffer(engine.context, flags, hostbuf=host.numpy()), host

    @staticmethod
    def _destroy(block: tuple[Any, Any]) -> None:
        with suppress(cl.Error):  # a lost device has nothing to free
            block[0].release()

    def trim(self) -> int:
        engine = self._engine
        engine.reclaim()
        return super().trim() + self.pool.trim() + (0 if engine.lost or engine.hangs else self.ring.trim())
