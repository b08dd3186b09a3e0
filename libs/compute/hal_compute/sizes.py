"""The sizes of a call, which decide how programs cut it. Nothing here imports torch.

Programs cut the work into units, blocks of a unit's rows, and splits of the keys. A unit has the query rows that read
one key head together: those of one query head, or, where there are few, those of all query heads that share the key
head.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from hal_core.plugin_api import AttentionRequest

OPEN = 1 << 30  # no bound
#: Head sizes that programs exist for. Others are padded with zeros, which change no score.
HEAD_DIMS = (32, 64, 96, 128, 192, 256)
PACK_BELOW = 32  # query rows below which the heads of a key head share a unit
MOST_SPLITS = 64  # of the keys of a row


def within(limits: Mapping[str, int], block_q: int, block_k: int) -> tuple[int, int]:
    """Block sizes within the bounds of a plan: "block_q", "block_k", or "maximum" for both."""
    most = limits.get("maximum", OPEN)
    return min(block_q, limits.get("block_q", most)), min(block_k, limits.get("block_k", most))


def padded_dim(request: AttentionRequest) -> int:
    """The head size of the program that serves a request: at least dim_qk and dim_v."""
    return next(dim for dim in HEAD_DIMS if dim >= max(request.dim_qk, request.dim_v))


def splits_of(blocks: int, len_k: int, tile: int, *, wanted: int, least: int) -> tuple[int, int]:
    """(keys of a split, number of splits): enough splits that `blocks` blocks of query rows become about `wanted`.

    Args:
        tile: keys of a tile; splits have whole tiles. least: the fewest keys of a split.
    """
    if not 0 < blocks < wanted or len_k <= least:
        return OPEN, 1
    parts = min(-(-wanted // blocks), -(-len_k // least), MOST_SPLITS)
    keys = -(-len_k // parts)
    chunk = -(-keys // tile) * tile
    return chunk, -(-len_k // chunk)


class Sizes(NamedTuple):
    """The sizes of a call that decide which program runs and how it cuts the work.

    Attributes:
        dim: padded head size. heads_per_unit, unit_rows, units: see the module.
        range_rows: query rows that share key ranges; 0 where there are none, or all rows of a head share them.
    """

    batch: int
    heads_q: int
    heads_kv: int
    len_q: int
    len_k: int
    dim: int
    dtype: str
    heads_per_unit: int
    unit_rows: int
    units: int
    range_rows: int = 0

    @classmethod
    def of(cls, request: AttentionRequest, *, pack: bool, range_rows: int = 0, per_head: bool = False) -> Sizes:
        """The sizes of a request.

        Args:
            pack: whether a unit may hold several heads. range_rows: query rows that share key ranges, 0 without ranges.
            per_head: whether key ranges differ between heads.
        """
        batch, heads_q, heads_kv, len_q = request.batch, request.heads_q, request.heads_kv, request.len_q
        group = heads_q // max(heads_kv, 1)
        together = not range_rows or (range_rows >= len_q and not per_head)
        per_unit = group if pack and group > 1 and len_q < PACK_BELOW and together else 1
        units = batch * heads_q // per_unit
        rows = range_rows if range_rows < len_q else 0
        sizes = (batch, heads_q, heads_kv, len_q, request.len_k, padded_dim(request), request.dtype)
        return cls(*sizes, per_unit, per_unit * len_q, units, rows)
