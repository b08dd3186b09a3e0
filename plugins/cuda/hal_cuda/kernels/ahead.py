"""Kernels compiled before they are needed, in any process and without a GPU; Triton's cache keeps them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from hal_core.plugin_api import AttentionRequest, Device, Fidelity, MaskKind, PooledMemory, SequenceMetadata

from .. import cost
from ..cost import Rates
from ..discovery import Chip
from ..runtime import binaries
from ..session import CudaSession


def tasks(requests: Iterable[AttentionRequest], chip: Chip, rates: Rates) -> list[tuple[str, Callable[[], int]]]:
    """Work for as many processes as there are, as (name, function): requests that differ in lengths or batch alone,
    which share kernels, are one piece. A function returns how many kernels it compiled or found compiled.
    """
    pieces: dict[AttentionRequest, list[AttentionRequest]] = {}
    for request in requests:
        one = 1 if request.len_q == 1 else 0
        pieces.setdefault(replace(request, batch=1, len_q=one, len_k=0), []).append(request)
    return [(_name(alike), partial(compile_all, tuple(alike), chip, rates)) for alike in pieces.values()]


def _name(alike: list[AttentionRequest]) -> str:
    """What a piece's requests have in common, for people."""
    lengths = sorted({request.len_k for request in alike})
    return alike[0].describe().partition(", ")[2] + (f" and {len(lengths) - 1} more lengths" if lengths[1:] else "")


def compile_all(requests: tuple[AttentionRequest, ...], chip: Chip, rates: Rates) -> int:
    """Compile the own kernels of every request; how many there are."""
    device = Device(id="ahead:0", family="cuda", vendor="NVIDIA", model="", fidelity=Fidelity.HARDWARE, reads=("cpu",))
    memory = PooledMemory("meta")
    with (
        binaries.compiling_ahead(chip.shared_memory) as count,
        CudaSession(device, chip, lambda: rates, memory=memory, paths=cost.OWN) as session,
        torch.no_grad(),
    ):
        for request in requests:
            _call(session, replace(request, lse=request.lse or bool(request.grads)))
        return count()


def _call(session: CudaSession, request: AttentionRequest) -> None:
    """Call what a request describes on tensors without memory, forward and backward: launches are built, and do
    nothing.
    """
    query, key, value, mask, plan, tables = _tensors(request)
    prepared = session.prepare_attention(query, key, value, request=request, plan=plan, tables=tables)
    rng = (0, 0) if request.dropout else None
    out, lse = session.compute_attention(prepared, mask, rng=rng)
    if request.grads:
        session.compute_attention_backward(prepared, out, lse, torch.empty_like(out), mask, rng=rng)


def _tensors(request: AttentionRequest) -> tuple[Any, ...]:
    """Tensors of a request without memory."""
    r, kind = request, getattr(torch, request.dtype)

    def empty(*shape: int, dtype: torch.dtype = kind) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    mask = plan = tables = None
    if r.mask is not MaskKind.NONE:
        of_mask = torch.bool if r.mask is MaskKind.BOOLEAN else kind
        mask = empty(r.mask_batch, r.mask_heads, r.len_q, r.len_k, dtype=of_mask)
    if r.packed:
        tokens_q, tokens_k = r.batch * r.len_q, r.batch * r.len_k
        query, key = empty(1, r.heads_q, tokens_q, r.dim_qk), empty(1, r.heads_kv, tokens_k, r.dim_qk)
        ends = empty(r.batch + 1, dtype=torch.int32)
        return query, key, empty(1, r.heads_kv, tokens_k, r.dim_v), mask, plan, SequenceMetadata(ends, ends)
    query = empty(r.batch, r.heads_q, r.len_q, r.dim_qk)
    keys = (r.batch, r.heads_kv, r.len_k)
    if r.page_size is not None:
        pages = -(-r.len_k // r.page_size)
        keys = (r.batch * pages, r.heads_kv, r.page_size)
        table, held = empty(r.batch, pages, dtype=torch.int32), empty(r.batch, dtype=torch.int32)
        tables = SequenceMetadata(page_table=table, cache_seqlens=held)
    return query, empty(*keys, r.dim_qk), empty(*keys, r.dim_v), mask, plan, tables


__all__ = ["compile_all", "tasks"]
