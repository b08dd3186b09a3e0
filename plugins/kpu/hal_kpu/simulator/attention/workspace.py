"""How much of an attention call is computed together, and the host memory that takes: without torch, for estimates."""

from __future__ import annotations

from dataclasses import replace
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
    flags = (masked if r.mask is not MaskKind.NONE else 0) + (rows * keys if banded else 0)
    return [*areas, ("bool", flags + _rows_of_blocks(r, part))]


def _rows_of_blocks(request: AttentionRequest, part: Part) -> int:
    """Rows of a part, filled up to whole query blocks of a plan; 0 without a plan."""
    if request.block_plan is None:
        return 0
    heads = part.heads * (request.heads_q // max(request.heads_kv, 1))
    return part.batch * heads * (part.rows + 2 * request.block_plan[0])


def workspace_size(request: AttentionRequest, block_k: int) -> int:
    """float32 elements of the workspace that `forward` needs for a call cut into tiles of block_k keys."""
    areas = areas_of(request, part_of(request, block_k))
    return -(-sum(count * (1 if dtype == "bool" else DTYPE_BYTES[dtype]) for dtype, count in areas) // 4)


def backward_bytes(request: AttentionRequest, block_k: int) -> int:
    """The most bytes that `values.backward` holds for a call cut into tiles of block_k keys, its gradients included.

    The float32 sums of all gradients and three to five numbers of each row stay; beside them lies one tile at a time,
    whose peaks follow the statements of `values._add_tile`.
    """
    r, (batch, heads, rows, keys) = request, part_of(request, block_k)
    size, narrow = DTYPE_BYTES[r.dtype], r.dtype != "float32"
    queries, seen = batch * heads * (r.heads_q // max(r.heads_kv, 1)) * rows, batch * heads * keys
    pairs, all_rows = 4 * queries * keys, r.batch * r.heads_q * r.len_q
    masked = areas_of(replace(r, block_plan=None), part_of(r, block_k))[-1][1] if r.mask is not MaskKind.NONE else 0
    all_pairs = r.mask_batch * r.mask_heads * r.len_q * r.len_k
    sizes = {
        "q": all_rows * r.dim_qk,
        "k": r.batch * r.heads_kv * r.len_k * r.dim_qk,
        "v": r.batch * r.heads_kv * r.len_k * r.dim_v,
    }
    sums = 4 * (sum(sizes.values()) + (all_pairs if "mask" in r.grads else 0))
    # Copies in float32 of a tile's operands, and weights or gradients of scores in the request's dtype.
    query, key, value, grad_out = (
        4 * count * narrow for count in (queries * r.dim_qk, seen * r.dim_qk, seen * r.dim_v, queries * r.dim_v)
    )
    cast, wide = size * queries * keys * narrow, pairs * narrow
    slope = pairs if r.softcap is not None else 0
    bounded = 11 * rows * keys if r.band(r.len_q, r.len_k) != (None, None) else 0
    hidden = masked * (1 + (4 + 4 * narrow) * (r.mask is MaskKind.ADDITIVE))
    bounded = max(bounded, _rows_of_blocks(r, part_of(r, block_k)))
    last = pairs + slope + (cast if narrow else pairs)
    tile = max(
        query + key + pairs,
        query + pairs + slope + max(hidden, bounded),
        2 * pairs + slope + value + grad_out,
        2 * pairs + slope + cast + wide + grad_out + 4 * seen * r.dim_v,
        2 * pairs + slope + cast,
        last + wide + key + 4 * queries * r.dim_qk,
        last + wide + query + 4 * seen * r.dim_qk,
    )
    before = all_rows * r.dim_v * 4 * (1 + 2 * narrow)  # out * grad_out
    after = narrow * size * (sum(sizes[name] for name in r.grads & sizes.keys()))
    numbers = 17 if r.mask is MaskKind.ADDITIVE else 9  # of each row: `values._Flowing`
    return sums + max(before, numbers * all_rows + max(tile, after))
