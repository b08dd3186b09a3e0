"""Products with a stationary operand: its tiles are shifted into the PEs, the other operand streams past, sums move on.

Written for stationary weights (b). Stationary inputs are the same schedule of the transposed product: a and b, M and N,
rows and columns of the operands change places. Sums over K are added up in L3, or in DRAM where a strip of output does
not
fit there: each part is then loaded again, added to, and stored.
"""

from __future__ import annotations

from ...profiles.profile import Profile
from ..movement import Place, Program
from .product import Product, Tiling, Writer, runs

SUM_BYTES = 4
"""Of an accumulator that is not yet a result."""


def operand_stationary(product: Product, tiling: Tiling, profile: Profile, inputs: bool = False) -> Program:
    """The movement program of a product. `inputs`: a stays instead of b."""
    return _Stationary(product, tiling, profile, inputs).program()


class _Stationary:
    """The streamed operand is x [steps, K], the stationary one w [K, lanes], the output [steps, lanes]."""

    def __init__(self, product: Product, tiling: Tiling, profile: Profile, inputs: bool) -> None:
        rows, cols, _ = profile.arrays(product.dtype)
        self.product, self.tiling, self.array, self.inputs = product, tiling, (rows, cols), inputs
        kind = "is" if inputs else "ws"
        self.writer = Writer(f"{product.M} x {product.N} x {product.K} {kind}", product, tiling, profile)
        self.steps, self.lanes = (product.N, product.M) if inputs else (product.M, product.N)
        self.tall, self.wide = min(rows, product.K), min(cols * tiling.right, self.lanes)
        self.depth = min(tiling.depth, self.steps)
        self._buffers()

    def _buffers(self) -> None:
        t, b, size = self.tiling, self.writer.builder, self.product.size
        x = t.batches * self.depth * self.tall * size
        w = t.batches * self.tall * self.wide * size
        sums, out = (t.batches * self.depth * self.wide * s for s in (SUM_BYTES, self.product.out_size))
        part = max(sums, out)
        rounds = -(-self.product.K // self.array[0])
        self.resident = rounds == 1 or not t.spill
        if rounds > 1 and self.resident:  # in place: its mover alone touches it, in order
            b.buffer("sums L3", "L3", 1, t.batches * self.steps * self.wide * SUM_BYTES)
        if not self.resident:
            b.buffer("part L3", "L3", t.slots, sums)
        for name, level, slots, size in (
            ("x L3", "L3", t.slots, x),
            ("w L3", "L3", t.slots, w),
            ("c L3", "L3", t.slots, part),
            ("x L2", "L2", t.slots, x),
            ("w L2", "L2", t.slots, w),
            ("c L2", "L2", t.slots, sums),
            ("x L1", "L1", t.slots, x),
            ("w L1", "L1", t.slots, w),
            ("sums", "PE", t.slots, sums),
        ):
            b.buffer(name, level, slots, size)  # type: ignore[arg-type]

    def _moves(self, step: int, lane: int, k: int) -> dict[str, int]:
        """How far a, b and c go when the loops go on by so many steps, lanes and elements of K."""
        p = self.product
        down, right = (lane, step) if self.inputs else (step, lane)
        return {
            "a": (down * p.K + k) * p.size,
            "b": (k * p.N + right) * p.size,
            "c": (down * p.N + right) * p.out_size,
        }

    def program(self) -> Program:
        p, t = self.product, self.tiling
        size = t.batches * p.size
        with self.writer.turns(
            -(-p.batch // t.batches), a=size * p.M * p.K, b=size * p.K * p.N, c=t.batches * p.out_size * p.M * p.N
        ):
            for count, lane, wide, _, _ in runs(self.lanes, self.wide):
                with self.writer.turns(count, **self._moves(0, wide, 0)):
                    for number, k, tall, first, last in runs(p.K, self.array[0], True, True):
                        with self.writer.turns(number, **self._moves(0, 0, tall)):
                            self._tile(lane, wide, k, tall, first, last)
        return self.writer.build()

    def _tile(self, lane: int, wide: int, k: int, tall: int, first_k: bool, last_k: bool) -> None:
        """One stationary tile, and everything that streams past it."""
        t, writer = self.tiling, self.writer
        b, size = writer.builder, self.product.size * t.batches * tall * wide
        place = writer.place("a", lane, k, wide, tall) if self.inputs else writer.place("b", k, lane, tall, wide)
        b.load("w L3", place.bytes, channel=1, place=place)
        b.move("w L3", "w L2", size, mover=1, reorder="transpose" if self.inputs else "identity")
        b.feed_cols("w L2", "w L1", size, self.array[0])
        for count, step, deep, first, last in runs(self.steps, self.depth, True, True):
            with writer.turns(count, **self._moves(deep, 0, 0), sums=t.batches * deep * wide * SUM_BYTES):
                self._part(step, deep, lane, wide, k, tall, first, last, first_k, last_k)

    def _part(
        self,
        step: int,
        deep: int,
        lane: int,
        wide: int,
        k: int,
        tall: int,
        first: bool,
        last: bool,
        first_k: bool,
        last_k: bool,
    ) -> None:
        """`deep` vectors past one stationary tile."""
        p, t, writer, array = self.product, self.tiling, self.writer, self.array
        b, size = writer.builder, p.size * t.batches * deep * tall
        share = p.a_share if not self.inputs else 1.0
        place = writer.place("b", k, step, tall, deep) if self.inputs else writer.place("a", step, k, deep, tall, share)
        b.load("x L3", place.bytes, channel=0, place=place)
        b.move("x L3", "x L2", size, mover=0, reorder="shuffle" if share < 1 else "identity")
        b.feed_rows("x L2", "x L1", size, deep)
        b.compute(
            ("x L1", "w L1") if first else ("x L1",),
            "sums",
            steps=deep,
            total=self.steps if last else 0,
            preload=array[0] if first else 0,
            held=array[0] if last else 0,
            array=array,
            macs=t.batches * deep * tall * wide,
        )
        sums, out = (t.batches * deep * wide * each for each in (SUM_BYTES, p.out_size))
        b.drain("sums", "c L2", sums, deep)
        row, col, rows, cols = (lane, step, wide, deep) if self.inputs else (step, lane, deep, wide)
        result = writer.place("c", row, col, rows, cols)
        if self.resident and not last_k:
            b.move("c L2", (), sums, mover=2, label="add up")
        elif self.resident or (first_k and last_k):
            b.move("c L2", "c L3", out, mover=2)
            b.store("c L3", out, channel=2, place=result, late=True)
        else:
            part = writer.scratch(step * t.batches * wide * SUM_BYTES, sums)
            self._through_dram(part, result, first_k, last_k)

    def _through_dram(self, part: Place, result: Place, first_k: bool, last_k: bool) -> None:
        """Add a part to what lies in DRAM."""
        b = self.writer.builder
        if not first_k:
            b.load("part L3", part.bytes, channel=3, place=part)
        place = result if last_k else part
        b.move(("c L2",) if first_k else ("c L2", "part L3"), "c L3", place.bytes, mover=2, label="add up")
        b.store("c L3", place.bytes, channel=2, place=place, late=True)
