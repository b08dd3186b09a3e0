"""Fused attention as a movement program: which tiles move where, and what the array and the vector unit do with them.

For every tile of keys and every tile of a block's rows that sees it (`tiling` has the cutting):

    array   S = Q K^T          vector  weights of S, with the largest score and the sum so far
    array   W V                vector  the output so far, faded, plus it

The array takes the next tile's QK^T before this one's WV, so that it does not wait for the vector unit. Scores and
weights stay in L2; DRAM sees query, key, value and output alone. Blocks run on all arrays in step, the costliest first.
"""

from __future__ import annotations

from collections.abc import Sequence

from hal_core.plugin_api import AttentionRequest

from ...profiles.profile import Profile
from ...tiling import DIVIDE, FADE, SUM_BYTES, Round, cut_of, room, rounds, softmax_passes
from ..movement import Builder, Place, Program, Take


def fused(profile: Profile, request: AttentionRequest, planned: Sequence[tuple[Round, int]] | None = None) -> Program:
    """The movement program of a request. Ragged tiles are filled up: they take the time of whole ones.

    Args:
        planned: the rounds that a block plan leaves, of `block_plans.planned_rounds`; None for those of a dense call.
    """
    return _Writer(profile, request).whole(rounds(profile, request) if planned is None else planned)


