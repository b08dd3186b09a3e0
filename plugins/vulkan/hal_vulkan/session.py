"""An open Vulkan device: the session protocol over the recorder."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hal_compute.problem import Call
from hal_compute.session import ComputeSession
from torch import Tensor

from hal_core.plugin_api import AttentionOutput, AttentionRequest, BlockPlan, Device, Grads, SequenceTables, moved_to

from . import attention
from ._vk import Adapter
from .fields import FieldRunner
from .memory import VulkanMemory
from .recorder import Recorder, number


class VulkanSession(ComputeSession):
    """An open device. Calls from several threads take turns."""

    def __init__(self, device: Device, adapter: Adapter, limit: int | None = None) -> None:
        self.recorder = Recorder(device, adapter, limit)
        super().__init__(self.recorder, limit)
        self.memory = VulkanMemory(self.recorder, limit, self._lock)

    def optimize_tiling(self, sequence_length: int, batch_size: int, num_heads: int) -> dict[str, int]:
        """Rows and keys of a tile at head_dim 64."""
        adapter = self.recorder.adapter
        shape = attention.shape_of(adapter.is_cpu, 64, adapter.limits["maxComputeSharedMemorySize"])
        return {"tile_size": shape.tile, "block_q": shape.rows, "block_k": shape.tile}

    def bind(self, request: AttentionRequest) -> Callable[..., Any]:
        """The fastest callable for requests like this one: a plain call of a shape that is known runs its recording."""
        record, lock, recorder, this = super().bind(request), self._lock, self.recorder, number(request)

        def call(
            query: Tensor,
            key: Tensor,
            value: Tensor,
            mask: Tensor | None = None,
            plan: BlockPlan | None = None,
            tables: SequenceTables | None = None,
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
        return attention.forward(self.recorder, self._with_host_tables(call), out)

    def _backward(self, call: Call, out: Tensor, lse: Tensor, grad_out: Tensor, grad_lse: Tensor | None) -> Grads:
        return attention.backward(self.recorder, self._with_host_tables(call), out, lse, grad_out, grad_lse)

    def _with_host_tables(self, call: Call) -> Call:
        """The call with its mask and block plan on the host, where ranges are worked out: counted copies."""
        tables = [t for t in (call.mask, *(call.plan or ())) if isinstance(t, Tensor) and t.device.type != "cpu"]
        if not tables:
            return call
        self.recorder.copies += len(tables)
        self.recorder.copied += sum(t.nbytes for t in tables)
        return call._replace(mask=moved_to("cpu", call.mask), plan=moved_to("cpu", call.plan))

    def _runner(self) -> FieldRunner:
        return FieldRunner(self.recorder)
