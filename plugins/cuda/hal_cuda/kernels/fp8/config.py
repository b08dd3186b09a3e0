"""What the FP8 kernel is compiled for, and the groups in which its run-time values are passed between functions."""

from __future__ import annotations

from typing import Any, NamedTuple


class Config(NamedTuple):
    """The compile-time constants of the kernel. Those that the Hopper kernel has too mean the same (see its `Config`).

    Attributes:
        group: query heads of a key head. rows: query rows of a consumer warpgroup. keys: keys of a tile.
        dim_qk, dim_v: head sizes in shared memory, powers of two; what the tensors lack is read as zeros.
        stages, query_stages: shared-memory stages of keys and of values, and of query tiles.
        consumers, turns, named: as in the Hopper kernel. barriers: `stages`.
        two_levels: P V of each tile of keys is summed up by the tensor cores and added to the result in float32. With
            one level the tensor cores, whose sums keep 14 bits, add up all keys; that is for comparison alone.
        apart: P V of a tile follows its Q K^T (see `wide`); halves: in two halves of its columns.
        blocks: scales are per block of `BLOCK` tokens, not per head.
        right, shifted, ragged: as in the Hopper kernel. lse: the log-sum-exp is written. mean: the keys' mean was
            subtracted, and the log-sum-exp is corrected.
        left, packed, bottom, shared_ring: features that this kernel does not have, as shared functions ask for them.
    """

    group: int
    rows: int
    keys: int
    dim_qk: int
    dim_v: int
    stages: int
    query_stages: int
    barriers: int
    consumers: int
    turns: bool
    named: bool
    two_levels: bool
    apart: bool
    halves: bool
    blocks: bool
    right: bool
    shifted: bool
    ragged: bool
    lse: bool
    mean: bool
    left: bool = False
    packed: bool = False
    bottom: bool = False
    shared_ring: bool = False


class Scales(NamedTuple):
    """Pointers to the scales of query, key and value, float32 [batch, heads, blocks] each, to the rows' products with
    the keys' mean, float32 [batch, heads, len_q], and how many scales a head has."""

    query: Any
    key: Any
    value: Any
    mean: Any
    query_blocks: Any
    key_blocks: Any


class Shared(NamedTuple):
    """Shared memory of query, key, value (transposed) and result: [stages, 1, 1, rows, columns] each."""

    query: Any
    key: Any
    value: Any
    out: Any


class State(NamedTuple):
    """Of a consumer's rows, from step to step.

    out: the result without the last tile of keys. factor: what it is multiplied by before that tile's P V is added.
    level: what weights are counted from, in base-2 units. total: sums of weights. weights: of the last tile, four in a
    whole number. key_scale, value_scale: of the next tile. unit: the value scale that `factor` leads to.
    """

    out: Any
    factor: Any
    level: Any
    total: Any
    weights: Any
    key_scale: Any
    value_scale: Any
    unit: Any


class WideState(NamedTuple):
    """The same where P V follows Q K^T: the result in two halves, and nothing of the last tile."""

    out: Any
    out2: Any
    level: Any
    total: Any
    key_scale: Any
    value_scale: Any
    unit: Any
