"""An open OpenCL device: the session protocol over the engine."""

from __future__ import annotations

from typing import Any

from hal_compute.problem import Call
from hal_compute.processes import DeviceLock
from hal_compute.session import ComputeSession
from torch import Tensor

from hal_core.plugin_api import AttentionOutput, Device, Grads

from .kernels import attention
from .kernels.extra import ExtraKernelRunner
from .memory import OpenClMemory
from .runtime.engine import Engine
from .runtime.lease import Lease
from .tiling import tiling_of


class OpenClSession(ComputeSession):
    """An open device. Calls from several threads take turns."""

    def __init__(self, device: Device, handle: Any, limit: int | None = None) -> None:
        self.engine = Engine(device, handle)
        self._pools, self._cuts = OpenClMemory(self.engine, limit), tiling_of(handle)
        super().__init__(self.engine, self._pools, self._cuts, DeviceLock(device.id))

    def optimize_tiling(self, sequence_length: int, batch_size: int, num_heads: int) -> dict[str, int]:
        """Rows and keys of a tile at head_dim 64."""
        shape = self._cuts.shape_at(64, sequence_length, sequence_length)
        return {"tile_size": shape.tile, "block_q": shape.rows, "block_k": shape.tile}

    def _lease(self, what: str) -> Lease:
        return Lease(self.engine, self._pools, what)

    def _forward(self, call: Call, out: Tensor | None) -> AttentionOutput:
        return attention.forward(self._lease(f"compute attention ({call.request.describe()})"), self._cuts, call, out)

    def _backward(self, call: Call, out: Tensor, lse: Tensor, grad_out: Tensor, grad_lse: Tensor | None) -> Grads:
        lease = self._lease(f"compute gradients ({call.request.describe()})")
        return attention.backward(lease, call, out, lse, grad_out, grad_lse)

    def _runner(self) -> ExtraKernelRunner:
        return ExtraKernelRunner(self.engine, self._lease)
