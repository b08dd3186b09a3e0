"""How much scratch memory a kernel needs, in elements of the dtype that sums are made in. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence

from hal_core.plugin_api import AttentionRequest

from ..tiling import DecodeSizes, TileSizes


def tiled_scratch(request: AttentionRequest, sizes: TileSizes) -> list[int]:
    """Numbers that one tile of the forward pass needs: scores, query, key, value, out, random words, slopes."""
    rows = sizes.pairs * sizes.rows * (request.heads_q // request.heads_kv)
    keys = sizes.pairs * sizes.columns
    return _whole_lines(
        [
            rows * sizes.columns,
            rows * request.dim_qk,
            keys * request.dim_qk,
            keys * request.dim_v,
            rows * request.dim_v,
            2 * rows * sizes.columns if request.dropout else 0,
        ]
    )


def backward_scratch(request: AttentionRequest, sizes: TileSizes) -> list[int]:
    """What the backward pass needs beside `tiled_scratch`.

    Gradients of scores, of query rows, the output's gradient, kept weights, slopes, and sums of key and value.
    """
    rows = sizes.pairs * sizes.rows * (request.heads_q // request.heads_kv)
    return _whole_lines(
        [
            rows * sizes.columns,
            rows * request.dim_qk,
            rows * request.dim_v,
            rows * sizes.columns if request.dropout else 0,
            rows * sizes.columns if request.softcap is not None else 0,
            sizes.pairs * request.len_k * request.dim_qk,
            sizes.pairs * request.len_k * request.dim_v,
        ]
    )


def decode_scratch(request: AttentionRequest, sizes: DecodeSizes, *, direct: bool) -> list[int]:
    """Numbers that the decode path needs: query, scores, one chunk's products, one chunk of widened keys or values."""
    pairs, rows = sizes.batch * request.heads_kv, request.len_q * (request.heads_q // request.heads_kv)
    return _whole_lines(
        [
            pairs * rows * request.dim_qk,
            pairs * rows * request.len_k,
            pairs * rows * sizes.columns,
            0 if direct else pairs * sizes.columns * max(request.dim_qk, request.dim_v),
        ]
    )


def _whole_lines(counts: Sequence[int]) -> list[int]:
    """Every part begins on a cache line."""
    return [-(-count // 16) * 16 for count in counts]
