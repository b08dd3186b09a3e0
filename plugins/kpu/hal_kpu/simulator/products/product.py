"""A matrix product as the machine sees it: which arrays share it, in which tiles, over which loops."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Literal

import attrs

from ...profiles.profile import Profile
from ..movement import Builder, Place, Program

Stays = Literal["a", "b"]


@attrs.frozen(kw_only=True)
class Product:
    """`batch` products of [M, K] by [K, N], row-major in DRAM.

    Attributes:
        dtype: of the operands. size, out_size: bytes of an operand's and of a result's element.
        a_share: bytes of a in DRAM over M x K elements; below 1 where windows of a convolution overlap.
        epilogue: vector operations on all results as they leave the arrays. extra: bytes that these read beside them.
    """

    batch: int
    M: int
    N: int
    K: int
    dtype: str = "float32"
    size: int = 4
    out_size: int = 4
    a_share: float = 1.0
    epilogue: int = 0
    extra: int = 0

    @property
    def macs(self) -> int:
        return self.batch * self.M * self.N * self.K


@attrs.frozen(kw_only=True)
class Tiling:
    """How a product is cut.

    Attributes:
        batches, down, right: arrays that work on different products, on tiles below and beside each other.
        depth: elements of K (or rows of the streamed operand, where an operand is stationary) in one piece.
        stays: the operand whose panel stays in L3 while the other streams. panel: its height in tiles; 0: none stays.
        slots: 2 for double buffers, 1 for single ones.
        spill: with a stationary operand, sums over K are added up in DRAM, not in L3.
    """

    batches: int
    down: int
    right: int
    depth: int
    stays: Stays = "a"
    panel: int = 0
    slots: int = 2
    spill: bool = False

    @property
    def arrays(self) -> int:
        return self.batches * self.down * self.right


def spread(batch: int, down: int, right: int, arrays: int) -> tuple[int, int, int]:
    """(batches, down, right) arrays for batch x down x right tiles: fewest rounds, then fewest arrays, then square."""
    if arrays == 1:
        return 1, 1, 1
    best: tuple[float, ...] = ()
    found = (1, 1, 1)
    for high in range(1, min(down, arrays) + 1):
        wide = min(right, arrays // high)
        wide = -(-right // -(-right // wide))  # no wider than the rounds need
        together = min(batch, arrays // (high * wide))
        together = -(-batch // -(-batch // together))
        rounds = -(-down // high) * -(-right // wide) * -(-batch // together)
        rank = (rounds, high * wide * together, abs(high - wide))
        if not best or rank < best:
            best, found = rank, (together, high, wide)
    return found


class Writer:
    """A builder that knows where a, b and c lie and how far the open loops move each of them."""

    def __init__(self, name: str, product: Product, tiling: Tiling, profile: Profile) -> None:
        self.product, self.tiling, self.profile = product, tiling, profile
        self.builder = Builder(name, tiling.arrays, product.dtype)
        p = product
        sizes = {
            "a": p.batch * p.M * p.K * p.size,
            "b": p.batch * p.K * p.N * p.size,
            "c": p.batch * p.M * p.N * p.out_size,
        }
        if p.extra:
            sizes["extra"] = p.extra
        self.base = {name: self.builder.region(size) for name, size in sizes.items()}
        self._steps: list[tuple[int, int, int, int]] = []
        self._counts: list[int] = []

    @contextmanager
    def turns(self, count: int, a: int = 0, b: int = 0, c: int = 0, sums: int = 0) -> Iterator[None]:
        """A loop that moves a, b, c and sums by so many bytes in each turn; no loop where it turns once."""
        with ExitStack() as stack:
            if count != 1:
                stack.enter_context(self.builder.loop(count))
                self._steps.append((a, b, c, sums))
                self._counts.append(count)
            yield
            if count != 1:
                self._steps.pop()
                self._counts.pop()

    def place(
        self, which: Literal["a", "b", "c"], row: int, col: int, rows: int, cols: int, share: float = 1.0
    ) -> Place:
        """A tile of rows x cols of one product, from (row, col) on, for all the products that run at once."""
        p = self.product
        width = {"a": p.K, "b": p.N, "c": p.N}[which]
        size = p.out_size if which == "c" else p.size
        base = self.base[which] + (row * width + col) * size
        steps = tuple(step["abc".index(which)] for step in self._steps)
        counts = tuple(self._counts)
        rows *= self.tiling.batches
        if share < 1:  # gathered windows: fewer bytes, one after the other
            return Place(base, max(1, round(rows * cols * size * share)), 1, 0, steps, counts)
        if cols == width:
            return Place(base, rows * cols * size, 1, 0, steps, counts)
        return Place(base, cols * size, rows, width * size, steps, counts)

    def beside(self, size: int) -> Place:
        """What an epilogue reads for a tile: contiguous, tile after tile, as far as it reaches."""
        counts, steps, step = tuple(self._counts), [0] * len(self._counts), size
        for index in range(len(steps) - 1, -1, -1):
            steps[index], step = step, step * counts[index]
        return Place(self.base["extra"], size, 1, 0, tuple(steps), counts)

    def scratch(self, offset: int, size: int) -> Place:
        """`size` bytes of sums that are not yet results, without gaps, in a region of their own."""
        p = self.product
        if "sums" not in self.base:
            self.base["sums"] = self.builder.region(p.batch * max(p.M, p.N) * 4096 * 4)
        return Place(
            self.base["sums"] + offset, size, 1, 0, tuple(step[3] for step in self._steps), tuple(self._counts)
        )

    def build(self) -> Program:
        return self.builder.build()


def runs(total: int, size: int, first: bool = False, last: bool = False) -> Iterator[tuple[int, int, int, bool, bool]]:
    """Tiles of `size` that cover `total`, those alike together: (count, start, size, is first, is last).

    first, last: whether the first and the last tile are to stand alone; a ragged last one always does.
    """
    number = -(-total // size)
    ragged = total % size
    alone_last = (last or ragged > 0) and number > 1
    alone_first = first and number > 1
    middle = number - alone_first - alone_last
    if alone_first:
        yield 1, 0, size, True, False
    if middle > 0:
        whole = size if number > 1 or not ragged else ragged
        yield middle, alone_first * size, whole, number == 1, number == 1
    if alone_last:
        yield 1, (number - 1) * size, ragged or size, False, True
