"""What the Hopper kernel is compiled for, and the groups in which its run-time values are passed between functions.

The order of a group's fields is the order in which the values enter a warpgroup's partition; it is part of the
generated code.
"""

from __future__ import annotations

from typing import Any, NamedTuple


class Config(NamedTuple):
    """The compile-time constants of the kernel.

    Attributes:
        group: query heads of a key head. rows: query rows of a consumer warpgroup. keys: keys of a tile.
        dim_qk, dim_v: first part of a head size, a power of two. dim_qk2, dim_v2: its second part; 0: there is none.
        value_columns: columns of the values; where fewer than dim_v + dim_v2, the rest is padding (see narrow.py).
        stages, stages2: shared-memory stages of keys and values, and of their second parts.
        query_stages: stages of query tiles.
        barriers: barriers of the stages: `stages` where both parts have as many, else the product of both numbers,
            because a tile's barrier is its own until both its stages have gone round.
        shared_ring: keys and values share their stages (see `key_place`); they have the same head size.
        consumers: warpgroups that compute, 2 or 3.
        turns: consumer warpgroups take turns at the tensor cores.
        named: stages are released by named barriers, which do not block the warpgroup that arrives.
        own_output: the result has shared memory of its own, so the next query tile may be loaded while it is written.
        held: the first half of the query stays in registers, which leaves shared memory more time for the keys.
        lazy: weights are counted from up to GROWTH below the row's maximum (see `level`).
        left, right: rows begin, or end, at a diagonal. shifted: the right diagonal is not on a multiple of `rows`, so
            a warpgroup meets it in more than one tile. half: it is on a multiple of `keys`, and no row reaches past
            the last key. ragged: the last tile of keys may be cut short.
        softcap: scores are capped. lse: the log-sum-exp is written.
        packed: tiles come from a table of packed sequences. bottom: their diagonal ends in the last row and key.
    """

    group: int
    rows: int
    keys: int
    dim_qk: int
    dim_v: int
    dim_qk2: int
    dim_v2: int
    value_columns: int
    stages: int
    stages2: int
    query_stages: int
    barriers: int
    shared_ring: bool
    consumers: int
    turns: bool
    named: bool
    own_output: bool
    held: bool
    lazy: bool
    left: bool
    right: bool
    shifted: bool
    half: bool
    ragged: bool
    softcap: bool
    lse: bool
    packed: bool = False
    bottom: bool = False

    @property
    def split(self) -> bool:
        """Whether a head size has a second part."""
        return bool(self.dim_qk2 or self.dim_v2)


class Inputs(NamedTuple):
    """Tensor maps of query, key and value, [batch, heads, length, dim], and the same for blocks of the second part."""

    query: Any
    key: Any
    value: Any
    query2: Any
    key2: Any
    value2: Any


class Output(NamedTuple):
    """Tensor maps of the result; lse, float32 [batch, heads, len_q]; and, for packed sequences, the result's pointer
    and its strides of heads and rows, by which the last rows of a sequence are written."""

    map: Any
    map2: Any
    lse: Any
    pointer: Any
    head_stride: Any
    row_stride: Any


class Staged(NamedTuple):
    """Shared memory of the loads: [stages, 1, 1, rows, dim] each."""

    query: Any
    key: Any
    value: Any
    query2: Any
    key2: Any
    value2: Any


class Shared(NamedTuple):
    """Shared memory of a consumer: the loads' and the result's."""

    query: Any
    key: Any
    value: Any
    out: Any
    query2: Any
    key2: Any
    value2: Any
    out2: Any


class Barriers(NamedTuple):
    """Memory barriers of the stages: full (loaded) and empty (read)."""

    query_full: Any
    query_empty: Any
    key_full: Any
    key_empty: Any
    value_full: Any
    value_empty: Any


class Work(NamedTuple):
    """The tiles that programs share out, and where rows begin and end.

    table: of packed sequences (see `tile_table`). total: tiles. row_tiles: of a head. together: heads worked on at a
    time. heads: of the queries. len_q, len_k: rows and keys. Row i reads keys i + shift - left to i + shift + right.
    """

    table: Any
    total: Any
    row_tiles: Any
    together: Any
    heads: Any
    len_q: Any
    len_k: Any
    shift: Any
    left: Any
    right: Any


class Scaling(NamedTuple):
    """scale: of the scores, in base-2 units (1 with a softcap). cap_in, cap_out: see `capped`."""

    scale: Any
    cap_in: Any
    cap_out: Any


class Tile(NamedTuple):
    """A tile of query rows: batch entry, head, first row in its sequence, where the sequence begins among queries and
    keys, its lengths, and its diagonal."""

    batch: Any
    head: Any
    row: Any
    first_query: Any
    first_key: Any
    len_q: Any
    len_k: Any
    shift: Any


class Rows(NamedTuple):
    """The rows of a consumer in a tile: the first of them, their tile, the tiles of keys loaded before its own, how
    many of its own the consumer skips, and the end of the tiles of keys that it reads."""

    first: Any
    tile: Any
    loaded: Any
    skipped: Any
    end: Any


class State(NamedTuple):
    """Of a consumer's rows, from step to step: the result in two parts, the maxima, the sums, and the weights of the
    last tile of keys, whose product with the values is still to be made."""

    out: Any
    out2: Any
    maximum: Any
    total: Any
    weights: Any
