"""Output-stationary products: sums stay in the PEs over all of K, tiles of a and b stream by.

One operand's panel may stay in L3 while the other operand streams past it: every tile of the panel goes to the end of
its queue after use, until the last use frees it. A tile of output leaves while the next one is computed.
"""

from __future__ import annotations

import attrs

from ...profiles.profile import Profile
from ..movement import Level, Program, Take
from .product import Product, Tiling, Writer, runs


def output_stationary(product: Product, tiling: Tiling, profile: Profile) -> Program:
    """The movement program of a product."""
    return _Outputs(product, tiling, profile).program()


class _Outputs:
    """x is the operand that stays (outer loop), y the one that streams (inner loop)."""

    def __init__(self, product: Product, tiling: Tiling, profile: Profile) -> None:
        rows, cols, _ = profile.arrays(product.dtype)
        self.array = rows, cols
        self.product, self.tiling = product, tiling
        self.writer = Writer(f"{product.M} x {product.N} x {product.K} os", product, tiling, profile)
        self.tall, self.wide = min(rows * tiling.down, product.M), min(cols * tiling.right, product.N)
        self.by_rows = tiling.stays == "a"
        self.extent = (product.M, product.N) if self.by_rows else (product.N, product.M)
        self.lanes = (self.tall, self.wide) if self.by_rows else (self.wide, self.tall)
        self.depth = min(tiling.depth, product.K)
        self._buffers()

    def _buffers(self) -> None:
        p, t, b = self.product, self.tiling, self.writer.builder
        a, w = t.batches * self.tall * self.depth * p.size, t.batches * self.wide * self.depth * p.size
        out = t.batches * self.tall * self.wide * p.out_size
        pieces = -(-p.K // self.depth)
        staying, streaming = max(1, t.panel * pieces) * t.slots, (pieces if t.panel > 1 else 1) * t.slots
        a_slots, w_slots = (staying, streaming) if self.by_rows else (streaming, staying)
        for name, level, slots, size in (
            ("a L3", "L3", a_slots, a),
            ("b L3", "L3", w_slots, w),
            ("c L3", "L3", t.slots, out),
            ("a L2", "L2", t.slots, a),
            ("b L2", "L2", t.slots, w),
            ("c L2", "L2", t.slots, out),
            ("a L1", "L1", t.slots, a),
            ("b L1", "L1", t.slots, w),
            ("sums", "PE", t.slots, out),
            *(self._epilogue_buffers(out) if p.epilogue else ()),
        ):
            b.buffer(name, level, slots, size)

    def _share(self, total: int, outputs: int) -> int:
        """Of a total over all results, the part of a tile of so many."""
        return -(-total * outputs // (self.product.batch * self.product.M * self.product.N))

    def _epilogue_buffers(self, out: int) -> list[tuple[str, Level, int, int]]:
        found: list[tuple[str, Level, int, int]] = [("done L2", "L2", self.tiling.slots, out)]
        if self.product.extra:
            beside = self._share(self.product.extra, self.tiling.batches * self.tall * self.wide)
            found += [("beside L3", "L3", self.tiling.slots, beside), ("beside L2", "L2", self.tiling.slots, beside)]
        return found

    def _moves(self, x: int, y: int) -> dict[str, int]:
        """How far a, b and c go when the loops go on by x lanes of the staying and y of the streaming operand."""
        p = self.product
        down, right = (x, y) if self.by_rows else (y, x)
        return {"a": down * p.K * p.size, "b": right * p.size, "c": (down * p.N + right) * p.out_size}

    def program(self) -> Program:
        p, t = self.product, self.tiling
        rounds = -(-p.batch // t.batches)
        size = t.batches * p.size
        block = self.lanes[0] * max(1, t.panel)
        with self.writer.turns(rounds, a=size * p.M * p.K, b=size * p.K * p.N, c=t.batches * p.out_size * p.M * p.N):
            for count, start, extent, _, _ in runs(self.extent[0], block):
                with self.writer.turns(count, **self._moves(extent, 0)):
                    self._block(start, extent)
        return self.writer.build()

    def _block(self, start: int, extent: int) -> None:
        """A panel of the staying operand against all of the streaming one."""
        stays = self.tiling.panel > 0
        for count, y, wide, first_y, last_y in runs(self.extent[1], self.lanes[1], stays, stays):
            with self.writer.turns(count, **self._moves(0, wide)):
                again = self.tiling.panel > 1
                for number, x, tall, first_x, last_x in runs(extent, self.lanes[0], again, again):
                    with self.writer.turns(number, **self._moves(tall, 0)):
                        use = _Use(not stays or first_y, not again or first_x, not stays or last_y, not again or last_x)
                        self._tile(start + x, y, tall, wide, use)

    def _tile(self, x: int, y: int, tall: int, wide: int, use: _Use) -> None:
        """One tile of output for every array."""
        p, t, b = self.product, self.tiling, self.writer.builder
        row, col, rows, cols = (x, y, tall, wide) if self.by_rows else (y, x, wide, tall)
        if not self.by_rows:
            use = _Use(use.load_y, use.load_x, use.free_y, use.free_x)
        for count, k, depth, _, last in runs(p.K, self.depth, last=True):
            with self.writer.turns(count, a=depth * p.size, b=depth * p.N * p.size):
                self._piece(row, col, rows, cols, k, depth, p.K if last else 0, use)
        out = t.batches * rows * cols * p.out_size
        b.drain("sums", "c L2", out, self.array[0])
        if p.epilogue:
            self._epilogue(t.batches * rows * cols, out)
        b.move("done L2" if p.epilogue else "c L2", "c L3", out, mover=2)
        b.store("c L3", out, channel=2, place=self.writer.place("c", row, col, rows, cols), late=True)

    def _epilogue(self, outputs: int, out: int) -> None:
        """The vector units on a tile of results in L2, with what they read beside it."""
        p, b = self.product, self.writer.builder
        takes, beside = ["c L2"], self._share(p.extra, outputs)
        if beside:
            b.load("beside L3", beside, channel=3, place=self.writer.beside(beside))
            b.move("beside L3", "beside L2", beside, mover=3)
            takes.append("beside L2")
        b.vector(takes, "done L2", operations=self._share(p.epilogue, outputs), size=2 * out + beside)

    def _piece(self, row: int, col: int, rows: int, cols: int, k: int, depth: int, total: int, use: _Use) -> None:
        """`depth` elements of K of one tile. `total`: all of K with the last piece."""
        p, t, w = self.product, self.tiling, self.writer
        b = w.builder
        places = {"a": w.place("a", row, k, rows, depth, p.a_share), "b": w.place("b", k, col, depth, cols)}
        wanted = [which for which, load in (("a", use.load_x), ("b", use.load_y)) if load]
        if len(wanted) == 2:
            with b.together():
                for channel, which in enumerate(wanted):
                    b.load(f"{which} L3", places[which].bytes, channel=channel, place=places[which])
        for which in wanted if len(wanted) == 1 else ():
            b.load(f"{which} L3", places[which].bytes, channel="ab".index(which), place=places[which])
        a, v = t.batches * rows * depth * p.size, t.batches * cols * depth * p.size
        gathers = "shuffle" if p.a_share < 1 else "identity"
        b.move(Take("a L3", again=not use.free_x), "a L2", a, mover=0, reorder=gathers)  # type: ignore[arg-type]
        b.move(Take("b L3", again=not use.free_y), "b L2", v, mover=1)
        b.feed_rows("a L2", "a L1", a, depth)
        b.feed_cols("b L2", "b L1", v, depth)
        macs = t.batches * rows * cols * depth
        b.compute(("a L1", "b L1"), "sums" if total else (), steps=depth, total=total, array=self.array, macs=macs)


@attrs.frozen
class _Use:
    """Whether a tile loads x and y, and whether it is the last to use them."""

    load_x: bool
    load_y: bool
    free_x: bool
    free_y: bool
