"""An open device that runs compute programs: what the sessions of Vulkan and OpenCL share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, Literal, Protocol

from torch import Tensor

from hal_core.plugin_api import (
    AttentionOutput,
    AttentionRequest,
    BlockPlan,
    Device,
    DeviceUnavailableError,
    Grads,
    MemoryManager,
    SequenceMetadata,
    SessionBase,
    TilePlan,
    TilingStrategy,
    UnsupportedError,
)

from .extra_kernels import KERNELS, Runner
from .problem import Call
from .processes import DeviceLock


class Engine(Protocol):
    """What a session needs of an open device."""

    device: Device

    @property
    def device_seconds(self) -> float | None:
        """Device time of the last call's programs, without copies; None without a clock."""

    def synchronize(self) -> None:
        """Wait until everything that was submitted has ended."""

    def stop(self) -> None:
        """Wait a last time, for at most `waits.GRACE` seconds, before memory is given back and the device closed.

        A device that still runs something keeps the memory that this uses, and is not waited for again.
        """

    def close(self) -> None: ...


class ComputeSession(SessionBase, ABC):
    """An open device. Calls from several threads take turns. A subclass adds the device's programs.

    `lock` may be shared with `memory`. In a fork of the process that opened the session every call raises
    DeviceUnavailableError, and `close` gives nothing back: the driver's threads are not there.
    """

    def __init__(self, engine: Engine, memory: MemoryManager, tiling: TilingStrategy, lock: DeviceLock) -> None:
        super().__init__(memory, tiling)
        self._engine, self._device, self._lock = engine, engine.device, lock

    @abstractmethod
    def _forward(self, call: Call, out: Tensor | None) -> AttentionOutput:
        """(out, log-sum-exp) of a call; the lock is held and the session open."""

    @abstractmethod
    def _backward(self, call: Call, out: Tensor, lse: Tensor, grad_out: Tensor, grad_lse: Tensor | None) -> Grads:
        """The gradients that the request names; the lock is held and the session open."""

    @abstractmethod
    def _runner(self) -> Runner:
        """Runs the kernels beside attention."""

    def autograd(self, request: AttentionRequest) -> Literal["native", "explicit", "none"]:
        return "explicit"

    def bind(self, request: AttentionRequest) -> Callable[..., Any]:
        """The fastest callable for requests like this one."""

        def call(
            query: Tensor,
            key: Tensor,
            value: Tensor,
            mask: Tensor | None = None,
            plan: TilePlan | BlockPlan | None = None,
            tables: SequenceMetadata | None = None,
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
        plan: TilePlan | BlockPlan | None = None,
        tables: SequenceMetadata | None = None,
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
        """A kernel beside attention, see `extra_kernels.KERNELS`."""
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
        """Device time of the last call's programs, without copies; None without a clock."""
        return None if self.closed else self._engine.device_seconds

    def synchronize(self) -> None:
        with self._lock:
            if not self.closed:
                self._engine.synchronize()

    def _check_open(self) -> None:
        if self.closed:
            raise DeviceUnavailableError(f"{self._device.id}'s session was closed: take a new one with hal.session()")

    def close(self) -> None:
        if self._lock.forked:
            self.closed = True
            return
        with self._lock:
            if not self.closed:
                self.closed = True
                try:
                    self._engine.stop()
                    self.memory.trim()
                finally:
                    self._engine.close()
