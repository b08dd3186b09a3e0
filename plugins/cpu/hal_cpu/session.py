"""The CPU's session: the calls that lead to the kernel of a request."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hal_core.plugin_api import (
    AttentionOutput,
    AttentionRequest,
    Autograd,
    BlockPlan,
    Device,
    Grads,
    SequenceMetadata,
    SessionBase,
    TilePlan,
    UnsupportedError,
)

from .kernels import blocks, blocks_backward, compiled, decode, fused, native, tiled, tiled_backward
from .kernels.extra import ExtraKernelRunner
from .kernels.heads import pack_heads, unpack_heads
from .kernels.keyvalue import KeyValue
from .kernels.problem import Problem, visible_blocks
from .kernels.scores import Band
from .kernels.sequences import Sequence, longest_first, sequences
from .memory import CpuMemory, ScratchMemory, SharedMemory, Workspace
from .paths import MOST_PACKED_ROWS, path_of, torch_path
from .tiling import CpuTiling


class Prepared(NamedTuple):
    """Operands bound to a request; the CPU has nothing to program, so nothing is copied.

    `plan` is a block plan, or the tile plan of a tiling that the caller brought; None: the session's own tiling cuts.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    request: AttentionRequest
    tile_size: int | None
    plan: TilePlan | BlockPlan | None
    tables: SequenceMetadata | None


