"""An open Vulkan device: the session protocol over the recorder."""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import TracebackType
from typing import Any, Literal, Self

import attrs
from torch import Tensor

from hal_core import (
    AttentionOutput,
    AttentionRequest,
    BlockPlan,
    DenseTiling,
    Device,
    DeviceUnavailableError,
    Grads,
    MemoryStats,
    PooledMemory,
    SequenceTables,
)

from . import attention, fields
from ._vk import Adapter
from .attention import Call
from .recorder import TIMEOUT, Recorder


class VulkanMemory(PooledMemory):
    """Host buffers that travel by DLPack, with the device's own memory counted in."""

    def __init__(self, recorder: Recorder, limit: int | None) -> None:
        super().__init__("cpu", name=recorder.device.id, limit=limit)
        self._recorder = recorder

    def stats(self) -> MemoryStats:
        host, pool = super().stats(), self._recorder.pool
        return attrs.evolve(
            host, in_use=host.in_use + pool.in_use, pooled=host.pooled + pool.reserved - pool.in_use,
            peak=host.peak + pool.peak, allocations=host.allocations + pool.allocations, reuses=host.reuses + pool.reuses,
            copies=host.copies + self._recorder.copies, copied=host.copied + self._recorder.copied,
        )  # fmt: skip

    @property
    def fragmentation(self) -> float:
        """Of the device's memory, 0 to 1; see `DevicePool.fragmentation`."""
        return self._recorder.pool.fragmentation

    def trim(self) -> int:
        return super().trim() + self._recorder.trim()


class VulkanSession:
    """An open device. Calls from several threads take turns."""

    def __init__(self, device: Device, adapter: Adapter, limit: int | None = None) -> None:
        self._device, self._lock, self._closed = device, threading.RLock(), False
        self.recorder = Recorder(device, adapter, limit)
        self.memory = VulkanMemory(self.recorder, limit)
        self.tiling = DenseTiling()

    def autograd(self, request: AttentionRequest) -> Literal["native", "explicit", "none"]:
        return "explicit"

    def optimize_tiling(self, sequence_length: int, batch_size: int, num_heads: int) -> dict[str, int]:
        """Rows and keys of a tile at head_dim 64."""
        adapter = self.recorder.adapter
        shape = attention.shape_of(adapter.is_cpu, 64, adapter.limits["maxComputeSharedMemorySize"])
        return {"tile_size": shape.tile, "block_q": shape.rows, "block_k": shape.tile}

    def bind(self, request: AttentionRequest) -> Callable[..., Any]:
        """The fastest callable for requests like this one."""

        def call(
            query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, plan: BlockPlan | None = None,
            tables: SequenceTables | None = None, rng: tuple[int, int] | None = None,
        ) -> Any:  # fmt: skip
            result = self._forward(Call(query, key, value, request, plan, mask), None)
            return result if request.lse else result.out

        return call

    def prepare_attention(
        self, query: Tensor, key: Tensor, value: Tensor, tile_size: int | None = None, *,
        request: AttentionRequest, plan: BlockPlan | None = None, tables: SequenceTables | None = None,
    ) -> Call:  # fmt: skip
        return Call(query, key, value, request, plan, None)

    def compute_attention(
        self, prepared: Call, mask: Tensor | None = None, *,
        query: Tensor | None = None, rng: tuple[int, int] | None = None, out: Tensor | None = None,
    ) -> AttentionOutput:  # fmt: skip
        call = prepared._replace(mask=mask, query=prepared.query if query is None else query)
        result = self._forward(call, out)
        return result if prepared.request.lse else AttentionOutput(result.out)

    def _forward(self, call: Call, out: Tensor | None) -> AttentionOutput:
        with self._lock:
            return attention.forward(self._open(), call, out)

    def compute_attention_backward(
        self, prepared: Call, out: Tensor, lse: Tensor, grad_out: Tensor, mask: Tensor | None = None, *,
        grad_lse: Tensor | None = None, rng: tuple[int, int] | None = None,
    ) -> Grads:  # fmt: skip
        with self._lock:
            return attention.backward(self._open(), prepared._replace(mask=mask), out, lse, grad_out, grad_lse)

    def kernel(self, name: str) -> Callable[..., Any]:
        """A kernel beside attention, see `fields.KERNELS`."""
        function = fields.KERNELS[name]

        def call(*arguments: Any, **options: Any) -> Any:
            with self._lock:
                return function(self._open(), *arguments, **options)

        return call

    @property
    def device_seconds(self) -> float | None:
        """What the last call's shaders took by the device's clock, copies not counted; None where it has none."""
        return self.recorder.device_seconds

    def synchronize(self) -> None:
        with self._lock:
            if not self._closed:
                gpu = self.recorder.gpu
                gpu.wait(gpu.submitted, "finish what was queued", TIMEOUT)

    def _open(self) -> Recorder:
        if self._closed:
            raise DeviceUnavailableError(f"{self._device.id}'s session was closed: take a new one with hal.session()")
        return self.recorder

    def close(self) -> None:
        with self._lock:
            if not self._closed:
                self._closed = True
                self.memory.trim()
                self.recorder.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
