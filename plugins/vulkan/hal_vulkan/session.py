"""An open Vulkan device: the session protocol over the recorder."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hal_compute.problem import Call
from hal_compute.processes import DeviceLock
from hal_compute.session import ComputeSession
from torch import Tensor

from hal_core.plugin_api import (
    AttentionOutput,
    AttentionRequest,
    BlockPlan,
    Device,
    Grads,
    SequenceMetadata,
    TilePlan,
    moved_to,
)

from .kernels import attention
from .kernels.extra import ExtraKernelRunner
from .memory import VulkanMemory
from .runtime._vk import Adapter
from .runtime.recorder import Recorder, number
from .tiling import VulkanTiling


class VulkanSession(ComputeSession):
    """An open device. Calls from several threads take turns."""

    def __init__(self, device: Device, adapter: Adapter, limit: int | None = None) -> None:
        self.recorder, lock = Recorder(device, adapter, limit), DeviceLock(device.id)
        memory = self.recorder.memory = VulkanMemory(self.recorder, limit, lock)
        self._cuts = VulkanTiling(adapter, self.recorder.pool.limit)
        super().__init__(self.recorder, memory, self._cuts, lock)

    def optimize_tiling(self, sequence_length: int, batch_size: int, num_heads: int) -> dict[str, int]:
        """Rows and keys of a tile at head_dim 64."""
        cut = self._cuts.tiles(64)
        return {"tile_size": cut.keys, "block_q": cut.rows, "block_k": cut.keys}

    def bind(self, request: AttentionRequest) -> Callable[..., Any]:
        """The fastest callable for a request: a call of a known shape without mask and plan runs its recording."""
        record, lock, recorder, this = super().bind(request), self._lock, self.recorder, number(request)

        def call(
            query: Tensor,
            key: Tensor,
            value: Tensor,
            mask: Tensor | None = None,
            plan: TilePlan | BlockPlan | None = None,
            tables: SequenceMetadata | None = None,
            rng: tuple[int, int] | None = None,
        ) -> Any:
            if mask is None and plan is None:
                given = (query, key, value, None, None)
                with lock:
                    if (kept := recorder.find(recorder.key("forward", this, given))) is not None:
                        found = kept.run(given)
                        return AttentionOutput(*found) if request.lse else found[0]
            return record(query, key, value, mask, plan, tables, rng)

        return call

    def _forward(self, call: Call, out: Tensor | None) -> AttentionOutput:
        return attention.forward(self.recorder, self._cuts, self._with_host_tables(call), out)

    def _backward(self, call: Call, out: Tensor, lse: Tensor, grad_out: Tensor, grad_lse: Tensor | None) -> Grads:
        return attention.backward(self.recorder, self._with_host_tables(call), out, lse, grad_out, grad_lse)

    def _with_host_tables(self, call: Call) -> Call:
        """The call with its mask and block plan on the host, where key ranges are computed. Copies are counted."""
        tables = [t for t in (call.mask, *(call.plan or ())) if isinstance(t, Tensor) and t.device.type != "cpu"]
        if not tables:
            return call
        for table in tables:
            self.recorder.memory.count_copy(table.nbytes)
        return call._replace(mask=moved_to("cpu", call.mask), plan=moved_to("cpu", call.plan))

    def _runner(self) -> ExtraKernelRunner:
        return ExtraKernelRunner(self.recorder)
