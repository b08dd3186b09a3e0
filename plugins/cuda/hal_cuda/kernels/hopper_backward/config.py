"""What the Hopper backward is compiled for, and the groups in which its run-time values are passed between functions.

The order of a group's fields is the order in which the values enter a warpgroup's partition; it is part of the
generated code.
"""

from __future__ import annotations

from typing import Any, NamedTuple


class Config(NamedTuple):
    """The compile-time constants of the kernel.

    Attributes:
        group: query heads of a key head. keys: keys of a block. rows: query rows of a tile.
        dim_qk, dim_v: head sizes as the kernel computes them, 64, 128, 192, 256; what a tensor lacks is read as zeros.
        stages: shared-memory stages of queries and of the output's gradient. score_stages: of the scores' gradients.
        turns: the two consumer warpgroups take turns at the tensor cores.
        engine: the copy engine adds the query's gradient to global memory, else each thread does.
        right, left: keys end, or begin, at a diagonal. ragged: the last block of keys may be cut short.
        softcap: scores are capped.
        ordered: blocks of keys add to a tile of the query's gradient in the order of their numbers, the last first, so
            that the sums are the same in every run. With `engine` alone.
        padded: a mask says of each key whether any row reads it.
        per_block: tiles in a row block of a block plan; 0 without a plan. Not for `wide`, nor `ordered`.
        mask: 1: a boolean one, 2: an additive one, both of rows and keys; 0: neither.
        dropout: not with an additive mask, nor for `wide`.
        staging: tiles of the query's gradient that wait in shared memory for their turn, where `ordered`.
    """

    group: int
    keys: int
    rows: int
    dim_qk: int
    dim_v: int
    stages: int
    score_stages: int
    turns: bool
    engine: bool
    right: bool
    left: bool
    ragged: bool
    softcap: bool
    ordered: bool = False
    padded: bool = False
    per_block: int = 0
    mask: int = 0
    dropout: bool = False
    staging: int = 1

    @property
    def statistics(self) -> int:
        """Numbers of each row, see `Maps`: a power of two."""
        return 4 if self.mask == 2 or self.dropout else 2

    @property
    def planned(self) -> bool:
        """Whether the tiles that a block meets are listed, see `Lists`."""
        return self.per_block > 0

    @property
    def space_qk(self) -> int:
        """Columns that a row of queries or keys takes in shared memory: a power of two, as Gluon's shapes are."""
        return 256 if self.dim_qk > 128 else self.dim_qk

    @property
    def space_v(self) -> int:
        """As `space_qk`, of values."""
        return 256 if self.dim_v > 128 else self.dim_v

    @property
    def wide(self) -> bool:
        """Whether one consumer computes the weights and the value's gradient, the other the scores' and the key's."""
        return self.dim_qk > 128


class Maps(NamedTuple):
    """Tensor maps. query, grad_out, key, value, grad_key, grad_value: [batch, heads, length, dim]; statistics: float32
    [batch * heads * tiles * 2, rows], a tile's log-sum-exp (base 2) and its `delta`; under an additive mask
    [batch * heads * tiles * 4, rows]: the log-sum-exp natural, then `delta`, and the weights' correction (the third of
    the portable kernels' `numbers`); with dropout as many, the third and fourth the row's words; mask:
    [batch or 1, heads or 1, rows, keys]; sums: the float32 sums of the query's gradient, 256 numbers a row."""

    query: Any
    grad_out: Any
    statistics: Any
    key: Any
    value: Any
    grad_key: Any
    grad_value: Any
    sums: Any
    mask: Any


class Shared(NamedTuple):
    """Shared memory: the loads', scores' gradients [stages, keys, rows], halves of tiles of the query's gradient; and,
    where `wide`, weights [2, keys, rows] in float16."""

    query: Any
    grad_out: Any
    statistics: Any
    key: Any
    value: Any
    grad_scores: Any
    grad_query: Any
    mask: Any
    weights: Any


class Barriers(NamedTuple):
    """Memory barriers: key, value, and of each stage the query, the output's gradient, `done` when both consumers have
    ended its step, and `scored` when both have written the scores' gradient. Where sums are added in order, `ready`:
    each consumer's half of a waiting tile lies in shared memory; `free`: both have been read. `passed`, where `wide`:
    the weights of a step lie in shared memory."""

    key: Any
    value: Any
    query: Any
    grad_out: Any
    done: Any
    scored: Any
    ready: Any
    free: Any
    passed: Any


class Order(NamedTuple):
    """The order in which blocks add to a tile of the query's gradient.

    arrivals: int32 [batch * heads * tiles], how many blocks have added to each. blocks: of a key head.
    """

    arrivals: Any
    blocks: Any


class Lists(NamedTuple):
    """What is read of some keys alone.

    visible: bytes, at batch entry * visible_b + key, where `padded`: 0 hides the key from all rows. indices, counts:
    with a block plan, int32 at batch entry * list_b + query head * list_h + its key block (times `rows`, of indices):
    the row blocks that list a key block, and how many. rows: row blocks of the plan. blocks: of the kernel in a key
    block. mask_b, mask_h: 1 where `Maps.mask` runs over batch entries, over heads.
    """

    visible: Any
    visible_b: Any
    indices: Any
    counts: Any
    list_b: Any
    list_h: Any
    rows: Any
    blocks: Any
    mask_b: Any
    mask_h: Any


class Edges(NamedTuple):
    """Query row i reads keys from i + below to i + above, none from len_k on."""

    len_k: Any
    below: Any
    above: Any


class Scaling(NamedTuple):
    """scale: of the scores, in base-2 units but under an additive mask. out_scale: of the gradients. cap_in, cap_out:
    as in the forward. kept: 1 / (1 - the probability of dropout). least: the 16 bits of a pair from which on dropout
    keeps it.
    """

    scale: Any
    out_scale: Any
    cap_in: Any
    cap_out: Any
    kept: Any
    least: Any


class Block(NamedTuple):
    """A block of keys and the tiles of query rows that read it.

    number: of the block among those of a key head. key: the first key. place: batch entry * heads + key head; heads:
    of the keys. first: the first tile. count: tiles, at least one. begun, ended: tiles from `begun` to `ended` meet no
    edge. tiles: of a query head. steps: tiles of all query heads of the group; with a plan `first` is 0, and they are
    listed.
    """

    number: Any
    key: Any
    place: Any
    heads: Any
    first: Any
    count: Any
    begun: Any
    ended: Any
    tiles: Any
    steps: Any
