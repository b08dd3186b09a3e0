# ruff: noqa: N803
"""Rotary position embedding in CUDA C++."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ..extra.checks import aligned, check_tensors, chip_of
from ..extra.forms import Rotation, check_table, log_step, rotation, steps_by_16, strides_of
from . import module

_HEADS = 4  # of a thread


def rope_precompute_freqs(
    max_seq_len: int, head_dim: int, base: float = 10000.0, *, device: torch.device | str | None = None
) -> tuple[Tensor, Tensor]:
    """(cos, sin) of position * base^(-2 i / head_dim), float32 [max_seq_len, head_dim / 2].

    Angles are brought below a turn in float64, so entries are right to float32 at any position.

    Args:
        head_dim: even. base: above 0. device: a CUDA device; None for the current one.

    Raises:
        ContractError: sizes that make no sense, or another device. DeviceUnavailableError: CuPy or NVRTC is missing.
    """
    check_table("rope_precompute_freqs", max_seq_len, head_dim, base)
    place = torch.device("cuda" if device is None else device)
    cos, sin = (torch.empty(max_seq_len, head_dim // 2, dtype=torch.float32, device=place) for _ in range(2))
    check_tensors("rope_precompute_freqs", False, [cos])
    if cos.numel():
        index = chip_of(cos.device).index
        made = module.function("rope", "rope_table", {"ELEMENT": "float"}, index)
        arguments = (cos, sin, np.int64(cos.numel()), np.int32(head_dim // 2), np.float64(log_step(head_dim, base)))
        module.launch(made, index, -(-cos.numel() // 256), 256, arguments)
    return cos, sin


def rope_forward(Q: Tensor, K: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Query and key with elements 2 i and 2 i + 1 of every head turned by the angle of the position and i.

    Args:
        Q: [B, H, N, D], K: [B, H', N, D], D even, any strides, float32, float16 or bfloat16, on one CUDA device.
        cos, sin: float32 [L, D / 2], L at least N; see `rope_precompute_freqs`.

    Returns:
        New, contiguous tensors (Q', K'); computed in float32.

    Raises:
        ContractError: other shapes, dtypes or devices. DeviceUnavailableError: CuPy or NVRTC is missing.

    Source: Su et al. 2021 (RoFormer), equation 34.
    """
    return _rotate(rotation("rope_forward", Q, K, False, (cos, sin)), (cos, sin), 1e4)


def rope_forward_fused(Q: Tensor, K: Tensor, base: float = 10000.0) -> tuple[Tensor, Tensor]:
    """`rope_forward` with angles computed in the kernel: no tables are read."""
    return _rotate(rotation("rope_forward_fused", Q, K, False, base=base), None, base)


def _rotate(form: Rotation, tables: tuple[Tensor, Tensor] | None, base: float) -> tuple[Tensor, Tensor]:
    query, key, query_out, key_out = form
    batch, heads_q, length, dim = query.shape
    heads_k, index = key.shape[1], chip_of(query.device).index
    if batch * length * (heads_q + heads_k):
        size = 16 // query.itemsize
        wide = dim % size == 0 and steps_by_16(query, key) and aligned(*(tables or ()))
        entry = f"{'computed' if tables is None else 'table'}_{'wide' if wide else 'pairs'}"
        made = module.function("rope", entry, {"ELEMENT": module.ELEMENTS[query.dtype]}, index)
        groups = -(-heads_q // _HEADS) - (-heads_k // _HEADS)
        blocks = -(-length * dim // ((size if wide else 2) * 256)) * groups * batch
        strides = [np.int64(step) for t in (query, key) for step in strides_of(t)]
        sizes = (np.int32(heads_q), np.int32(heads_k), np.int64(length), np.int32(dim))
        given = (query, key, *(tables or (None, None)), query_out, key_out)
        module.launch(made, index, blocks, 256, (*given, *strides, *sizes, np.float64(log_step(dim, base))))
    return query_out, key_out
