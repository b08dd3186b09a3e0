"""What a call costs: time on a device that was not calibrated, and memory."""

from __future__ import annotations

from typing import Any

from hal_compute.cost import (
    gradient_bytes,
    mask_bytes,
    padded_operands,
    part_bytes,
    result_bytes,
    workspace_bytes,
)
from hal_compute.sizes import Sizes

from hal_core.plugin_api import AttentionRequest

from .discovery import is_cpu
from .tiling import OpenClTiling

_SCRATCH_ALIGNMENT = 64


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
    asked = request.lse or bool(request.grads)
    mask = [mask_bytes(request)] if mask_bytes(request) else []
    results = result_bytes(request) - (0 if asked else rows)
    scratch, regions = [[*mask, *([] if asked else [rows])]], [workspaces(request, tiling)]
    if request.grads:
        results += gradient_bytes(request)
        scratch.append([*mask, rows])
        regions.append([64, *padded_operands(request, backward=True), 3 * rows])
    return results + workspace_bytes(_SCRATCH_ALIGNMENT, *scratch) + workspace_bytes(alignment, *regions)


def largest_buffer(request: AttentionRequest, tiling: OpenClTiling) -> int:
    """Bytes of the largest buffer that a program reads or writes."""
    return max(result_bytes(request), mask_bytes(request), *workspaces(request, tiling))
