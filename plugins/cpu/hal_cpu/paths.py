"""Which path a request takes, with which tiles, and how much scratch memory that needs: decided without torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

from hal_core.plugin_api import AttentionRequest, Causal, MaskKind

from .machine import this_machine

Path = Literal["native", "packed", "fused", "decode", "tiled"]

#: Query rows that share a key head (group times len_q) up to which packing them into one product pays.
MOST_PACKED_ROWS = 128
#: Rows up to which all scores of a call are held at once.
MOST_DECODE_ROWS = 32
#: Bytes of key and value from which float16 is better widened chunk by chunk than given to torch's kernel.
FEWEST_WIDENED_BYTES = 1 << 20


def path_of(request: AttentionRequest) -> Path:
    """The path of a request, from its static fields alone. A packed sequence is asked about by itself.

    native: torch's scaled_dot_product_attention. packed: the same with the heads of a group as rows. fused: torch's
    kernel with its log-sum-exp. decode: few query rows, arranged around reading the keys. tiled: everything else.
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
        or request.effective_scale <= 0  # torch's kernel multiplies the mask's -inf by it
    )
    masked, causal = request.mask is not MaskKind.NONE, sees_less(request)
    shifted = causal and (request.causal is Causal.BOTTOM_RIGHT or request.diagonal != 0)
    tiled = special or (masked and (causal or request.lse))
    rows = request.len_q * (request.heads_q // max(request.heads_kv, 1))
    if not (request.grads or request.dropout or request.block_plan):
        if rows <= MOST_DECODE_ROWS and (tiled or (shifted and rows) or (not causal and _worth_streaming(request))):
            return "decode"
        if not tiled and not causal and not request.lse and rows <= MOST_PACKED_ROWS and _worth_packing(request):
            return "packed"
    if tiled:
        return "tiled"
    return "fused" if request.lse or shifted else "native"


def sees_less(request: AttentionRequest) -> bool:
    """Whether causal hides anything: the last row of a bottom-right diagonal reads every key."""
    if request.causal is Causal.NONE:
        return False
    return not (request.causal is Causal.BOTTOM_RIGHT and request.len_q == 1 and request.diagonal >= 0)


def _worth_packing(request: AttentionRequest) -> bool:
    """Grouped heads, or the one bfloat16 row that torch multiplies by a slow path."""
    return request.heads_q != request.heads_kv or doubles(request)


def doubles(request: AttentionRequest) -> bool:
    """Whether a single query row is computed twice: torch's product of one bfloat16 row takes twice that of two."""
    return request.dtype == "bfloat16" and request.len_q == 1 and request.heads_q == request.heads_kv


def _worth_streaming(request: AttentionRequest) -> bool:
    """Whether widening a float16 cache chunk by chunk beats torch's kernel, which multiplies float16 slowly."""
    size = request.batch * request.heads_kv * request.len_k * (request.dim_qk + request.dim_v)
    return widens(request) and size * 2 >= FEWEST_WIDENED_BYTES


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
    def choose(
        cls, request: AttentionRequest, threads: int, *, one_head: bool = False, tile: int | None = None
    ) -> TileSizes:
        """Tiles of 512 x 512 pairs, for as many heads as twice the second-level caches of all threads hold the scores
        of.

        Smaller tiles spend their time in calls, larger ones in memory. A window gets fewer rows: tiles are whole, and
        rows beyond the window's width are paid for.

        Args:
            request: with exact lengths.
            threads: that torch uses.
            one_head: a block plan has a pattern for each head, so heads are worked on one by one.
            tile: query rows and keys, where the caller insists.
        """
        group = request.heads_q // request.heads_kv
        scores = 2 * threads * this_machine().l2 // (8 if request.dtype == "float64" else 4)
        most = 512
        if request.window is not None and request.window[0] is not None:
            most = min(max(request.window[0], 128), 512)
        rows = min(request.len_q, tile or max(most // group, 64))
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
