"""What a call costs: time on a device that was not calibrated, and memory."""

from __future__ import annotations

from typing import Any

from hal_compute.cost import (
    gradient_bytes,
    mask_bytes,
    padded_operands,
    part_bytes,
    pooled_bytes,
    result_bytes,
    workspace_bytes,
)
from hal_compute.sizes import Sizes

from hal_core.plugin_api import AttentionRequest

from .discovery import is_cpu
from .tiling import OpenClTiling


def assumed(handle: Any) -> tuple[tuple[float, float], tuple[float, float]]:
    """(least, most) seconds of a call without work, and (least, most) multiply-accumulates per second."""
    units = handle.max_compute_units
    return (5e-5, 2e-3), (2e9 * units, 4e10 * units if is_cpu(handle) else 1e11 * units)


def workspaces(request: AttentionRequest, tiling: OpenClTiling) -> list[int]:
    """Bytes of every region of memory that a forward pass takes beside results, in order. Tensors are contiguous."""
    sizes = Sizes.of(request, pack=request.tiling is None)
    shape = tiling.shape(sizes)
    _, splits = tiling.splits(shape, sizes)
    regions = [64, *padded_operands(request), *(part_bytes(sizes, splits) or [64])]
    if shape.packs_keys:
        units, dim = sizes.batch * sizes.heads_kv, sizes.dim
        regions.append(units * -(-sizes.len_k // shape.tile) * shape.tile * dim * 4)
        regions += [units * sizes.len_k * dim * 4] if request.dtype == "float16" else []
    return regions


def memory(request: AttentionRequest, tiling: OpenClTiling, alignment: int) -> int:
    """The most bytes that a call allocates, results included. `alignment`: of the device's regions."""
    if not all((request.batch, request.heads_q, request.len_q, request.len_k)):
        return result_bytes(request)
    rows = request.batch * request.heads_q * request.len_q * 4
    mask = pooled_bytes(mask_bytes(request)) if mask_bytes(request) else 0
    lse = 0 if request.lse or request.grads else pooled_bytes(rows) - rows  # it is a result only if it is asked for
    forward = mask + lse + workspace_bytes(workspaces(request, tiling), alignment)
    if not request.grads:
        return result_bytes(request) + forward
    regions = [64, *padded_operands(request, backward=True), 3 * rows]
    backward = mask + gradient_bytes(request) + pooled_bytes(rows) + workspace_bytes(regions, alignment)
    return result_bytes(request) + max(forward, backward)


def largest_buffer(request: AttentionRequest, tiling: OpenClTiling) -> int:
    """Bytes of the largest buffer that a program reads or writes."""
    return max(result_bytes(request), mask_bytes(request), *workspaces(request, tiling))
