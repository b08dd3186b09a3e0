"""How attention is cut: tiles of a dense call, and the blocks that a sparse call reads."""

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple, Self

from .errors import ContractError, refuse
from .request import AttentionRequest

Span = tuple[int, int]  # start, stop
Rows = tuple[int, int, tuple[Span, ...]]  # query rows start, stop, and the key ranges that they read


class Tile(NamedTuple):
    """Rows q_start to q_stop against keys k_start to k_stop (stop excluded).

    `full` says that causal and window leave every pair visible, so no mask needs to be built.
    """

    q_start: int
    q_stop: int
    k_start: int
    k_stop: int
    full: bool


def visible_keys(request: AttentionRequest, row: int, len_q: int, len_k: int) -> Span:
    """The keys [start, stop) that causal and window leave to query row `row`; start >= stop means none."""
    return TilePlan(len_q, len_k, 0, 0, request.band(len_q, len_k)).visible(row)


class TilePlan(NamedTuple):
    """Row ranges that partition the query rows, each with its key ranges in order, possibly none.

    Equal blocks store nothing: ranges are computed when they are read, without what causal and window hide.

    Attributes:
        len_q, len_k: lengths that the plan is for. block_q, block_k: sizes of equal blocks; 0 for uneven ranges.
        band: (low, high): row i reads keys i + low to i + high; None for no bound.
        cut_by: who cuts: the backend's name, "torch" or "driver" where a library cuts by itself.
        ranges: the uneven ranges; None for equal blocks.
    """

    len_q: int
    len_k: int
    block_q: int
    block_k: int
    band: tuple[int | None, int | None]
    cut_by: str = ""
    ranges: tuple[Rows, ...] | None = None

    @classmethod
    def equal(cls, request: AttentionRequest, block_q: int, block_k: int, *, cut_by: str = "") -> Self:
        """Blocks of block_q query rows and block_k keys, the last ones shorter."""
        refuse((min(block_q, block_k) < 1, f"tiles of {block_q} x {block_k} were given: use 1 or more"))
        return cls(request.len_q, request.len_k, block_q, block_k, request.band(request.len_q, request.len_k), cut_by)

    @classmethod
    def uneven(cls, request: AttentionRequest, rows: Iterable[Rows], *, cut_by: str = "") -> Self:
        """Ranges of any size: (q_start, q_stop, ((k_start, k_stop), ...)) in order."""
        return cls(request.len_q, request.len_k, 0, 0, request.band(request.len_q, request.len_k), cut_by, tuple(rows))

    def visible(self, row: int) -> Span:
        """The keys [start, stop) that causal and window leave to a query row; start >= stop means none."""
        low, high = self.band
        stop = self.len_k if high is None else min(row + high + 1, self.len_k)
        return 0 if low is None else max(row + low, 0), max(stop, 0)

    def rows(self) -> Iterator[Rows]:
        """(q_start, q_stop, key ranges) in order; a range without keys is given too, because its rows are written."""
        if self.ranges is not None:
            yield from self.ranges
            return
        block_k = self.block_k
        for q_start in range(0, self.len_q, self.block_q):
            q_stop = min(q_start + self.block_q, self.len_q)
            first, last = self.visible(q_start)[0] // block_k * block_k, self.visible(q_stop - 1)[1]
            yield q_start, q_stop, tuple((k, min(k + block_k, self.len_k)) for k in range(first, last, block_k))

    def tiles(self) -> Iterator[Tile]:
        """The tiles in the order to run them: by rows, then keys."""
        for q_start, q_stop, spans in self.rows():
            first, last = self.visible(q_start), self.visible(q_stop - 1)
            for start, stop in spans:
                yield Tile(q_start, q_stop, start, stop, full=last[0] <= start and stop <= first[1])

    def check(self, name: str) -> None:
        """Raise ContractError for the first pair of query and key that is left out or read twice by tiling `name`."""
        expected = 0
        for q_start, q_stop, spans in self.ranges or ():
            if q_start != expected or q_stop <= q_start:
                raise ContractError(
                    f"tiling {name!r}: rows {q_start} to {q_stop} follow row {expected}: "
                    f"partition the {self.len_q} query rows in order"
                )
            expected, before = q_stop, 0
            reached, last = self.visible(q_start)[0], self.visible(q_stop - 1)[1]
            for start, stop in spans:
                if not 0 <= start < stop <= self.len_k:
                    raise ContractError(f"tiling {name!r}: keys {start} to {stop} of {self.len_k} were given")
                if start < before:
                    raise ContractError(f"tiling {name!r} reads the pair of query {q_start} and key {start} twice")
                if start > reached:
                    break
                before, reached = stop, max(stop, reached)
            if reached < last:
                raise ContractError(f"tiling {name!r} leaves out the pair of query {q_stop - 1} and key {reached}")
        if self.ranges is not None and expected != self.len_q:
            raise ContractError(f"tiling {name!r} leaves out query {expected} of {self.len_q}")

    def __str__(self) -> str:
        cut = f"{self.block_q} x {self.block_k}" if self.ranges is None else f"{len(self.ranges)} uneven row ranges"
        return f"tiles of {cut} over {self.len_q} x {self.len_k}, cut by {self.cut_by or 'nobody'}"


class BlockPlan(NamedTuple):
    """Block-sparse attention: which key blocks each query block reads.

    Attributes:
        block_q, block_k: tokens in a block.
        indices: int32 [batch or 1, heads or 1, query blocks, max_blocks], key-block numbers; entries past the count are
            ignored. counts: int32 [batch or 1, heads or 1, query blocks].
    """

    block_q: int
    block_k: int
    indices: Any
    counts: Any
