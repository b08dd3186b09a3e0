"""The memory of an OpenCL device: host buffers, the device's own memory in a pool, and the ring of pinned slots."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import pyopencl as cl
from hal_compute.cost import HOST_BLOCK
from hal_compute.memory import ComputeMemory, HostBlock
from hal_compute.pool import BLOCK, DevicePool

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
            block=HOST_BLOCK if engine.shares_memory else BLOCK,
            borrows=engine.shares_memory,
        )
        #: Host memory of calls: what a mask or a plan becomes, and results that are not asked for.
        self.scratch = DevicePool(
            engine.device.id,
            self._create_scratch,
            self._destroy_scratch,
            alignment=64,
            largest=1 << 62,
            limit=1 << 62,
            block=HOST_BLOCK,
            borrows=True,
        )
        self.ring = StagingRing(engine)

    @property
    def pools(self) -> Sequence[DevicePool]:
        return self.pool, self.scratch

    @property
    def kept(self) -> tuple[int, int]:
        return 0, self.ring.nbytes

    def _create_scratch(self, nbytes: int) -> HostBlock:
        host = self.allocate_block(nbytes)
        self.scratch.borrowed += host.buffer.reserved
        return host

    def _destroy_scratch(self, host: HostBlock) -> None:
        self.scratch.borrowed -= host.buffer.reserved
        self.free(host.buffer)

    def free_lost(self) -> None:
        """Free what an interrupt left in the pools. For a time when no call is under way: calls take turns."""
        for pool in self.pools:
            if pool.in_use:
                pool.free_all()

    def _create(self, nbytes: int) -> tuple[Any, HostBlock | None]:
        """(cl.Buffer, the host memory that it is where the device is a CPU)."""
        engine = self._engine
        if not engine.shares_memory:
            with engine.named(f"allocate {nbytes:,} bytes", nbytes):
                return cl.Buffer(engine.context, cl.mem_flags.READ_WRITE, nbytes), None
        host = self.allocate_block(nbytes)
        try:
            with engine.named(f"allocate {nbytes:,} bytes", nbytes):
                flags = cl.mem_flags.READ_WRITE | cl.mem_flags.USE_HOST_PTR
                buffer = cl.Buffer(engine.context, flags, hostbuf=host.bytes.numpy()[:nbytes])
        except BaseException:
            self.free(host.buffer)
            raise
        self.pool.borrowed += host.buffer.reserved
        return buffer, host

    def _destroy(self, block: tuple[Any, HostBlock | None]) -> None:
        buffer, host = block
        with suppress(cl.Error):  # a lost device has nothing to free
            buffer.release()
        if host is not None:
            self.pool.borrowed -= host.buffer.reserved
            self.free(host.buffer)

    def trim(self) -> int:
        engine = self._engine
        engine.reclaim()
        return super().trim() + (0 if engine.lost or engine.hangs else self.ring.trim())
