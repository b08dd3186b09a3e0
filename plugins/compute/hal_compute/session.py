"""An open device that runs compute programs: the session protocol, but for what only the device knows."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, Literal, Protocol, Self

import attrs
from torch import Tensor

from hal_core.plugin_api import (
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
    UnsupportedError,
)

from .fields import KERNELS, Runner
from .pool import DevicePool
from .problem import Call


class Ring(Protocol):
    """Host memory that large tensors pass through on their way to the device. `nbytes`: of it, now."""

    @property
    def nbytes(self) -> int: ...


class Engine(Protocol):
    """What a session needs of an open device.

    Attributes:
        copies, copied: copies between host and device so far, and their bytes.
        device_seconds: what the last call's programs took by the device's clock, copies not counted; None without one.
    """

    device: Device
    copies: int
    copied: int

    @property
    def pool(self) -> DevicePool: ...
    @property
    def ring(self) -> Ring: ...
    @property
    def device_seconds(self) -> float | None: ...

    def trim(self) -> int:
        """Give idle device memory back to the driver; returns its bytes."""

    def synchronize(self) -> None:
        """Wait until everything that was queued is done."""

    def stop(self) -> None:
        """The last wait for what was queued, bounded, before memory is given back and the device closed.

        On a device that still runs something afterwards, neither waits again: what is in use there stays.
        """

    def close(self) -> None: ...


class ComputeMemory(PooledMemory):
    """Host buffers that travel by DLPack, with the device's own memory counted in."""

    def __init__(self, engine: Engine, limit: int | None) -> None:
        super().__init__("cpu", name=engine.device.id, limit=limit)
        self._engine = engine

    def stats(self) -> MemoryStats:
        host, engine, pool = super().stats(), self._engine, self._engine.pool
        return attrs.evolve(
            host,
            in_use=host.in_use + pool.in_use,
            pooled=host.pooled + pool.reserved - pool.in_use + engine.ring.nbytes,
            peak=host.peak + pool.peak,
            allocations=host.allocations + pool.allocations,
            reuses=host.reuses + pool.reuses,
            copies=host.copies + engine.copies,
            copied=host.copied + engine.copied,
        )

    @property
    def fragmentation(self) -> float:
        """Of the device's memory, 0 to 1; see `DevicePool.fragmentation`."""
        return self._engine.pool.fragmentation

    def trim(self) -> int:
        return super().trim() + self._engine.trim()


class ComputeSession(ABC):
    """An open device. Calls from several threads take turns; a device adds its programs."""

    def __init__(self, engine: Engine, limit: int | None = None) -> None:
        self._engine, self._device = engine, engine.device
        self._lock, self._closed = threading.RLock(), False
        self.memory = ComputeMemory(engine, limit)
        self.tiling = DenseTiling()

    @abstractmethod
    def _forward(self, call: Call, out: Tensor | None) -> AttentionOutput:
        """(out, log-sum-exp) of a call, the log-sum-exp always; with the lock held and the session open."""

    @abstractmethod
    def _backward(self, call: Call, out: Tensor, lse: Tensor, grad_out: Tensor, grad_lse: Tensor | None) -> Grads:
        """Gradients that the request names; with the lock held and the session open."""

    @abstractmethod
    def _runner(self) -> Runner:
        """What runs the kernels beside attention."""

    @abstractmethod
    def optimize_tiling(self, sequence_length: int, batch_size: int, num_heads: int) -> dict[str, int]: ...

    def autograd(self, request: AttentionRequest) -> Literal["native", "explicit", "none"]:
        return "explicit"

    def bind(self, request: AttentionRequest) -> Callable[..., Any]:
        """The fastest callable for requests like this one."""

        def call(
            query: Tensor,
            key: Tensor,
            value: Tensor,
            mask: Tensor | None = None,
            plan: BlockPlan | None = None,
            tables: SequenceTables | None = None,
            rng: tuple[int, int] | None = None,
        ) -> Any:
            with self._lock:
                self._check_open()
                result = self._forward(Call(query, key, value, request, plan, mask), None)
            return result if request.lse else result.out

        return call

    def prepare_attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        tile_size: int | None = None,
        *,
        request: AttentionRequest,
        plan: BlockPlan | None = None,
        tables: SequenceTables | None = None,
    ) -> Call:
        return Call(query, key, value, request, plan, None)

    def compute_attention(
        self,
        prepared: Call,
        mask: Tensor | None = None,
        *,
        query: Tensor | None = None,
        rng: tuple[int, int] | None = None,
        out: Tensor | None = None,
    ) -> AttentionOutput:
        call = prepared._replace(mask=mask, query=prepared.query if query is None else query)
        with self._lock:
            self._check_open()
            result = self._forward(call, out)
        return result if prepared.request.lse else AttentionOutput(result.out)

    def compute_attention_backward(
        self,
        prepared: Call,
        out: Tensor,
        lse: Tensor,
        grad_out: Tensor,
        mask: Tensor | None = None,
        *,
        grad_lse: Tensor | None = None,
        rng: tuple[int, int] | None = None,
    ) -> Grads:
        with self._lock:
            self._check_open()
            return self._backward(prepared._replace(mask=mask), out, lse, grad_out, grad_lse)

    def kernel(self, name: str) -> Callable[..., Any]:
        """A kernel beside attention, see `fields.KERNELS`."""
        if name not in KERNELS:
            raise UnsupportedError(f"{self._device.id} has no kernel {name!r}: it has {', '.join(sorted(KERNELS))}")
        function = KERNELS[name]

        def call(*arguments: Any, **options: Any) -> Any:
            with self._lock:
                self._check_open()
                return function(self._runner(), *arguments, **options)

        return call

    @property
    def device_seconds(self) -> float | None:
        """What the last call's programs took by the device's clock, copies not counted; None where it has none."""
        return None if self._closed else self._engine.device_seconds

    @property
    def closed(self) -> bool:
        return self._closed

    def synchronize(self) -> None:
        with self._lock:
            if not self._closed:
                self._engine.synchronize()

    def _check_open(self) -> None:
        if self._closed:
            raise DeviceUnavailableError(f"{self._device.id}'s session was closed: take a new one with hal.session()")

    def close(self) -> None:
        with self._lock:
            if not self._closed:
                self._closed = True
                try:
                    self._engine.stop()
                    self.memory.trim()
                finally:
                    self._engine.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
