"""What the masked Hopper kernel is compiled for, and the groups in which its run-time values are passed between
functions.

Names that the functions of `hopper` read mean what they mean there; see `hopper.config`. The order of a group's fields
is the order in which the values enter a warpgroup's partition; it is part of the generated code.
"""

from __future__ import annotations

from typing import Any, NamedTuple


class Config(NamedTuple):
    """The compile-time constants of the kernel.

    Attributes:
        group: query heads of a key head. rows: query rows of a consumer warpgroup. keys: keys of a tile.
        dim_qk, dim_v: head sizes as the kernel computes them, 64, 128 or 256; what a tensor lacks is read as zeros.
        stages: shared-memory stages of keys, of their mask and of values. query_stages: of query tiles.
        consumers: warpgroups that compute, 1 or 2. turns, named, own_output, held, lazy: as in the Hopper kernel.
        left, right: rows begin, or end, at a diagonal. ragged: a tile may reach past the last key.
        softcap: scores are capped. lse, natural_lse: the log-sum-exp is written, of maxima in base-2 or natural units.
        mask: 0: none. 1: boolean. 2: additive; scores then stay in natural units. of_keys: it runs over keys, not over
            rows, and is read by pointer; else its tiles come with those of the keys.
        per_block: tiles of keys in a block of a block plan; 0 without a plan.
    """

    group: int
    rows: int
    keys: int
    dim_qk: int
    dim_v: int
    stages: int
    query_stages: int
    consumers: int
    turns: bool
    named: bool
    own_output: bool
    held: bool
    lazy: bool
    left: bool
    right: bool
    ragged: bool
    softcap: bool
    lse: bool
    natural_lse: bool
    mask: int
    of_keys: bool
    per_block: int
    # What this kernel has one kind of.
    dim_qk2: int = 0
    dim_v2: int = 0
    packed: bool = False

    @property
    def barriers(self) -> int:
        """Barriers of the stages."""
        return self.stages

    @property
    def value_columns(self) -> int:
        """Columns of the values that the kernel computes."""
        return self.dim_v

    @property
    def tiled(self) -> bool:
        """Whether a tile of the mask comes with each tile of keys."""
        return self.mask > 0 and not self.of_keys

    @property
    def edges(self) -> bool:
        """Whether a tile may be cut by a diagonal or the last key."""
        return self.left or self.right or self.ragged


class Inputs(NamedTuple):
    """Tensor maps of query, key and value, [batch, heads, length, dim], and of a mask over rows and keys, [batch or 1,
    heads or 1, rows, keys]."""

    query: Any
    key: Any
    value: Any
    mask: Any


class Staged(NamedTuple):
    """Shared memory: query [stages * consumers, 1, 1, rows, dim], key, value [stages, 1, 1, keys, dim], a mask [stages
    * consumers, 1, 1, rows, keys], the result."""

    query: Any
    key: Any
    value: Any
    mask: Any
    out: Any
    out2: Any


class Output(NamedTuple):
    """The result's tensor map and the log-sum-exp, float32 [batch, heads, len_q]; as `hopper.result` names them."""

    map: Any
    map2: Any
    lse: Any


class Lists(NamedTuple):
    """What is read beside query, key and value.

    mask: of keys, by pointer. mask_b, mask_h: its strides; of a mask over rows and keys 1 where it runs over batch
    entries, over heads, else 0. indices, counts: of a block plan, int32. index_b, index_h, index_m: strides of batch
    entries, heads and query blocks; count_b, count_h: the same of counts. tiles: row tiles in a query block.
    blocks: key blocks that there are.
    """

    mask: Any
    mask_b: Any
    mask_h: Any
    indices: Any
    counts: Any
    index_b: Any
    index_h: Any
    index_m: Any
    count_b: Any
    count_h: Any
    tiles: Any
    blocks: Any


class Row(NamedTuple):
    """The tiles of keys that a tile of rows reads.

    at: address of their list, with a plan. count: how many, at least one. last: without a plan, the end of their range,
    from which they are walked backwards.
    """

    at: Any
    count: Any
    last: Any


class State(NamedTuple):
    """Of a consumer's rows, from step to step: the result, the maxima, the sums, and the weights of the last tile of
    keys, whose product with the values is still to be made."""

    out: Any
    maximum: Any
    total: Any
    weights: Any
