"""What GPU tests hold results to: float64, and calls on one path alone."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

import hal_core as hal
from hal_core import AttentionRequest, Causal
from hal_core.registry import registry

BOUND = {torch.bfloat16: 4e-3, torch.float16: 6e-4, torch.float32: 2e-6}


def draw(
    seed: int, batch: int, heads: int, length: int, dim: int, dtype: torch.dtype, layout: str = "heads first"
) -> Tensor:
    generator = torch.Generator("cuda").manual_seed(seed)
    shape = (batch, length, heads, dim) if layout == "heads last" else (batch, heads, length, dim)
    drawn = torch.randn(shape, generator=generator, device="cuda").to(dtype)
    return drawn.transpose(1, 2) if layout == "heads last" else drawn


def exact(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, **options: Any
) -> tuple[Tensor, Tensor]:
    """Attention in float64, head by head."""
    causal = Causal(options.get("causal", "none"))
    request = AttentionRequest(
        batch=1,
        heads_q=1,
        heads_kv=1,
        len_q=query.shape[2],
        len_k=key.shape[2],
        dim_qk=query.shape[3],
        dim_v=value.shape[3],
        dtype="float64",
        causal=causal,
        diagonal=options.get("diagonal", 0),
        window=options.get("window"),
    )
    band = hal.dense_mask(request, query.shape[2], key.shape[2], device="cuda")
    group = query.shape[1] // key.shape[1]
    out = query.new_empty((*query.shape[:3], value.shape[3]), dtype=torch.float64)
    lse = query.new_empty(query.shape[:3], dtype=torch.float64)
    for b in range(query.shape[0]):
        for h in range(query.shape[1]):
            scores = query[b, h].double() @ key[b, h // group].double().T * options.get("scale", query.shape[3] ** -0.5)
            if cap := options.get("softcap"):
                scores = cap * torch.tanh(scores / cap)
            if band is not None:
                scores = scores.masked_fill(~band, -math.inf)
            if mask is not None:
                part = mask.expand(query.shape[0], query.shape[1], *scores.shape)[b, h]
                scores = scores.masked_fill(~part, -math.inf) if part.dtype == torch.bool else scores + part.double()
            lse[b, h] = torch.logsumexp(scores, -1)
            out[b, h] = torch.softmax(scores, -1).nan_to_num(0.0) @ value[b, h // group].double()
    return out, lse


def error(got: Tensor, want: Tensor) -> float:
    apart, size = float((got.double() - want).norm()), float(want.norm())
    return apart / size if size else apart


def agrees(got: Any, want: tuple[Tensor, Tensor], dtype: torch.dtype) -> None:
    out, lse = want
    dead = torch.isneginf(lse)
    assert not bool(torch.isnan(got.out).any())
    assert error(got.out, out) <= BOUND[dtype]
    assert torch.equal(torch.isneginf(got.lse), dead)
    assert error(got.lse[~dead], lse[~dead]) <= 2e-5
    assert bool((got.out[dead] == 0).all())


def on_path(device: str, path: str, request: AttentionRequest) -> Any:
    """The request bound to one path alone, whatever dispatch would choose."""
    from hal_cuda.backend import CudaBackend
    from hal_cuda.session import CudaSession

    backend = registry.backend_of(device)
    assert isinstance(backend, CudaBackend)
    found = registry.find(device)[0]
    session = CudaSession(found, backend.chip(found), lambda: backend.rates(found), paths=frozenset({path}))
    assert session.path_of(request) == path
    return session.bind(request)


def forced(
    path: str, device: str, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, **options: Any
) -> Any:
    """The call on one path alone; the output's memory is poisoned first."""
    request = hal.explain(query, key, value, mask, backend=device, enable_gqa=True, return_lse=True, **options).request
    call = on_path(device, path, request)
    poison = torch.full((query.numel() * 2 + 1024,), math.nan, device="cuda")  # freed memory that the next result gets
    del poison
    return call(query, key, value, mask, options.get("block_plan"), None, None)
