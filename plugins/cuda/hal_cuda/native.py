"""Torch's own attention backends as candidates beside the kernels of this package."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from hal_core.plugin_api import AttentionRequest, Causal, MaskKind

from .chip import Chip

BACKENDS = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}


def takes(request: AttentionRequest) -> bool:
    """Whether torch's fused backends are right for a request: every row reads a key, no feature of this package's own.

    is_causal is taken for equal lengths alone; `call` sees the lengths.
    """
    return (
        request.dtype in ("float16", "bfloat16")
        and request.mask is MaskKind.NONE
        and request.causal in (Causal.NONE, Causal.TOP_LEFT)
        and not request.diagonal
        and request.window is None
        and request.softcap is None
        and not request.dropout
        and not request.packed
        and request.page_size is None
        and request.block_plan is None
        and not request.lse
        and not request.deterministic
        and request.dim_qk == request.dim_v
        and request.dim_qk % 8 == 0
        and request.dim_qk <= 256
        and request.last_dim_contiguous
    )


def names(request: AttentionRequest, chip: Chip) -> list[str]:
    """Torch backends that take a request on a chip."""
    if not takes(request) or not chip.torch_attention:
        return []
    wide = request.dim_qk > 128 and (chip.capability != (9, 0) or bool(request.grads))
    return ["flash"] if wide or not torch.backends.cuda.cudnn_sdp_enabled() else ["cudnn", "flash"]


def bind(name: str, request: AttentionRequest) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """A callable (query, key, value) of one of torch's backends.

    Equal head counts call the backend's operator, which takes a third of the host time of choosing it by `sdpa_kernel`.
    """
    causal, scale, grads = request.causal is not Causal.NONE, request.scale, bool(request.grads)
    if request.heads_q != request.heads_kv:
        attend, backend = torch.nn.functional.scaled_dot_product_attention, BACKENDS[name]

        def grouped(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            with sdpa_kernel(backend):
                return attend(query, key, value, is_causal=causal, scale=scale, enable_gqa=True)

        return grouped
    if name == "cudnn":
        cudnn = torch.ops.aten._scaled_dot_product_cudnn_attention.default

        def by_cudnn(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            out: Tensor = cudnn(query, key, value, None, grads, 0.0, causal, False, scale=scale)[0]
            return out

        return by_cudnn
    flash = torch.ops.aten._scaled_dot_product_flash_attention.default

    def by_flash(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out: Tensor = flash(query, key, value, 0.0, causal, False, scale=scale)[0]
        return out

    return by_flash
