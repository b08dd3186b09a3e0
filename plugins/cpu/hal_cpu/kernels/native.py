"""Torch's scaled_dot_product_attention, which torch differentiates: the path for every call it does right and fast."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.nn.functional import scaled_dot_product_attention as sdpa

from hal_core.plugin_api import AttentionRequest, MaskKind

from ..paths import doubles, path_of, sees_less, widens
from .heads import pack_heads, pack_mask, unpack_heads

Bound = Callable[..., Any]


def bind(request: AttentionRequest) -> Bound:
    """The cheapest callable (query, key, value, mask, plan, tables, rng) -> out for requests like this one."""
    grouped, causal = request.heads_q != request.heads_kv, sees_less(request)
    if path_of(request) == "packed":
        return _packed(request)
    if widens(request):
        return _widened(request)
    if request.dim_qk != request.dim_v or not request.last_dim_contiguous or request.mask is not MaskKind.NONE:
        return _adapted(request)
    # Three closures because every keyword that is passed costs time; scale=None is torch's own default.
    if request.scale is None and not grouped:

        def plain(query: Tensor, key: Tensor, value: Tensor, *unused: object) -> Tensor:
            return sdpa(query, key, value, is_causal=causal)

        return plain
    scale = request.scale

    def general(query: Tensor, key: Tensor, value: Tensor, *unused: object) -> Tensor:
        return sdpa(query, key, value, is_causal=causal, scale=scale, enable_gqa=grouped)

    return general


def _adapted(request: AttentionRequest) -> Bound:
    """For masks, value size not key size, and strided last dimensions, for which torch would build all scores."""
    grouped, causal = request.heads_q != request.heads_kv, sees_less(request)
    scale, dim_v, more = request.effective_scale, request.dim_v, request.dim_qk - request.dim_v
    strided = not request.last_dim_contiguous

    def adapted(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, *unused: object) -> Tensor:
        if strided:
            query, key, value = query.contiguous(), key.contiguous(), value.contiguous()
        if more > 0:
            value = pad(value, (0, more))
        elif more < 0:
            query, key = pad(query, (0, -more)), pad(key, (0, -more))
        if mask is not None:
            mask = fitting_mask(mask, query)
        out = sdpa(query, key, value, mask, is_causal=causal, scale=scale, enable_gqa=grouped)
        return out[..., :dim_v] if more > 0 else out

    return adapted


def _widened(request: AttentionRequest) -> Bound:
    inner = _adapted(request)

    def widened(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, *unused: object) -> Tensor:
        out: Tensor = inner(query.float(), key.float(), value.float(), mask)
        return out.to(query.dtype)

    return widened


def _packed(request: AttentionRequest) -> Bound:
    """For few query rows: heads of a group as rows, one key head's product instead of several."""
    heads_q, heads_kv = request.heads_q, request.heads_kv
    group, twice = heads_q // heads_kv, doubles(request)
    inner = _adapted(replace(request, heads_q=heads_kv))

    def packed(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, *unused: object) -> Tensor:
        len_q = query.shape[2]
        rows = query.expand(-1, -1, 2, -1) if twice else pack_heads(query, heads_kv)
        if mask is not None:
            mask = pack_mask(fitting_mask(mask, query), heads_kv, group, len_q)
        out: Tensor = inner(rows, key, value, mask)
        return out[:, :, :1] if twice else unpack_heads(out, heads_q, len_q)

    return packed


def fitting_mask(mask: Tensor, query: Tensor) -> Tensor:
    """A mask in a shape and dtype for which torch's fused kernel is used and right.

    Three dimensions would send it to the path that builds all scores; a float32 mask on float64 operands is read as if
    it were float64.
    """
    if mask.dim() != 4:
        mask = mask[(None,) * (4 - mask.dim())]
    exact = mask.dtype in (torch.bool, query.dtype) or (mask.dtype == torch.float32 and query.dtype != torch.float64)
    return mask if exact else mask.to(query.dtype)
