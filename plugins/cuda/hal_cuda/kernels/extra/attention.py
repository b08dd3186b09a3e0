# ruff: noqa: N803
"""Attention by its older name: (O, LSE) of whole sequences."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from hal_core.plugin_api import AttentionRequest, Causal, PooledMemory, attention

from ...discovery import Chip
from ...memory import CudaMemory, StreamWorkspaces
from ...runtime.context import Context
from ...tiling import CudaTiling
from .checks import check_tensors, chip_of, refuse, shapes


def flash_attention_forward(
    Q: Tensor, K: Tensor, V: Tensor, scale: float | None = None, is_causal: bool = False
) -> tuple[Tensor, Tensor]:
    """`hal_core.attention` on the tensors' GPU, with the log-sum-exp.

    Args:
        Q: [B, H, N, D]. K, V: [B, H', N', D], H a multiple of H'. scale: None for 1 / sqrt(D).
        is_causal: row i reads keys 0 to i.

    Returns:
        (O [B, H, N, D], LSE float32 [B, H, N], natural).

    Raises:
        ContractError, UnsupportedError: as `hal_core.attention`, which also differentiates.
    """
    refuse("flash_attention_forward", (not Q.is_cuda, f"a tensor on {Q.device}: move it to a CUDA device"))
    found = attention(
        Q,
        K,
        V,
        scale=scale,
        is_causal=is_causal,
        enable_gqa=True,
        return_lse=True,
        backend=f"cuda:{chip_of(Q.device).index}",
    )
    return found[0], found[1]


@lru_cache(maxsize=16)
def _context(chip: Chip, host: bool) -> Context:
    """What a launch of the Triton kernel needs beside its tensors."""
    memory = PooledMemory("cpu") if host else CudaMemory(chip.index)
    return Context(chip, memory, StreamWorkspaces(memory), CudaTiling(chip, lambda request: "portable"))


@lru_cache(maxsize=256)
def _path(request: AttentionRequest, chip: Chip, host: bool) -> object:
    from ..portable.launch import PortablePath

    return PortablePath(request, _context(chip, host))


def triton_flash_attention_forward(
    Q: Tensor, K: Tensor, V: Tensor, scale: float | None = None, is_causal: bool = False
) -> tuple[Tensor, Tensor]:
    """`flash_attention_forward` by the Triton kernel for every GPU of compute capability 8.0 and up, without
    gradients.
    """
    from ...runtime import binaries

    name = "triton_flash_attention_forward"
    check_tensors(name, binaries.INTERPRETED, [Q, K, V])
    refuse(
        name,
        (
            {t.dim() for t in (Q, K, V)} != {4}
            or K.shape != V.shape
            or Q.shape[0] != K.shape[0]
            or Q.shape[3] != K.shape[3]
            or not K.shape[1]
            or Q.shape[1] % K.shape[1] != 0,
            f"{shapes(Q, K, V)}: use [B, H, N, D] and twice [B, H', N', D], H a multiple of H'",
        ),
    )
    batch, heads, length, dim = Q.shape
    if not (Q.numel() and K.numel()):
        return Q.new_zeros(Q.shape), Q.new_full(Q.shape[:3], float("-inf"), dtype=torch.float32)
    chip = chip_of(Q.device)
    request = AttentionRequest(
        batch=batch,
        heads_q=heads,
        heads_kv=K.shape[1],
        len_q=length,
        len_k=K.shape[2],
        dim_qk=dim,
        dim_v=dim,
        dtype=str(Q.dtype).removeprefix("torch."),
        scale=scale,
        causal=Causal.TOP_LEFT if is_causal else Causal.NONE,
        lse=True,
    )
    found = _path(request, chip, binaries.INTERPRETED)(Q, K, V)  # type: ignore[operator]
    return found.out, found.lse
