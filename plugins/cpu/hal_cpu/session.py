"""The CPU's session: which path a request takes, and the calls that lead there."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from types import TracebackType
from typing import Any, Literal, NamedTuple, Self

import torch
from torch import Tensor

from hal_core.plugin_api import (
    AttentionOutput,
    AttentionRequest,
    BlockPlan,
    Device,
    Grads,
    PooledMemory,
    SequenceTables,
)

from .kernels import decode, fused, native, tiled, tiled_backward
from .kernels.heads import pack_heads, unpack_heads
from .kernels.keyvalue import KeyValue
from .kernels.problem import build_problem
from .kernels.scores import Band
from .kernels.sequences import sequences
from .paths import MOST_PACKED_ROWS, path_of
from .tiling import CpuTiling


class Prepared(NamedTuple):
    """Operands bound to a request; the CPU has nothing to program, so nothing is copied."""

    query: Tensor
    key: Tensor
    value: Tensor
    request: AttentionRequest
    tile_size: int | None
    plan: BlockPlan | None
    tables: SequenceTables | None


class CpuSession:
    """An open CPU. Holds no state but its scratch memory, so any number of threads may use it."""

    def __init__(self, device: Device, limit: int | None = None) -> None:
        self.memory = PooledMemory("cpu", name=device.id, limit=limit)
        self.tiling = CpuTiling()

    def autograd(self, request: AttentionRequest) -> Literal["native", "explicit", "none"]:
        """native where torch's own attention is called once; explicit elsewhere."""
        return "native" if _native(request) else "explicit"

    def optimize_tiling(self, sequence_length: int, batch_size: int, num_heads: int) -> dict[str, int]:
        """Tile size for head_dim 64 in float32, and how many heads are worked on at once."""
        tile = self.tiling.compute_optimal_tile_size(sequence_length, 1 << 40, {"head_dim": 64, "dtype_bytes": 4})
        return {"tile_size": tile, "heads_at_once": min(torch.get_num_threads(), batch_size * num_heads)}

    def bind(self, request: AttentionRequest) -> Callable[..., Any]:
        """The fastest callable (query, key, value, mask, plan, tables, rng) for requests like this one."""
        if _native(request):
            return native.bind(request)
        attend = self._sequences if request.packed or request.page_size is not None else self._dense

        def call(
            query: Tensor,
            key: Tensor,
            value: Tensor,
            mask: Tensor | None = None,
            plan: BlockPlan | None = None,
            tables: SequenceTables | None = None,
            rng: tuple[int, int] | None = None,
        ) -> Any:
            result = attend(Prepared(query, key, value, request, None, plan, tables), mask, rng)
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
        request = prepared.request
        attend = self._sequences if request.packed or request.page_size is not None else self._dense
        result = attend(prepared, mask, rng)
        return result if out is None else AttentionOutput(out.copy_(result.out), result.lse)

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
            return self._dense_backward(prepared, given, mask, rng)
        assert prepared.tables is not None
        query, key, value = prepared.query, prepared.key, prepared.value
        wanted = prepared.request.grads or frozenset("qkv")
        grads = Grads(*(torch.zeros_like(t) if n in wanted else None for n, t in zip("qkv", prepared[:3], strict=True)))
        for part in sequences(prepared.request, query, None, prepared.plan, prepared.tables):
            cut = tiled_backward.Given(*(None if t is None else t[:, :, part.rows] for t in given))  # type: ignore[arg-type]
            one = Prepared(
                query[:, :, part.rows],
                key[:, :, part.columns],
                value[:, :, part.columns],
                part.request,
                prepared.tile_size,
                part.plan,
                None,
            )
            found = self._dense_backward(one, cut, None, rng, part.number)
            for total, grad, place in zip(grads, found, (part.rows, part.columns, part.columns, None), strict=True):
                if total is not None:
                    total[:, :, place] = grad
        return grads

    def _dense(
        self, prepared: Prepared, mask: Tensor | None, rng: tuple[int, int] | None, first_batch: int = 0
    ) -> AttentionOutput:
        query, key, value, request, tile_size, plan, tables = prepared
        dim_v, len_q, len_k = value.shape[-1], query.shape[2], key.shape[2]
        path = path_of(request)
        if path in ("native", "packed"):
            return AttentionOutput(native.bind(request)(query, key, value, mask))
        if not len_k or not len_q or not query.shape[0]:
            return nothing(query, dim_v, request.lse)
        if path == "fused":
            upper = Band.of(request, len_q, len_k).upper
            group = query.shape[1] // key.shape[1]
            if group > 1 and (upper is None or upper >= len_k - 1) and group * len_q <= MOST_PACKED_ROWS:
                packed = fused.forward(pack_heads(query, key.shape[1]), key, value, request.effective_scale, None)
                result = AttentionOutput(*(unpack_heads(t, query.shape[1], len_q) for t in packed))
            else:
                result = fused.forward(query, key, value, request.effective_scale, upper)
            return result if request.lse else AttentionOutput(result.out)
        scales = (None, None) if tables is None else (tables.key_scale, tables.value_scale)
        source = KeyValue(key, value, sum_dtype(query), len_k, *scales)
        return self._problem(_exact(request, query, len_k), query, source, mask, plan, rng, first_batch, tile_size)

    def _problem(
        self,
        request: AttentionRequest,
        query: Tensor,
        source: KeyValue,
        mask: Tensor | None,
        plan: BlockPlan | None,
        rng: tuple[int, int] | None,
        first_batch: int = 0,
        tile_size: int | None = None,
    ) -> AttentionOutput:
        problem = build_problem(request, query, source, mask, plan, rng, first_batch)
        out = torch.empty((*query.shape[:3], source.value.shape[-1]), dtype=query.dtype)
        if path_of(request) == "decode":
            return decode.forward(problem, self.memory, out)
        return tiled.forward(problem, self.memory, out, tile_size)

    def _sequences(self, prepared: Prepared, mask: Tensor | None, rng: tuple[int, int] | None) -> AttentionOutput:
        query, key, value, request, tile_size, plan, tables = prepared
        assert tables is not None
        result = nothing(query, value.shape[-1], request.lse)
        for part in sequences(request, query, mask, plan, tables):
            rows = query[part.batch, :, part.rows]
            if part.pages is None:
                scales = SequenceTables(key_scale=part.key_scale, value_scale=part.value_scale)
                one = Prepared(
                    rows, key[:, :, part.columns], value[:, :, part.columns], part.request, tile_size, part.plan, scales
                )
                found = self._dense(one, part.mask, rng, part.number)
            elif part.request.len_k and part.request.len_q:
                source = KeyValue(
                    key, value, sum_dtype(query), part.request.len_k, part.key_scale, part.value_scale, part.pages
                )
                found = self._problem(part.request, rows, source, part.mask, part.plan, rng, part.number, tile_size)
            else:
                continue
            result.out[part.batch, :, part.rows] = found.out
            if result.lse is not None:
                result.lse[part.batch, :, part.rows] = found.lse
        return result

    def _dense_backward(
        self,
        prepared: Prepared,
        given: tiled_backward.Given,
        mask: Tensor | None,
        rng: tuple[int, int] | None,
        first_batch: int = 0,
    ) -> Grads:
        query, key, value, request, tile_size, plan, _ = prepared
        wanted, len_k = request.grads or frozenset("qkv"), key.shape[2]
        if not len_k or not query.shape[2] or not query.shape[0]:
            tensors = zip(("q", "k", "v", "mask"), (query, key, value, mask), strict=True)
            return Grads(*(torch.zeros_like(t) if n in wanted and t is not None else None for n, t in tensors))
        if path_of(replace(request, lse=True)) == "fused" and given.grad_lse is None:
            upper = Band.of(request, query.shape[2], len_k).upper
            found = fused.backward(
                query, key, value, given.out, given.lse, given.grad_out, request.effective_scale, upper
            )
            return Grads(*(g if n in wanted else None for n, g in zip(("q", "k", "v", "mask"), found, strict=True)))
        source = KeyValue(key, value, sum_dtype(query), len_k)
        exact = _exact(request, query, len_k)
        problem = build_problem(exact, query, source, mask, plan, rng, first_batch)
        found = tiled_backward.backward(problem, self.memory, given, tile_size)
        if found.mask is not None and mask is not None:
            found = found._replace(mask=found.mask.view(mask.shape).to(mask.dtype))
        return found

    def close(self) -> None:
        self.memory.trim()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _native(request: AttentionRequest) -> bool:
    """Whether torch's scaled_dot_product_attention is called, once."""
    return not request.packed and path_of(request) in ("native", "packed")


def _exact(request: AttentionRequest, query: Tensor, len_k: int) -> AttentionRequest:
    """The request with the tensors' lengths."""
    if (request.len_q, request.len_k) == (query.shape[2], len_k):
        return request
    return replace(request, len_q=query.shape[2], len_k=len_k)


def sum_dtype(tensor: Tensor) -> torch.dtype:
    """What products are summed in."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def nothing(query: Tensor, dim_v: int, lse: bool) -> AttentionOutput:
    """What rows without a key give: 0 and -inf."""
    out = query.new_zeros((*query.shape[:3], dim_v))
    return AttentionOutput(out, query.new_full(query.shape[:3], -math.inf, dtype=sum_dtype(query)) if lse else None)
