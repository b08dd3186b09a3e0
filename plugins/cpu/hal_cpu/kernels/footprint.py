"""How many bytes a call allocates at its peak, path by path. Imports no torch."""

from __future__ import annotations

from dataclasses import replace

from hal_core.plugin_api import DTYPE_BYTES, AttentionRequest

from ..paths import path_of


def peak_memory(request: AttentionRequest, threads: int) -> int:
    """Bytes that a call allocates at its peak: results and what the kernel holds beside them; inputs not.

    Args:
        request: lengths exact. With gradients, forward and backward together, their gradients included.
        threads: that torch uses.
    """
    size, wide = DTYPE_BYTES[request.dtype], 8 if request.dtype == "float64" else 4
    rows = request.batch * request.heads_q * request.len_q
    if request.packed or request.page_size is not None:  # one sequence after the other
        total = rows * request.dim_v * size + rows * wide * request.lse
        one = replace(request, packed=False, batch=1)
        path = path_of(one)
        results = request.heads_q * request.len_q * (request.dim_v * size + wide * one.lse)
        beside = _beside(path, one, threads)
        return total + beside + (results if path in ("native", "packed", "fused") else 0)
    return rows * request.dim_v * size + _beside(path_of(request), request, threads)


def _beside(path: str, request: AttentionRequest, threads: int) -> int:
    return 0
