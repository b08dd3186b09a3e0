"""An open OpenCL device: the session protocol over the engine."""

from __future__ import annotations

from typing import Any

from hal_compute.problem import Call
from hal_compute.session import ComputeSession
from torch import Tensor

from hal_core.plugin_api import AttentionOutput, Device, Grads

from . import attention
from .engine import Engine
from .fields import FieldRunner


class OpenClSession(ComputeSession):
    """An open device. Calls from several threads take turns."""

    def __init__(self, device: Device, handle: Any, limit: int | None = None) -> None:
        self.engine = Engine(device, handle, limit)
        super().__init__(self.engine, limit)

    def optimize_tiling(self, sequence_length: int, batch_size: int, num_heads: int) -> dict[str, int]:
        """Rows and keys of a tile at head_dim 64."""
        shape = attention.shape_of(self.engine, 64, sequence_length, sequence_length)
        return {"tile_size": shape.tile, "block_q": shape.rows, "block_k": shape.tile}

    def _forward(self, call: Call, out: Tensor | None) -> AttentionOutput:
        return attention.forward(self.engine, call, out)

    def _backward(self, call: Call, out: Tensor, lse: Tensor, grad_out: Tensor, grad_lse: Tensor | None) -> Grads:
        return attention.backward(self.engine, call, out, lse, grad_out, grad_lse)

    def _runner(self) -> FieldRunner:
        return FieldRunner(self.engine)
