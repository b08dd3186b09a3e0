"""Torch's scaled_dot_product_attention, which torch differentiates: the path for every call it does right and fast.

Under gradients operands are converted by torch's own operators, so that torch can keep them for the backward; otherwise
converted operands lie in the session's memory.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

# Not torch.nn.functional's name: hal.attention may have taken its place.
from torch._C._nn import scaled_dot_product_attention as sdpa
from torch.nn.functional import pad

from hal_core.plugin_api import AttentionRequest, MaskKind

from ..memory import ScratchMemory, Workspace
from ..paths import doubles, sees_less, torch_path, widens
from .heads import pack_heads, pack_mask, unpack_heads

Bound = Callable[..., Any]

#: The most that an additive mask lets any key of a row have, below which torch's backward is too coarse for the row: it
#: starts from a float32 log-sum-exp.
LOWEST_EXACT_MASK = -256.0


def bind(request: AttentionRequest, memory: ScratchMemory) -> Bound:
    """The cheapest callable (query, key, value, mask, plan, tables, rng) -> out for requests like this one."""
    grouped, causal = request.heads_q != request.heads_kv, sees_less(request)
    packed = torch_path(request) == "packed"
    simple = request.dim_qk == request.dim_v and request.last_dim_contiguous and request.mask is MaskKind.NONE
    if packed or widens(request) or not simple:
        return _adapted(request, memory)
    # Closures of their own because every keyword that is passed costs time; scale=None is torch's own default.
    if request.scale is None and not grouped:

        def plain(query: Tensor, key: Tensor, value: Tensor, *unused: object) -> Tensor:
            out = sdpa(query, key, value, is_causal=causal)
            if out.is_contiguous() or out.stride(-1) == 1:
                return out
            return sdpa(query.contiguous(), key, value, is_causal=causal)

        return plain
    scale = request.scale

    def general(query: Tensor, key: Tensor, value: Tensor, *unused: object) -> Tensor:
        out = sdpa(query, key, value, is_causal=causal, scale=scale, enable_gqa=grouped)
        if out.is_contiguous() or out.stride(-1) == 1:
            return out
        return sdpa(query.contiguous(), key, value, is_causal=causal, scale=scale, enable_gqa=grouped)

    return general


def readable(query: Tensor) -> bool:
    """Whether torch's kernel takes a query as it lies.

    The kernel lays its output out like the query and writes rows with stride 1. Where other dimensions have stride 1 as
    well (rows that overlap in memory), torch may give the output another order, and rows would overwrite each other.
    """
    strides = query.stride()
    return strides[-1] == 1 and all(
        stride != 1 or size == 1 for stride, size in zip(strides[:-1], query.shape, strict=False)
    )


def _adapted(request: AttentionRequest, memory: ScratchMemory) -> Bound:
    """For masks, packed heads, float16, a value size that is not the key size, and strided last dimensions, for which
    torch would build all scores.
    """
    differentiable = _differentiable(request)
    if request.grads:
        return differentiable
    packed, wide = torch_path(request) == "packed", widens(request)
    dim_v, heads_kv = request.dim_v, request.heads_kv
    dim = max(request.dim_qk, dim_v)
    grouped = request.heads_q != heads_kv and not packed
    twice = packed and doubles(request)
    causal, scale = sees_less(request), request.effective_scale

    def prepare(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, workspace: Workspace) -> Tensor:
        dtype = torch.float32 if wide else query.dtype
        operands = [query, key, value]
        if packed:
            if twice:
                operands[0] = query.expand(-1, -1, 2, -1)
            elif query.shape[2] == 1:
                operands[0] = pack_heads(query, heads_kv)
            else:
                operands[0] = pack_heads(workspace.copy(query, dtype), heads_kv)
        for place, tensor in enumerate(operands):
            size = tensor.shape[3]
            if size == dim and tensor.dtype == dtype and (tensor.stride(3) == 1 if place else readable(tensor)):
                continue
            room = workspace.take((*tensor.shape[:3], dim), dtype)
            room[..., :size].copy_(tensor)
            if size < dim:
                room[..., size:].zero_()
            operands[place] = room
        if mask is not None:
            mask = _fitting_mask(mask, dtype, workspace)
            if packed and not twice:
                mask = _packed_mask(mask, heads_kv, query.shape[1] // heads_kv, query.shape[2], workspace)
        out: Tensor = sdpa(
            operands[0], operands[1], operands[2], mask, is_causal=causal, scale=scale, enable_gqa=grouped
        )
        out = out if dim == dim_v else out[..., :dim_v]
        if twice:
            out = out[:, :, :1]
        elif packed:
            out = unpack_heads(out, query.shape[1], query.shape[2])
        return _narrowed(out, query.dtype, workspace) if wide else out

    def adapted(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, *unused: object) -> Tensor:
        if torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad):
            result: Tensor = differentiable(query, key, value, mask)
            return result
        with Workspace(memory) as workspace:
            return prepare(query, key, value, mask, workspace)

    return adapted


def _narrowed(out: Tensor, dtype: torch.dtype, workspace: Workspace) -> Tensor:
    """`out` in a 16-bit dtype, in the memory of `out`, which is cut to size.

    Torch's kernel cannot be told where to write, and a converted copy would be one more buffer beside the result.
    """
    narrow = workspace.copy(out, dtype)
    memory = out.untyped_storage()
    result: Tensor = torch.empty(0, dtype=dtype).set_(memory, 0, narrow.shape, narrow.stride())
    result.copy_(narrow)
    memory.resize_(narrow.nbytes)
    return result


def _fitting_mask(mask: Tensor, dtype: torch.dtype, workspace: Workspace | None = None) -> Tensor:
    """A mask in a shape and dtype for which torch's fused kernel is used and right.

    Three dimensions would send it to the path that builds all scores; a float32 mask on float64 operands is read as if
    it were float64.
    """
    if mask.dim() != 4:
        mask = mask[(None,) * (4 - mask.dim())]
    if mask.dtype in (torch.bool, dtype) or (mask.dtype == torch.float32 and dtype != torch.float64):
        return mask
    return mask.to(dtype) if workspace is None else workspace.copy(mask, dtype)


def _packed_mask(mask: Tensor, heads_kv: int, group: int, len_q: int, workspace: Workspace) -> Tensor:
    """A mask for packed rows; copied only where it differs between heads or rows."""
    batch, heads, rows, len_k = mask.shape
    if heads == 1 and rows == 1:
        return mask
    grouped = mask.unsqueeze(2) if heads == 1 else mask.unflatten(1, (heads_kv, group))
    room = workspace.take((batch, grouped.shape[1], group, len_q, len_k), mask.dtype)
    return room.copy_(grouped.expand(room.shape)).flatten(2, 3)


def _differentiable(request: AttentionRequest) -> Bound:
    """The same by operators that torch differentiates."""
    if torch_path(request) == "packed":
        return _differentiable_packed(request)
    grouped, causal = request.heads_q != request.heads_kv, sees_less(request)
    scale, dim_v, more = request.effective_scale, request.dim_v, request.dim_qk - request.dim_v
    wide, trained = widens(request), request.mask is MaskKind.ADDITIVE and bool(request.grads)

    def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, *unused: object) -> Tensor:
        dtype = query.dtype
        if wide:
            query, key, value = query.float(), key.float(), value.float()
        if not readable(query):
            query = query.contiguous()
        key, value = (t if t.stride(-1) == 1 else t.contiguous() for t in (key, value))
        if more > 0:
            value = pad(value, (0, more))
        elif more < 0:
            query, key = pad(query, (0, -more)), pad(key, (0, -more))
        if mask is not None:
            mask = _fitting_mask(mask, query.dtype)
        if trained and mask is not None and mask.numel() and bool((mask.amax(-1) < LOWEST_EXACT_MASK).any()):
            out: Tensor = torch.ops.aten._scaled_dot_product_attention_math(
                query, key, value, mask, 0.0, causal, scale=scale, enable_gqa=grouped
            )[0]
        else:
            out = sdpa(query, key, value, mask, is_causal=causal, scale=scale, enable_gqa=grouped)
        return (out[..., :dim_v] if more > 0 else out).to(dtype)

    return attend


def _differentiable_packed(request: AttentionRequest) -> Bound:
    """Heads of a group as rows, for tensors that require gradients although none were asked for."""
    heads_q, heads_kv = request.heads_q, request.heads_kv
    group, twice = heads_q // heads_kv, doubles(request)
    inner = _differentiable(replace(request, heads_q=heads_kv, grads=frozenset("q")))

    def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, *unused: object) -> Tensor:
        len_q = query.shape[2]
        rows = query.expand(-1, -1, 2, -1) if twice else pack_heads(query, heads_kv)
        if mask is not None:
            mask = pack_mask(_fitting_mask(mask, query.dtype), heads_kv, group, len_q)
        out: Tensor = inner(rows, key, value, mask)
        return out[:, :, :1] if twice else unpack_heads(out, heads_q, len_q)

    return attend
