"""An open KPU: attention and matrix products with their values, and the cycles that the simulated machine needs for
them.
"""

from __future__ import annotations

from types import TracebackType
from typing import Literal, Self

import torch
from torch import Tensor

from hal_core.plugin_api import (
    AttentionOutput,
    AttentionRequest,
    BlockPlan,
    DenseTiling,
    Device,
    Grads,
    PooledMemory,
    SequenceTables,
    UnsupportedError,
)

from .cost import Cost, product_cost
from .kernels.extra import KERNELS, Kernel
from .profiles.profile import Profile
from .simulator.attention.baseline import Comparison, compare
from .simulator.attention.values import Operands, backward, forward
from .tiling import Blocks


class KPUSession:
    """An open device. Methods may be called from any thread: nothing is kept between calls but the timing model's
    cache.

    Attributes:
        device, profile: what is simulated. memory: host buffers that travel by DLPack. tiling: square tiles.
    """

    def __init__(self, device: Device, profile: Profile) -> None:
        self.device, self.profile = device, profile
        self.memory, self.tiling = PooledMemory("cpu", name=device.id), DenseTiling()

    def autograd(self, request: AttentionRequest) -> Literal["native", "explicit", "none"]:
        """The backward takes (out, lse) and makes the weights again."""
        return "explicit"

    def optimize_tiling(self, sequence_length: int, batch_size: int, num_heads: int) -> dict[str, int]:
        """Queries and keys of a tile of scores in float32."""
        blocks = Blocks.of(self.profile, "float32")
        return {"block_q": blocks.rows, "block_k": blocks.keys}

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
    ) -> Operands:
        """Bind operands to a request. The machine chooses its own tiles; `tile_size` changes nothing."""
        return Operands(query, key, value, None, request)

    def compute_attention(
        self,
        prepared: Operands,
        mask: Tensor | None = None,
        *,
        query: Tensor | None = None,
        rng: tuple[int, int] | None = None,
        out: Tensor | None = None,
    ) -> AttentionOutput:
        """Attention tile by tile; see `attention.forward`. `rng` changes nothing: the machine draws no numbers."""
        call = prepared._replace(mask=mask, query=prepared.query if query is None else query)
        with torch.no_grad():
            result = forward(call, self._block_k(prepared))
        lse = result.lse if prepared.request.lse else None
        return AttentionOutput(result.out if out is None else out.copy_(result.out), lse)

    def compute_attention_backward(
        self,
        prepared: Operands,
        out: Tensor,
        lse: Tensor,
        grad_out: Tensor,
        mask: Tensor | None = None,
        *,
        grad_lse: Tensor | None = None,
        rng: tuple[int, int] | None = None,
    ) -> Grads:
        """Gradients from a given (out, lse); see `attention.backward`."""
        with torch.no_grad():
            return backward(prepared._replace(mask=mask), self._block_k(prepared), out, lse, grad_out, grad_lse)

    def compare(self, request: AttentionRequest) -> Comparison:
        """Both cycle counts of a call: fused on the chip, and with scores that go through DRAM."""
        return compare(self.profile, request)

    def product_cost(self, batch: int, rows: int, outputs: int, length: int, dtype: str) -> Cost:
        """What `batch` products [rows, length] @ [length, outputs] cost."""
        return product_cost(self.profile, batch, rows, outputs, length, dtype)

    def _block_k(self, call: Operands) -> int:
        return Blocks.of(self.profile, str(call.query.dtype).removeprefix("torch.")).keys

    def kernel(self, name: str) -> Kernel:
        """A callable of `hal_kpu.kernels`."""
        if name not in KERNELS:
            raise UnsupportedError(f"{self.device.id} has no kernel {name!r}: it has {', '.join(sorted(KERNELS))}")
        return KERNELS[name](self.device, self.profile)

    def close(self) -> None:
        self.memory.trim()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
