"""The memory of a Vulkan device: buffers, and the pools that calls take their workspaces from."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from functools import partial

import attrs
import torch
from hal_compute.memory import ComputeMemory
from hal_compute.pool import DevicePool, Region
from hal_compute.processes import DeviceLock
from torch import Tensor

from hal_core.plugin_api import DTYPE_BYTES, Buffer, ContractError, DeviceUnavailableError, MemoryStats

from .runtime._vk import Bound
from .runtime.recorder import Recorder


@attrs.define(eq=False)
class _Loan:
    """A region that a buffer's tensors share."""

    region: Region
    freed: bool = False


class VulkanMemory(ComputeMemory):
    """Buffers that travel by DLPack: CUDA tensors in the device's own memory where the card is shared, else on the
    host.

    All of the device's memory is counted; what recordings keep counts as pooled.
    """

    def __init__(self, recorder: Recorder, limit: int | None, lock: DeviceLock) -> None:
        super().__init__(recorder.device.id, limit)
        self._recorder, self._device_lock = recorder, lock
        self._ended: deque[_Loan] = deque()  # loans of which no tensor is alive
        self._lingering = 0  # bytes of freed buffers of which a tensor is alive

    def allocate(self, shape: Sequence[int], dtype: str) -> Buffer:
        if self._recorder.card is None and not self._recorder.closed:  # the host's memory: nothing of the device's
            return super().allocate(shape, dtype)
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
            return Buffer(whole[:nbytes].view(getattr(torch, dtype)).view(tuple(shape)), self, region.size, loan)

    def free(self, buffer: Buffer) -> None:
        loan = buffer.block
        if not isinstance(loan, _Loan):
            super().free(buffer)
            return
        with self._device_lock:
            if buffer.freed:
                super().free(buffer)  # refuses it
            loan.freed = True
            self._lingering += loan.region.size
            buffer.release()
            self._collect()

    def to_backend(self, tensor: Tensor) -> Buffer:
        if not tensor.is_cuda or self._recorder.lies(tensor):
            return Buffer(tensor.detach(), self, 0)
        return super().to_backend(tensor)

    def _collect(self) -> None:
        """Free regions whose last tensor is gone. Tensors end in any thread, where only a note is left."""
        ended = len(self._ended)  # a tensor that ends from now on may have work under way after the wait
        if self._recorder.closed:  # its memory is gone, except for what shares it
            self._ended.clear()
            self._lingering = 0
            return
        if self._recorder.stuck:  # neither wait again nor free what is in use
            return
        if ended:
            self._recorder.settle()
        for _ in range(ended):
            loan = self._ended.popleft()
            self._recorder.pool.free(loan.region)
            self._lingering -= loan.region.size if loan.freed else 0

    @property
    def pools(self) -> Sequence[DevicePool]:
        return self._recorder.pool, self._recorder.staging

    @property
    def kept(self) -> tuple[int, int]:
        return self._recorder.kept_bytes + self._lingering, self._recorder.ring.nbytes

    def stats(self) -> MemoryStats:
        with self._device_lock:
            self._collect()
            return super().stats()

    def trim(self) -> int:
        with self._device_lock:
            self._collect()
            if self._recorder.stuck:
                return 0
            return self._recorder.trim() + super().trim()
