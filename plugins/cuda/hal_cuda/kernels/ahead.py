"""Kernels compiled before they are needed, in any process and without a GPU; Triton's cache keeps them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from hal_core.plugin_api import (
    AttentionRequest,
    BlockPlan,
    Grads,
    MaskKind,
    PooledMemory,
    SequenceMetadata,
)

from .. import cost, paths
from ..cost import Rates
from ..discovery import Chip
from ..memory import StreamWorkspaces
from ..runtime import binaries
from ..runtime.context import Context
from ..tiling import CudaTiling
from .gradients import OwnBackward
from .hopper.launch import HopperPath
from .hopper.packed import PackedHopperPath
from .portable.backward_launch import _Form
from .portable.launch import PortablePath


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
    with binaries.compiling_ahead(chip.shared_memory) as count:
        for request in requests:
            _build(request, chip, rates)
        return count()


def _build(request: AttentionRequest, chip: Chip, rates: Rates) -> None:
    """Build the launches of a request, as its first call would."""
    memory = PooledMemory("cpu")
    given = replace(request, lse=request.lse or bool(request.grads))
    path = paths.choose(given, chip, rates, lambda name: name in cost.OWN).path
    context = Context(chip, memory, StreamWorkspaces(memory), CudaTiling(chip, lambda request: path))
    query, key, value, mask, plan, tables = _tensors(given)
    forward, portable = replace(given, grads=frozenset()), None
    launched: Any = None
    if paths.forward_path(path, given, chip) == "hopper":
        portable = PortablePath(forward, context)
        if given.packed:
            launched = PackedHopperPath(forward, context, portable)._build(query, key, value, given.batch, same=True)
        else:
            launched = HopperPath(forward, context, portable)._build(query, key, value)
    if launched is None:
        plain = PortablePath(forward, context)
        plain._build(query, key, value, mask, plan, tables, plain._may_join, None)
    if given.grads:
        backward = OwnBackward(path, given, context)
        if backward._hopper is not None:
            backward._hopper._build(query, key, value, query.new_empty((*query.shape[:3], value.shape[3])), False)
        else:
            backward._portable._build(_form(given, query, key, value, mask, plan))


def _form(
    request: AttentionRequest, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, plan: BlockPlan | None
) -> _Form:
    out = query.new_empty((*query.shape[:3], value.shape[3]))
    lse = query.new_empty(query.shape[:3], dtype=torch.float32)
    grads = Grads(query, key, value, mask if "mask" in request.grads else None)
    return _Form(query, key, value, out, lse, out, None, mask, plan, None, grads)


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
