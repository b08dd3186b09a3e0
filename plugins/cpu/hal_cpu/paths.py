"""Which path a request takes, with which tiles, and how much scratch memory that needs: decided without torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

from hal_core import AttentionRequest, Causal, MaskKind

from .machine import this_machine

Path = Literal["native", "fused", "decode", "tiled"]

#: Query rows that share a key head (group times len_q) up to which reading the keys dominates.
MOST_DECODE_ROWS = 32
#: Keys below which one call of torch's kernel costs less than the decode path's several.
FEWEST_DECODE_KEYS = 256


def path_of(request: AttentionRequest) -> Path:
    """The path of a request, from its static fields alone. A packed sequence is asked about by itself.

    native: torch's scaled_dot_product_attention. fused: its kernel with the log-sum-exp. decode: few query rows.
    tiled: everything else.
    """
    special = bool(
        request.softcap is not None
        or request.window is not None
        or request.cache_dtype is not None
        or request.page_size is not None
        or request.block_plan is not None
        or request.dropout
        or "mask" in request.grads
        or request.grad_lse
    )
    masked, causal = request.mask is not MaskKind.NONE, request.causal is not Causal.NONE
    plain = not (request.grads or request.dropout or request.block_plan)
    if plain and request.len_q * (request.heads_q // request.heads_kv) <= MOST_DECODE_ROWS:
        shifted = request.causal is Causal.BOTTOM_RIGHT or request.diagonal
        if special or shifted or (masked and (causal or request.lse)) or _worth_decoding(request):
            return "decode"
    if special or (masked and (causal or request.lse)):
        return "tiled"
    return "fused" if request.lse or request.causal is Causal.BOTTOM_RIGHT or request.diagonal else "native"


def _worth_decoding(request: AttentionRequest) -> bool:
    """Whether packing beats torch's kernel: heads to pack or a dtype torch is slow in, and enough keys."""
    packs = request.heads_q != request.heads_kv or widens(request)
    return packs and request.len_k >= FEWEST_DECODE_KEYS


def widens(request: AttentionRequest) -> bool:
    """Whether float16 is computed in float32: without float16 products torch's kernel takes twice float32's time."""
    return request.dtype == "float16" and not this_machine().multiplies_float16


class TileSizes(NamedTuple):
    """Batch entries, key/value heads, query rows and keys of one tile."""

    batch: int
    heads: int
    rows: int
    columns: int

    @property
    def pairs(self) -> int:
        return self.batch * self.heads

    @classmethod
    def choose(cls, request: AttentionRequest, threads: int, *, one_head: bool = False, tile: int | None = None) -> TileSizes:
        """Tiles whose scores fill the second-level caches of all threads once.

        Args:
            request: with exact lengths.
            threads: that torch uses.
            one_head: a block plan has a pattern for each head, so heads are worked on one by one.
            tile: query rows and keys, where the caller insists.
        """
        group = request.heads_q // request.heads_kv
        scores = threads * this_machine().l2 // (8 if request.dtype == "float64" else 4)
        rows = min(request.len_q, tile or max(256 // group, 64))
        columns = min(request.len_k, tile or 512)
        if request.block_plan is not None:
            block_q, block_k, _ = request.block_plan
            rows, columns = block_q, max(columns // block_k, 1) * block_k
        pairs = max(scores // max(group * rows * columns, 1), 1)
        if one_head or pairs < request.heads_kv:
            return cls(1, 1 if one_head else pairs, rows, columns)
        return cls(min(pairs // request.heads_kv, max(request.batch, 1)), request.heads_kv, rows, columns)


def tiled_scratch(request: AttentionRequest, sizes: TileSizes) -> list[int]:
    """Numbers that one tile of the forward pass needs: scores, query, key, value, out, random words, slopes."""
    rows = sizes.pairs * sizes.rows * (request.heads_q // request.heads_kv)
    keys = sizes.pairs * sizes.columns
    return _whole_lines([
        rows * sizes.columns,
        rows * request.dim_qk,
        keys * request.dim_qk,
        keys * request.dim_v,
        rows * request.dim_v,
        2 * rows * sizes.columns if request.dropout else 0,
    ])  # fmt: skip


def backward_scratch(request: AttentionRequest, sizes: TileSizes) -> list[int]:
    """What the backward pass needs beside `tiled_scratch`.

    Gradients of scores, of query rows, the output's gradient, kept weights, slopes, and sums of key and value.
    """
    rows = sizes.pairs * sizes.rows * (request.heads_q // request.heads_kv)
    return _whole_lines([
        rows * sizes.columns,
        rows * request.dim_qk,
        rows * request.dim_v,
        rows * sizes.columns if request.dropout else 0,
        rows * sizes.columns if request.softcap is not None else 0,
        sizes.pairs * request.len_k * request.dim_qk,
        sizes.pairs * request.len_k * request.dim_v,
    ])  # fmt: skip


class DecodeSizes(NamedTuple):
    """Batch entries worked on at once, and keys widened at once."""

    batch: int
    columns: int

    @classmethod
    def choose(cls, request: AttentionRequest, *, direct: bool, one_batch: bool) -> DecodeSizes:
        """As many as stay in the third-level cache.

        Args:
            request: with exact lengths.
            direct: keys and values are read where they lie, with nothing converted.
            one_batch: key heads of two batch entries have no common stride.
        """
        size, room = (8 if request.dtype == "float64" else 4), this_machine().l3 // 4
        rows = request.len_q * (request.heads_q // request.heads_kv)
        scores = max(request.heads_kv * rows * request.len_k * size, 1)
        batch = 1 if one_batch else min(max(room // scores, 1), max(request.batch, 1))
        if direct:
            return cls(batch, request.len_k)
        one_key = batch * request.heads_kv * max(request.dim_qk, request.dim_v) * size
        return cls(batch, min(max(room // one_key, 64), request.len_k))


def decode_scratch(request: AttentionRequest, sizes: DecodeSizes, *, direct: bool) -> list[int]:
    """Numbers that the decode path needs: query, scores, one chunk's products, one chunk of widened keys or values."""
    pairs, rows = sizes.batch * request.heads_kv, request.len_q * (request.heads_q // request.heads_kv)
    return _whole_lines([
        pairs * rows * request.dim_qk,
        pairs * rows * request.len_k,
        pairs * rows * sizes.columns,
        0 if direct else pairs * sizes.columns * max(request.dim_qk, request.dim_v),
    ])  # fmt: skip


def _whole_lines(counts: Sequence[int]) -> list[int]:
    """Every part begins on a cache line."""
    return [-(-count // 16) * 16 for count in counts]
