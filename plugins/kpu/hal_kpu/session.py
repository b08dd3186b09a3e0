"""An open KPU: attention and matrix products with their values, and the cycles that the simulated machine needs for
them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any, Literal, NamedTuple

import attrs
import torch
from torch import Tensor

from hal_core.plugin_api import (
    AttentionOutput,
    AttentionRequest,
    BlockPlan,
    Device,
    Estimate,
    Grads,
    PooledMemory,
    SequenceMetadata,
    SessionBase,
    TilePlan,
    UnsupportedError,
)

from .cost import Cost, attention_cost, attention_memory, fidelity_of, product_cost
from .kernels.extra import KERNELS, ProductKernel
from .profiles.profile import Profile
from .simulator.attention.baseline import Comparison, compare, run
from .simulator.attention.block_plans import buffer_size, listed, macs_of, reads_of
from .simulator.attention.program import fused
from .simulator.attention.values import Operands, backward, described, forward
from .simulator.attention.workspace import workspace_size
from .simulator.trace import chrome_trace
from .simulator.values import array_values
from .tiling import Blocks, KPUTiling, cut_into


class Prepared(NamedTuple):
    """A call that is ready to run: its operands, [batch, heads, length, dim], and how the machine cuts it.

    Attributes:
        request: with the exact lengths. plan: equal blocks. block_k: keys in a tile of scores: those of the plan, or of
            equal pieces of them where L2 does not hold a whole block.
        blocks: which of them a sparse call reads; None for all.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    request: AttentionRequest
    plan: TilePlan
    block_k: int
    blocks: BlockPlan | None = None

    def operands(self, mask: Tensor | None, query: Tensor | None = None) -> Operands:
        """The tensors of the call with its mask, and other queries where some are given."""
        return Operands(self.query if query is None else query, self.key, self.value, mask, self.request)


class KPUSession(SessionBase):
    """An open device. Methods may be called from any thread: nothing is kept between calls but the timing model's
    cache.

    Attributes:
        device, profile: what is simulated. memory: host buffers that travel by DLPack. tiling: `KPUTiling`.
    """

    def __init__(self, device: Device, profile: Profile) -> None:
        super().__init__(PooledMemory("cpu", name=device.id), KPUTiling(profile))
        self.device, self.profile = device, profile

    def autograd(self, request: AttentionRequest) -> Literal["native", "explicit", "none"]:
        """The backward takes (out, lse) and computes the weights again."""
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
        plan: TilePlan | BlockPlan | None = None,
        tables: SequenceMetadata | None = None,
    ) -> Prepared:
        """Bind operands to a request and a plan. Host tensors are read where they lie.

        Args:
            tile_size: rows and keys of square blocks; None for the machine's own cut.
            plan: a tiling's plan of equal blocks, or a block plan, which takes precedence.

        Raises:
            UnsupportedError: a plan of uneven ranges.
        """
        blocks = plan if isinstance(plan, BlockPlan) else None
        if blocks is not None:
            plan = TilePlan.equal(request, blocks.block_q, blocks.block_k, cut_by=self.device.family)
        elif plan is None and tile_size is not None:
            plan = TilePlan.equal(request, tile_size, tile_size, cut_by=self.device.family)
        elif plan is None:
            plan = self.tiling.plan(request, {})
        if not isinstance(plan, TilePlan) or not plan.block_q:
            raise UnsupportedError(f"{self.device.id} was given {plan}: it runs equal blocks, all or listed ones")
        cut = cut_into(self.profile, request, plan.block_q, plan.block_k)
        return Prepared(query, key, value, request, plan, cut.block_k, blocks)

    def compute_attention(
        self,
        prepared: Prepared,
        mask: Tensor | None = None,
        *,
        query: Tensor | None = None,
        rng: tuple[int, int] | None = None,
        out: Tensor | None = None,
    ) -> AttentionOutput:
        """Attention tile by tile; see `simulator.attention.values.forward`. `rng` is not used: nothing is random."""
        call = prepared.operands(mask, query)
        size = workspace_size(described(call), prepared.block_k)
        with (
            torch.no_grad(),
            self._products(prepared.request),
            self._listed(prepared, call) as call,
            self.scratch((size,), "float32") as workspace,
        ):
            result = forward(call, prepared.block_k, workspace)
            del workspace, call  # the pool takes back only what nobody refers to
        lse = result.lse if prepared.request.lse else None
        return AttentionOutput(result.out if out is None else out.copy_(result.out), lse)

    def compute_attention_backward(
        self,
        prepared: Prepared,
        out: Tensor,
        lse: Tensor,
        grad_out: Tensor,
        mask: Tensor | None = None,
        *,
        grad_lse: Tensor | None = None,
        rng: tuple[int, int] | None = None,
    ) -> Grads:
        """Gradients from a given (out, lse); see `simulator.attention.values.backward`."""
        given = prepared.operands(mask)
        with torch.no_grad(), self._products(prepared.request), self._listed(prepared, given) as call:
            grads = backward(call, prepared.block_k, out, lse, grad_out, grad_lse)
            del call
            return grads

    def cost(self, prepared: Prepared) -> Estimate:
        """What the prepared call costs: its own program, at the clock and fidelity of the request's options. Of a block
        plan the tiles that it lists.
        """
        plan, blocks = prepared.plan, prepared.blocks
        request = replace(prepared.request, tiling=("", plan.block_q, plan.block_k))
        reads = None if blocks is None else reads_of(blocks, request)
        found = attention_cost(self.profile, request, reads).estimate(memory=attention_memory(self.profile, request))
        return found if reads is None else attrs.evolve(found, macs=macs_of(reads, request))

    def compare(self, request: AttentionRequest) -> Comparison:
        """Both cycle counts of a call: fused on the chip, and with scores that go through DRAM."""
        return compare(self.profile, request)

    def trace(self, request: AttentionRequest) -> dict[str, Any]:
        """The timeline of a call, fused on the chip, as Chrome trace JSON, which Perfetto opens.

        Raises:
            ContractError: it has more spans than a browser opens with ease.
        """
        timeline = run(fused(self.profile, request), self.profile, "transactional").timeline
        return chrome_trace([(f"attention, {request.describe()}", timeline)], self.profile)

    def product_cost(self, batch: int, rows: int, outputs: int, length: int, dtype: str) -> Cost:
        """What `batch` products [rows, length] @ [length, outputs] cost."""
        return product_cost(self.profile, batch, rows, outputs, length, dtype)

    def kernel(self, name: str) -> ProductKernel:
        """A callable of `hal_kpu.kernels.extra`."""
        if name not in KERNELS:
            raise UnsupportedError(f"{self.device.id} has no kernel {name!r}: it has {', '.join(sorted(KERNELS))}")
        return KERNELS[name](self.device, self.profile)

    @contextmanager
    def _listed(self, prepared: Prepared, call: Operands) -> Iterator[Operands]:
        """The call with the table of its block plan, in memory of the pool."""
        if prepared.blocks is None:
            yield call
            return
        len_k = call.key.shape[2]
        with self.scratch((2 * buffer_size(prepared.blocks, len_k),), "float32") as buffer:
            yield call._replace(listed=listed(prepared.blocks, len_k, buffer.view(torch.int64)))
            del buffer

    def _products(self, request: AttentionRequest) -> AbstractContextManager[Any]:
        """Where matrix products take their values: at fidelity "cycle_accurate" from the PEs, stepped one by one."""
        if fidelity_of(request) != "cycle_accurate":
            return nullcontext()
        return array_values(self.profile, "os", dtype=request.dtype)