class CpuSession(SessionBase):
    """An open CPU. Holds no state but its scratch memory, so any number of threads may use it."""

    def __init__(self, device: Device, limit: int | None = None) -> None:
        super().__init__(CpuMemory(device.id, limit), CpuTiling())
        self._name = device.id

    def autograd(self, request: AttentionRequest) -> Autograd:
        """native where torch's own attention is called once; explicit elsewhere."""
        return "native" if _native(request) else "explicit"

    def optimize_tiling(self, sequence_length: int, batch_size: int, num_heads: int) -> dict[str, int]:
        """Tile size for head_dim 64 in float32, and how many heads are worked on at once."""
        tile = self.tiling.compute_optimal_tile_size(sequence_length, 1 << 40, {"head_dim": 64, "dtype_bytes": 4})
        return {"tile_size": tile, "heads_at_once": min(torch.get_num_threads(), batch_size * num_heads)}

    def bind(self, request: AttentionRequest) -> Callable[..., Any]:
        """The fastest callable (query, key, value, mask, plan, tables, rng) for requests like this one."""
        if _native(request):
            return native.bind(request, self.memory)

        def call(
            query: Tensor,
            key: Tensor,
            value: Tensor,
            mask: Tensor | None = None,
            plan: TilePlan | BlockPlan | None = None,
            tables: SequenceMetadata | None = None,
            rng: tuple[int, int] | None = None,
        ) -> Any:
            result = self._attend(Prepared(query, key, value, request, None, plan, tables), mask, rng, None)
            return result if request.lse else result.out

        if path_of(request) not in ("compiled", "streamed"):
            return call
        memory = self.memory

        def call_compiled(
            query: Tensor,
            key: Tensor,
            value: Tensor,
            mask: Tensor | None = None,
            plan: TilePlan | BlockPlan | None = None,
            *rest: Any,
        ) -> Any:
            if not (query.numel() and key.numel()) or trained(query, key, value):
                return call(query, key, value, mask, plan, *rest)
            result = compiled.forward(request, query, key, value, mask, memory, plan=_block_plan(plan))
            return result if request.lse else result.out

        return call_compiled

    def kernel(self, name: str) -> Callable[..., Any]:
        """A kernel beside attention, see `hal_compute.extra_kernels.KERNELS`."""
        from hal_compute.extra_kernels import KERNELS

        if name not in KERNELS:
            raise UnsupportedError(f"{self._name} has no kernel {name!r}: it has {', '.join(sorted(KERNELS))}")
        return partial(KERNELS[name], ExtraKernelRunner(self.memory))

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
        return Prepared(query, key, value, request, tile_size, plan, tables)

    def compute_attention(
        self,
        prepared: Prepared,
        mask: Tensor | None = None,
        *,
        query: Tensor | None = None,
        rng: tuple[int, int] | None = None,
        out: Tensor | None = None,
    ) -> AttentionOutput:
        if query is not None:
            prepared = prepared._replace(query=query)
        return self._attend(prepared, mask, rng, out)

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
        given = tiled_backward.Given(out, lse, grad_out, grad_lse)
        if not prepared.request.packed:
            return self._dense_backward(prepared, given, mask, rng, self.memory)
        assert prepared.tables is not None
        wanted = prepared.request.grads or frozenset("qkv")
        grads = Grads(*(torch.zeros_like(t) if n in wanted else None for n, t in zip("qkv", prepared[:3], strict=True)))
        parts = sequences(prepared.request, prepared.query, None, _block_plan(prepared.plan), prepared.tables)
        with SharedMemory(self.memory) as memory:
            self._backward_of(longest_first(parts), prepared, given, rng, grads, memory)
        return grads

    def _backward_of(
        self,
        parts: Iterable[Sequence],
        prepared: Prepared,
        given: tiled_backward.Given,
        rng: tuple[int, int] | None,
        grads: Grads,
        memory: ScratchMemory,
    ) -> None:
        """Write the gradients of some sequences to their places in `grads`."""
        query, key, value = prepared.query, prepared.key, prepared.value
        for part in parts:
            cut = tiled_backward.Given(
                given.out[:, :, part.rows],
                given.lse[:, :, part.rows],
                given.grad_out[:, :, part.rows],
                None if given.grad_lse is None else given.grad_lse[:, :, part.rows],
            )
            one = Prepared(
                query[:, :, part.rows],
                key[:, :, part.columns],
                value[:, :, part.columns],
                part.request,
                prepared.tile_size,
                part.plan,
                None,
            )
            found = self._dense_backward(one, cut, None, rng, memory, part.number)
            for total, grad, place in zip(grads, found, (part.rows, part.columns, part.columns, None), strict=True):
                if total is not None:
                    total[:, :, place] = grad
            del found  # its memory serves the next sequence

    def _attend(
        self, prepared: Prepared, mask: Tensor | None, rng: tuple[int, int] | None, out: Tensor | None
    ) -> AttentionOutput:
        request = prepared.request
        if request.packed or request.page_size is not None or request.used:
            return self._sequences(prepared, mask, rng, out)
        result = self._dense(prepared, mask, rng, self.memory, out=out)
        return result if out is None or result.out is out else AttentionOutput(out.copy_(result.out), result.lse)

    def _dense(
        self,
        prepared: Prepared,
        mask: Tensor | None,
        rng: tuple[int, int] | None,
        memory: ScratchMemory,
        first_batch: int = 0,
        out: Tensor | None = None,
        lse: Tensor | None = None,
    ) -> AttentionOutput:
        """Attention of a dense batch. Kernels that can, write to `out` and `lse`."""
        query, key, value, request, _, _, tables = prepared
        dim_v, len_q, len_k = request.dim_v, query.shape[2], key.shape[2]
        path = path_of(request)
        if path in ("native", "packed"):
            return AttentionOutput(native.bind(request, memory)(query, key, value, mask))
        if not len_k or not len_q or not query.shape[0]:
            return nothing(query, dim_v, request.lse)
        if path in ("compiled", "streamed"):
            if not trained(query, key, value):
                plan = _block_plan(prepared.plan)
                return compiled.forward(request, query, key, value, mask, memory, out, lse, plan)
            path = torch_path(request)
            if path in ("native", "packed"):
                return AttentionOutput(native.bind(request, memory)(query, key, value, mask))
        if path == "fused":
            upper = Band(*request.band(len_q, len_k)).upper
            group, heads, scale = query.shape[1] // key.shape[1], query.shape[1], request.effective_scale
            if group > 1 and (upper is None or upper >= len_k - 1) and group * len_q <= MOST_PACKED_ROWS:
                packed = fused.forward(pack_heads(query, key.shape[1]), key, value, scale, None, memory)
                result = AttentionOutput(*(unpack_heads(t, heads, len_q) for t in packed))
            else:
                result = fused.forward(query, key, value, scale, upper, memory)
            return result if request.lse else AttentionOutput(result.out)
        scales = (None, None) if tables is None else (tables.key_scale, tables.value_scale)
        source = KeyValue(key, value, sum_dtype(query), len_k, *scales)
        return self._problem(prepared, source, mask, rng, memory, first_batch, out, lse)

    def _problem(
        self,
        prepared: Prepared,
        source: KeyValue,
        mask: Tensor | None,
        rng: tuple[int, int] | None,
        memory: ScratchMemory,
        first_batch: int = 0,
        out: Tensor | None = None,
        lse: Tensor | None = None,
    ) -> AttentionOutput:
        """Attention by this project's own kernels, which follow the plan."""
        query, request = prepared.query, _exact(prepared.request, prepared.query, source.length, mask)
        plan = self._plan(request, prepared)
        if out is None:
            out = torch.empty((*query.shape[:3], source.dim_v), dtype=query.dtype)
        if lse is None and request.lse:
            lse = torch.empty(query.shape[:3], dtype=source.dtype)
        given = _block_plan(prepared.plan)
        if given is not None and torch_path(_listing(request, given)) == "blocks":
            problem = Problem.of(_listing(request, given), plan, query, source, mask)
            blocks.forward(problem, given, memory, out, lse)
            return AttentionOutput(out, lse)
        with Workspace(memory) as workspace:
            visible = None if given is None else visible_blocks(given, source.length, workspace)
            problem = Problem.of(request, plan, query, source, mask, visible, rng, first_batch)
            # Uneven ranges are the tiled kernel's: the decode kernel takes all rows, and keys from first to last.
            kernel = decode if torch_path(request) == "decode" and plan.ranges is None else tiled
            kernel.forward(problem, memory, out, lse)
            del visible, problem
        return AttentionOutput(out, lse)

    def _plan(self, request: AttentionRequest, prepared: Prepared) -> TilePlan:
        """The plan that the caller brought, or the cut of the session's own tiling."""
        if isinstance(prepared.plan, TilePlan):
            return prepared.plan
        tiling = self.tiling if prepared.tile_size is None else CpuTiling(prepared.tile_size, prepared.tile_size)
        plan = tiling.plan(request, {})
        assert isinstance(plan, TilePlan)
        return plan

    def _sequences(
        self, prepared: Prepared, mask: Tensor | None, rng: tuple[int, int] | None, out: Tensor | None
    ) -> AttentionOutput:
        query, request, tables = prepared.query, prepared.request, prepared.tables
        assert tables is not None
        result = nothing(query, request.dim_v, request.lse, out)
        parts = sequences(request, query, mask, _block_plan(prepared.plan), tables)
        with SharedMemory(self.memory) as memory:
            self._attend_each(longest_first(parts), prepared, rng, result, memory)
        return result

    def _attend_each(
        self,
        parts: Iterable[Sequence],
        prepared: Prepared,
        rng: tuple[int, int] | None,
        result: AttentionOutput,
        memory: ScratchMemory,
    ) -> None:
        """Write the attention of some sequences to their places in `result`."""
        query, key, value, _, tile_size, _, _ = prepared
        for part in parts:
            if not part.request.len_k or not part.request.len_q:
                continue
            rows = query[part.batch, :, part.rows]
            scales = SequenceMetadata(key_scale=part.key_scale, value_scale=part.value_scale)
            room = result.out[part.batch, :, part.rows]
            lse = None if result.lse is None else result.lse[part.batch, :, part.rows]
            if part.pages is None:
                keys, values = key[part.keys, :, part.columns], value[part.keys, :, part.columns]
                one = Prepared(rows, keys, values, part.request, tile_size, part.plan, scales)
                found = self._dense(one, part.mask, rng, memory, part.number, room, lse)
            else:
                one = Prepared(rows, key, value, part.request, tile_size, part.plan, scales)
                length = part.request.len_k
                source = KeyValue(key, value, sum_dtype(query), length, part.key_scale, part.value_scale, part.pages)
                found = self._problem(one, source, part.mask, rng, memory, part.number, room, lse)
            if found.out is not room:
                room.copy_(found.out)
            if lse is not None and found.lse is not lse:
                lse.copy_(found.lse)
            del found  # its memory serves the next sequence

    def _dense_backward(
        self,
        prepared: Prepared,
        given: tiled_backward.Given,
        mask: Tensor | None,
        rng: tuple[int, int] | None,
        memory: ScratchMemory,
        first_batch: int = 0,
    ) -> Grads:
        query, key, value, request = prepared.query, prepared.key, prepared.value, prepared.request
        wanted, len_k = request.grads or frozenset("qkv"), key.shape[2]
        if not len_k or not query.shape[2] or not query.shape[0]:
            tensors = zip(("q", "k", "v", "mask"), (query, key, value, mask), strict=True)
            return Grads(*(torch.zeros_like(t) if n in wanted and t is not None else None for n, t in tensors))
        if path_of(request) == "compiled" and request.grads:
            found = compiled.backward(request, query, key, value, mask, given, memory)
            return Grads(*(g if n in wanted else None for n, g in zip(("q", "k", "v", "mask"), found, strict=True)))
        if torch_path(replace(request, lse=True)) == "fused" and given.grad_lse is None:
            upper, scale = Band(*request.band(query.shape[2], len_k)).upper, request.effective_scale
            grads = fused.backward(query, key, value, given.out, given.lse, given.grad_out, scale, upper, memory)
            return Grads(*(g if n in wanted else None for n, g in zip(("q", "k", "v", "mask"), grads, strict=True)))
        source, exact = KeyValue(key, value, sum_dtype(query), len_k), _exact(request, query, len_k, mask)
        plan, listed = self._plan(exact, prepared), _block_plan(prepared.plan)
        if listed is not None and torch_path(_listing(exact, listed)) == "blocks":
            problem = Problem.of(_listing(exact, listed), plan, query, source, mask)
            return blocks_backward.backward(problem, listed, memory, given)
        with Workspace(memory) as workspace:
            visible = None if listed is None else visible_blocks(listed, len_k, workspace)
            problem = Problem.of(exact, plan, query, source, mask, visible, rng, first_batch)
            found = tiled_backward.backward(problem, memory, given, () if mask is None else mask.shape)
            del visible, problem
        return found


