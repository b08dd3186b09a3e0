"""How much scratch memory a kernel takes from the session's memory, part by part. Imports no torch.

Counts are elements of the dtype that sums are made in ("wide": float32, or float64 for float64), and every part begins
on a cache line. Kernels split one buffer by these counts, and estimates add them up.
"""

from __future__ import annotations

from typing import NamedTuple

from hal_core.plugin_api import DTYPE_BYTES, AttentionRequest, MaskKind

from ..paths import reads_in_place
from ..tiling import BlockSizes, DecodeSizes, TileSizes


class TiledParts(NamedTuple):
    """Of one tile of the forward pass.

    Attributes:
        scores: products, scores and weights. query, out: rows of the tile. key, value: a chunk that is no view.
        pages: a chunk as a paged cache stores it. statistics: maxima and sums of rows. hidden: pairs that causal and
        window hide, as bool. mask: a tile of an additive mask in another dtype. random: words of dropout, then factors.
        row_words: words of dropout for each row.
    """

    scores: int
    query: int
    out: int
    key: int
    value: int
    pages: int
    statistics: int
    hidden: int
    mask: int
    random: int
    row_words: int

    @classmethod
    def of(cls, request: AttentionRequest, sizes: TileSizes) -> TiledParts:
        wide = _wide(request)
        group = request.heads_q // max(request.heads_kv, 1)
        rows, pairs = sizes.pairs * sizes.rows * group, sizes.rows * sizes.columns
        keys, pages = _chunk(request, sizes.heads, sizes.pairs, sizes.columns)
        return cls(
            *_on_lines(
                rows * sizes.columns,
                rows * request.dim_qk,
                rows * request.dim_v,
                keys * request.dim_qk,
                keys * request.dim_v,
                pages,
                7 * rows,
                -(-pairs // wide) if _bounded(request) else 0,
                _mask_tile(request, sizes, group),
                2 * rows * sizes.columns if request.dropout else 0,
                8 * rows if request.dropout else 0,
            )
        )


class BackwardParts(NamedTuple):
    """What the backward pass needs beside `TiledParts`.

    Attributes:
        grad_scores, grad_query, grad_out: of a tile's scores, query rows and output. dropped: weights after dropout.
        slope: derivative of the softcap. key, value: sums over all keys. chunk: what a block plan's keys add to them.
        mask: what a tile adds to the mask's gradient.
    """

    grad_scores: int
    grad_query: int
    grad_out: int
    dropped: int
    slope: int
    key: int
    value: int
    chunk: int
    mask: int

    @classmethod
    def of(cls, request: AttentionRequest, sizes: TileSizes) -> BackwardParts:
        group = request.heads_q // max(request.heads_kv, 1)
        rows = sizes.pairs * sizes.rows * group
        wanted = request.grads or frozenset("qkv")
        return cls(
            *_on_lines(
                rows * sizes.columns,
                rows * request.dim_qk,
                rows * request.dim_v,
                rows * sizes.columns if request.dropout else 0,
                rows * sizes.columns if request.softcap is not None else 0,
                sizes.pairs * request.len_k * request.dim_qk if "k" in wanted else 0,
                sizes.pairs * request.len_k * request.dim_v if "v" in wanted else 0,
                sizes.pairs * sizes.columns * max(request.dim_qk, request.dim_v)
                if request.block_plan is not None
                else 0,
                rows * sizes.columns if "mask" in wanted else 0,
            )
        )


class DecodeParts(NamedTuple):
    """Of the decode kernel.

    Attributes:
        query, scores, out: all rows of the batch entries at work. products: of one chunk of keys, keys first.
        key: a chunk that is no view. pages: a chunk as a paged cache stores it. statistics: maxima and sums of rows.
        hidden: pairs that causal and window hide, as bool. mask: an additive mask in another dtype.
        narrow: weights and output in the values' own dtype, in elements of that dtype's size. parts: of split keys.
    """

    query: int
    scores: int
    out: int
    products: int
    key: int
    pages: int
    statistics: int
    hidden: int
    mask: int
    narrow: int
    parts: int

    @classmethod
    def of(cls, request: AttentionRequest, sizes: DecodeSizes, *, direct: bool, narrow: bool) -> DecodeParts:
        """
        Args:
            direct: chunks are views. narrow: values are multiplied in their own 16-bit dtype.
        """
        wide, group = _wide(request), request.heads_q // max(request.heads_kv, 1)
        pairs, rows = sizes.batch * request.heads_kv, request.len_q * group
        keys, pages = _chunk(request, request.heads_kv, pairs, sizes.columns)
        runs = request.len_k // VALUE_RUN
        tile = TileSizes(sizes.batch, request.heads_kv, request.len_q, request.len_k)
        return cls(
            *_on_lines(
                pairs * rows * request.dim_qk,
                pairs * rows * request.len_k,
                pairs * rows * request.dim_v,
                pairs * rows * sizes.columns,
                0 if direct else keys * max(request.dim_qk, request.dim_v),
                pages,
                4 * pairs * rows,
                -(-request.len_q * request.len_k // wide) if _bounded(request) else 0,
                _mask_tile(request, tile, group),
                -(-pairs * rows * (request.len_k + request.dim_v) // 2) if narrow else 0,
                runs * rows * request.dim_v if direct and runs > 1 else 0,
            )
        )


class BlockParts(NamedTuple):
    """Of a block plan, whose query blocks are multiplied many at once; the last six are the backward's alone.

    Attributes:
        scores: products, scores and weights. key, value: blocks that were gathered. query, out: rows of the query
        blocks at work. whole_query, whole_out: of all blocks of a head. whole_key, whole_value: a head's keys as
        blocks, where they are no view. statistics: maxima and sums of rows. listed: three lists as int64 and one as
        bool. hidden: pairs of a block that causal and window hide, as bool.
        grad_scores, slope: as scores. grad_out: as out. whole_grad_out: as whole_out. key_sum, value_sum: sums over
        all blocks of a head.
    """

    scores: int
    key: int
    value: int
    query: int
    out: int
    whole_query: int
    whole_out: int
    whole_key: int
    whole_value: int
    statistics: int
    listed: int
    hidden: int
    grad_scores: int
    slope: int
    grad_out: int
    whole_grad_out: int
    key_sum: int
    value_sum: int

    @classmethod
    def of(cls, request: AttentionRequest, sizes: BlockSizes, *, backward: bool = False) -> BlockParts:
        assert request.block_plan is not None
        wide, group = _wide(request), request.heads_q // max(request.heads_kv, 1)
        block_q, block_k, most = request.block_plan
        block_q = max(min(block_q, request.len_q), 1)
        rows, all_rows = sizes.at_most * sizes.rows, sizes.blocks_q * sizes.rows
        pairs = sizes.at_once * sizes.rows * sizes.keys
        # A pattern for each query head gathers the keys of its group's other heads too.
        gathered, keys = sizes.at_once * group * sizes.keys, sizes.blocks_k * block_k
        copied = not reads_in_place(request) or request.len_k % block_k != 0
        listed = sizes.blocks_q * most  # whole lists: of a short sequence's, any entries may count
        later = (
            pairs,
            pairs if request.softcap is not None else 0,
            rows * request.dim_v,
            all_rows * request.dim_v,
            keys * request.dim_qk,
            keys * request.dim_v,
        )
        return cls(
            *_on_lines(
                pairs,
                gathered * request.dim_qk,
                gathered * request.dim_v,
                rows * request.dim_qk,
                rows * max(request.dim_v, request.dim_qk),
                all_rows * request.dim_qk,
                all_rows * max(request.dim_v, request.dim_qk),
                keys * request.dim_qk if copied else 0,
                keys * request.dim_v if copied else 0,
                3 * rows + 2 * all_rows,
                -(-listed * 25 // wide),
                -(-block_q * block_k // wide),
                *(later if backward else (0,) * 6),
            )
        )


#: Keys of one partial product of weights and values: long enough for the product, short enough to share among threads.
VALUE_RUN = 1024
#: Tokens in a page from which pages are copied one by one instead of gathered together.
SMALLEST_COPIED_PAGE = 128


def _chunk(request: AttentionRequest, heads: int, pairs: int, columns: int) -> tuple[int, int]:
    """(keys of a chunk over all its heads, elements of its pages as they are stored)."""
    if request.page_size is None or request.page_size >= SMALLEST_COPIED_PAGE:
        return pairs * columns, 0
    tokens = heads * (columns + 2 * request.page_size)
    size = DTYPE_BYTES.get(request.cache_dtype or request.dtype, 1)  # int4 by its bytes
    return tokens, -(-tokens * max(request.dim_qk, request.dim_v) * size // _wide(request))


def _bounded(request: AttentionRequest) -> bool:
    """Whether causal or window may hide a pair."""
    return request.band(request.len_q, request.len_k) != (None, None)


def _mask_tile(request: AttentionRequest, sizes: TileSizes, group: int) -> int:
    """Elements of an additive mask's tile where the mask may have another dtype than the scores."""
    if request.mask is not MaskKind.ADDITIVE:
        return 0
    batch = sizes.batch if request.mask_batch > 1 else 1
    heads = sizes.heads * group if request.mask_heads > 1 else 1
    return batch * heads * sizes.rows * sizes.columns


def _wide(request: AttentionRequest) -> int:
    return 8 if request.dtype == "float64" else 4


def _on_lines(*counts: int) -> list[int]:
    return [-(-count // 16) * 16 for count in counts]