class _Writer:
    """Writes the rounds of one request into a program; what an instruction moves is that of all active arrays in
    step.
    """

    def __init__(self, profile: Profile, request: AttentionRequest) -> None:
        r, self.cut = request, cut_of(profile, request)
        b = self.cut.blocks
        self.request, self.blocks, self.profile = r, b, profile
        self.block_tiles = self.cut.row_tiles
        two = room(b, r.dim_qk, r.dim_v, self.block_tiles, 2) <= profile.count("buffers.l3")
        self.query_blocks = 2 if two else 1  # the next one is loaded while the other is worked on
        self.passes = softmax_passes(r)
        self.pieces = self._pieces(self.blocks.staged(profile.count("buffers.l2")))
        self.parts = -(-r.dim_v // b.cols)  # array tiles across the value's dimension
        self.active, self.heads, self.turning = b.arrays, b.arrays, False
        self.program = Builder(f"attention {r.describe()}", arrays=b.arrays, dtype=r.dtype)
        self._buffers()
        size, region = b.dtype_bytes, self.program.region
        queries, keys = r.batch * r.heads_q * r.len_q, r.batch * r.heads_kv * r.len_k
        self.base = {
            "queries": region(queries * r.dim_qk * size),
            "keys": region(keys * r.dim_qk * size),
            "values": region(keys * r.dim_v * size),
            "output": region(queries * r.dim_v * size),
        }

    def _pieces(self, most: int) -> list[int]:
        """Lengths of the pieces of dim_qk in which queries and keys pass L2: as few as hold at most so many
        elements.
        """
        dim = self.request.dim_qk
        number = -(-dim // max(most, 1))
        return [dim // number + (i < dim % number) for i in range(number)]

    def _buffers(self) -> None:
        r, b, arrays = self.request, self.blocks, self.blocks.arrays
        size, rows, deep = b.dtype_bytes, self.block_tiles * b.rows, max(self.pieces[0], b.keys)
        for name, level, slots, held in (
            ("queries", "L3", self.query_blocks, rows * r.dim_qk * size),
            ("keys", "L3", 2, b.keys * r.dim_qk * size),
            ("values", "L3", 2, b.keys * r.dim_v * size),
            ("sums", "L3", 1, rows * (r.dim_v + 2) * SUM_BYTES),
            ("output", "L3", self.block_tiles, b.rows * r.dim_v * size),
            ("query", "L2", 2, b.rows * self.pieces[0] * size),
            ("key", "L2", 2, b.cols * self.pieces[0] * size),
            ("value", "L2", 1, b.keys * b.cols * size),
            ("scores", "L2", b.wide + 1, b.rows * b.cols * SUM_BYTES),
            ("weights", "L2", 2, b.rows * b.keys * size),
            ("mixed", "L2", 1, b.rows * b.cols * SUM_BYTES),
            ("row lanes", "L1", 2, b.rows * deep * size),
            ("column lanes", "L1", 2, b.cols * deep * size),
            ("outputs", "PE", 2, 0),
        ):
            self.program.buffer(name, level, slots, held * arrays)  # type: ignore[arg-type]

    def whole(self, all_rounds: Sequence[tuple[Round, int]]) -> Program:
        """All rounds. The output of a block is stored after the first loads of the next, which need not wait for it."""
        unstored: Round | None = None
        for each, times in all_rounds:
            self.active, self.heads = each.active, each.heads
            self._round(each, unstored)
            self.turning = True
            with self.program.loop(times - 1):
                self._round(each, each)
            self.turning, unstored = False, each
        if unstored is not None:
            self._store(unstored)
        return self.program.build()

    def _round(self, each: Round, unstored: Round | None) -> None:
        r, size = self.request, self.blocks.dtype_bytes
        tiles = -(-each.rows // self.blocks.rows)
        self._load("queries", tiles * self.blocks.rows * r.dim_qk * size, 0, ())
        first = True
        for at, seen, count in each.runs():
            if first:
                self._keys(at, ())
                if unstored is not None:
                    self._store(unstored)
                self._scores(release=seen == 1)
                self._rows(seen - 1)
                at, count, first = at + 1, count - 1, False
            with self.program.loop(count):
                self._keys(at, (self.blocks.keys,))
                self._scores(release=seen == 1)
                self._mix(release=True)
                self._rows(seen - 1)
        self._mix(release=True)
        for tile in range(tiles):
            elements = self.active * self.blocks.rows * r.dim_v
            taken = [Take("queries")] if tile == tiles - 1 else []
            self.program.vector(
                taken, "output", operations=DIVIDE * elements, size=elements * (SUM_BYTES + size), label="divide"
            )

    def _rows(self, left: int) -> None:
        """The remaining tiles of rows of a tile of keys."""
        with self.program.loop(left - 1):
            self._scores(release=False)
            self._mix(release=False)
        if left > 0:
            self._scores(release=True)
            self._mix(release=False)

    def _load(self, name: str, size: int, offset: int, steps: tuple[int, ...]) -> None:
        """A tile of each array or key head. steps: how far it moves with the turns of a loop inside the round's."""
        r, pieces = self.request, self.active if name == "queries" else self.heads
        length, dim = (r.len_q, r.dim_qk) if name == "queries" else (r.len_k, r.dim_v if name == "values" else r.dim_qk)
        pitch = max(length * dim * self.blocks.dtype_bytes, size)
        outer = (pieces * pitch,) if self.turning else ()
        place = Place(self.base[name] + offset, size, pieces, pitch, (*outer, *steps))
        self.program.load(name, size * pieces, place=place, label=f"load {name}")

    def _keys(self, tile: int, turns: tuple[int, ...]) -> None:
        r, size = self.request, self.blocks.dtype_bytes
        for name, dim in (("keys", r.dim_qk), ("values", r.dim_v)):
            row = dim * size
            steps = tuple(turn * row for turn in turns)
            self._load(name, self.blocks.keys * row, tile * self.blocks.keys * row, steps)

    def _store(self, each: Round) -> None:
        r, size = self.request, self.blocks.dtype_bytes
        tile, pitch = (
            self.blocks.rows * r.dim_v * size,
            max(r.len_q * r.dim_v * size, self.blocks.rows * r.dim_v * size),
        )
        for number in range(-(-each.rows // self.blocks.rows)):
            base = self.base["output"] + number * tile
            outer = (each.active * pitch,) if self.turning else ()
            place = Place(base, tile, each.active, pitch, outer)
            self.program.store("output", tile * each.active, place=place, label="store output")

    def _scores(self, release: bool) -> None:
        """QK^T of one tile of rows and the held tile of keys, and its weights."""
        b, program = self.blocks, self.program
        size, pairs = b.dtype_bytes * self.active, b.rows * b.keys * self.active
        for column in range(b.wide):
            self._array_tile(release and column == b.wide - 1)
        taken = [Take("scores", offset=offset) for offset in range(b.wide - 1, -1, -1)]
        program.vector(
            taken,
            "weights",
            operations=pairs * self.passes,
            size=pairs * SUM_BYTES + b.rows * b.keys * size,
            label="online softmax",
        )

    def _array_tile(self, release: bool) -> None:
        """QK^T of as many keys as the array has columns."""
        b, program, last = self.blocks, self.program, len(self.pieces) - 1
        size, pairs = b.dtype_bytes * self.active, b.rows * b.cols * self.active
        for number, deep in enumerate(self.pieces):
            ends = number == last
            program.move(Take("queries", keep=True), "query", b.rows * deep * size, mover=0, label="query tile")
            program.move(
                Take("keys", keep=not (ends and release)),
                "key",
                b.cols * deep * size,
                mover=1,
                reorder="transpose",
                label="key tile",
            )
            program.feed_rows("query", "row lanes", b.rows * deep * size, deep)
            program.feed_cols("key", "column lanes", b.cols * deep * size, deep)
            program.compute(
                ["row lanes", "column lanes"],
                "outputs" if ends else (),
                steps=deep,
                total=self.request.dim_qk if ends else 0,
                array=(b.rows, b.cols),
                macs=pairs * deep,
                label="QK^T",
            )
        program.drain("outputs", "scores", pairs * SUM_BYTES, b.cols, label="scores")

    def _mix(self, release: bool) -> None:
        """WV of the oldest weights and the oldest tile of values."""
        b, program = self.blocks, self.program
        size, last = b.dtype_bytes * self.active, self.parts - 1
        for part in range(self.parts):
            wide = min(b.cols, self.request.dim_v - part * b.cols)
            ends, elements = part == last, b.rows * wide * self.active
            program.move(
                Take("values", keep=not (ends and release)), "value", b.keys * wide * size, mover=1, label="value tile"
            )
            program.feed_rows(Take("weights", keep=not ends), "row lanes", b.rows * b.keys * size, b.keys)
            program.feed_cols("value", "column lanes", b.keys * wide * size, b.keys)
            program.compute(
                ["row lanes", "column lanes"],
                "outputs",
                steps=b.keys,
                total=b.keys,
                array=(b.rows, b.cols),
                macs=elements * b.keys,
                label="WV",
            )
            program.drain("outputs", "mixed", elements * SUM_BYTES, b.cols, label="mixed values")
            program.vector("mixed", operations=elements * FADE, size=elements * 3 * SUM_BYTES, label="fade and add")
