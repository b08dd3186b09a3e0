"""How much of an attention call is computed together, and the host memory that takes: without torch, for estimates."""

from __future__ import annotations

from typing import NamedTuple

from hal_core.plugin_api import DTYPE_BYTES, AttentionRequest, MaskKind

#: Scores that are computed at once on the host: what stays in a processor core's cache.
_CHUNK = 1 << 20
#: float32 elements of a workspace at most, where one key head fits.
_LARGEST = 1 << 22


class Part(NamedTuple):
    """How much is computed together: batch entries, key heads, query rows, and the keys of a tile."""

    batch: int
    heads: int
    rows: int
    keys: int


def part_of(request: AttentionRequest, block_k: int) -> Part:
    """The largest part of a call: as many scores as the host's cache holds, of whole heads where they fit."""
    r, group = request, request.heads_q // max(request.heads_kv, 1)
    if 0 in (r.batch, r.heads_q, r.len_q, r.len_k):
        return Part(0, 0, 0, 0)
    keys = min(block_k, r.len_k)
    rows = min(r.len_q, max(_CHUNK // (group * keys), 1))
    one = group * rows * (r.dim_qk + keys + 2 * r.dim_v) + keys * (r.dim_qk + r.dim_v)
    most = max(min(_CHUNK // (group * keys * rows), _LARGEST // one), 1)
    heads = min(r.heads_kv, most)
    return Part(min(r.batch, max(most // heads, 1)) if heads == r.heads_kv else 1, heads, rows, keys)


def areas_of(request: AttentionRequest, part: Part) -> list[tuple[str, int]]:
    """(dtype, elements) of what a part needs: float32, then the weights as the array reads them, then booleans."""
    r, (batch, heads, rows, keys) = request, part
    query_heads = heads * (r.heads_q // max(r.heads_kv, 1))
    queries, pairs = batch * query_heads * rows, batch * query_heads * rows * keys
    masked = (batch if r.mask_batch > 1 else 1) * (query_heads if r.mask_heads > 1 else 1) * rows * keys
    floats = queries * (2 * r.dim_qk + 2 * r.dim_v + 4) + pairs + batch * heads * keys * (r.dim_qk + r.dim_v)
    narrow, additive = r.dtype != "float32", r.mask is MaskKind.ADDITIVE
    banded = r.band(r.len_q, r.len_k) != (None, None)
    areas = [("float32", floats + (masked if narrow and additive else 0))]
    if narrow:
        areas.append((r.dtype, pairs))
    return [*areas, ("bool", (masked if r.mask is not MaskKind.NONE else 0) + (rows * keys if banded else 0))]


def workspace_size(request: AttentionRequest, block_k: int) -> int:
    """float32 elements of the workspace that `forward` needs for a call cut into tiles of block_k keys.

    Filled up to a sixteenth of the next power of two, or to a MiB, so that a pool of size classes has nothing to add.
    """
    areas = areas_of(request, part_of(request, block_k))
    needed = sum(count * (1 if dtype == "bool" else DTYPE_BYTES[dtype]) for dtype, count in areas)
    step = min(max(1 << max(needed - 1, 0).bit_length() >> 4, 1 << 14), 1 << 20)
    return -(-needed // step) * step // 4