def _native(request: AttentionRequest) -> bool:
    """Whether torch's scaled_dot_product_attention is called, once."""
    return not request.packed and path_of(request) in ("native", "packed")


def trained(*tensors: Tensor) -> bool:
    """Whether torch records what is done with these tensors."""
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def _block_plan(plan: TilePlan | BlockPlan | None) -> BlockPlan | None:
    return plan if isinstance(plan, BlockPlan) else None


def _listing(request: AttentionRequest, plan: BlockPlan) -> AttentionRequest:
    """The request with the plan's own number of entries: a strategy that reads content declares a bound."""
    stated = (plan.block_q, plan.block_k, plan.indices.shape[-1])
    return request if request.block_plan == stated else replace(request, block_plan=stated)


def _exact(request: AttentionRequest, query: Tensor, len_k: int, mask: Tensor | None) -> AttentionRequest:
    """The request with the tensors' lengths, and the mask's batch entries and heads."""
    batch, heads = (1, 1) if mask is None else (1, 1, *mask.shape)[-4:-2]
    stated = (request.len_q, request.len_k, request.mask_batch, request.mask_heads)
    if stated == (query.shape[2], len_k, batch, heads):
        return request
    return replace(request, len_q=query.shape[2], len_k=len_k, mask_batch=batch, mask_heads=heads)


def sum_dtype(tensor: Tensor) -> torch.dtype:
    """What products are summed in."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def nothing(query: Tensor, dim_v: int, lse: bool, out: Tensor | None = None) -> AttentionOutput:
    """What rows without a key give: 0 and -inf. `out`, where it is given, is filled."""
    out = query.new_zeros((*query.shape[:3], dim_v)) if out is None else out.zero_()
    return AttentionOutput(out, query.new_full(query.shape[:3], -math.inf, dtype=sum_dtype(query)) if lse else None)
