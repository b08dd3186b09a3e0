"""Fused attention as a movement program: which tiles move where, and what the array and the vector unit do with them.

An array works through one block of query rows of one head at a time. A block holds as many rows as its L3 has room for, so
that a tile of keys and values comes from DRAM once for all of them. For every tile of keys and every tile of rows that sees it:

    array   S = Q K^T          vector  weights of S, with the largest score and the sum so far
    array   W V                vector  the output so far, faded, plus it

The array takes the next tile's QK^T before this one's WV, so that it does not wait for the vector unit. Scores and weights stay
in L2; DRAM sees query, key, value and output alone. Blocks of different heads run on all arrays in step, the costliest first.
"""

from __future__ import annotations

from itertools import groupby
from typing import NamedTuple

import attrs

from hal_core import AttentionRequest
from hal_core.request import DTYPE_BYTES

from .movement import Builder, Place, Program, Take
from .profile import Profile

_SUM_BYTES = 4  # float32, what the processing elements and the vector unit keep
#: Operations of the vector unit on one score: scale, largest, difference, exponential (6), sum. A mask adds 1, a cap 8.
_SOFTMAX, _MASK, _CAP = 10, 1, 8
#: On one element of the output: fade and add with every tile of keys, divide at the end.
_FADE, _DIVIDE = 2, 1


@attrs.frozen
class Blocks:
    """How attention is cut for one kind of array.

    Attributes:
        rows, cols: of the array: query rows and keys of a tile of scores. arrays: how many work at once.
        dtype_bytes: of an operand.
    """

    rows: int
    cols: int
    arrays: int
    dtype_bytes: int

    @classmethod
    def of(cls, profile: Profile, dtype: str) -> Blocks:
        return cls(*profile.arrays(dtype), DTYPE_BYTES[dtype])


def room(blocks: Blocks, dim_qk: int, dim_v: int, row_tiles: int = 1) -> int:
    """Bytes of L3 beside one array that a query block of `row_tiles` tiles needs.

    Two blocks of queries, two tiles of keys and two of values (one is loaded while the other is read); the unnormalised output
    and two float32 sums a row; the finished output, which waits to be stored.
    """
    b, rows = blocks.dtype_bytes, row_tiles * blocks.rows
    held = rows * (2 * dim_qk * b + dim_v * (_SUM_BYTES + b) + 2 * _SUM_BYTES)
    return held + 2 * blocks.cols * (dim_qk + dim_v) * b


def longest_head(profile: Profile, dtype: str) -> int:
    """The largest head_dim, of keys and values alike, whose smallest query block fits the L3."""
    blocks, held = Blocks.of(profile, dtype), profile.count("buffers.l3")
    fixed = room(blocks, 0, 0)
    return max((held - fixed) // (room(blocks, 1, 1) - fixed), 0)


def row_tiles(profile: Profile, request: AttentionRequest) -> int:
    """Tiles of rows in a query block: as many as fit the L3, fewer where arrays would be left without work; equal blocks."""
    r, blocks, held = request, Blocks.of(profile, request.dtype), profile.count("buffers.l3")
    one = room(blocks, r.dim_qk, r.dim_v)
    fit = (held - one) // (room(blocks, r.dim_qk, r.dim_v, 2) - one) + 1
    tiles, heads = -(-r.len_q // blocks.rows), max(r.batch * r.heads_q, 1)
    wanted = max(-(-blocks.arrays // heads), 1)  # blocks of each head
    most = max(min(fit, -(-tiles // wanted)), 1)
    return max(-(-tiles // max(-(-tiles // most), 1)), 1)


class Round(NamedTuple):
    """What all arrays do in step. Where their blocks differ, each does, and counts, what the costliest of them does.

    Attributes:
        block: number of the query block. rows: its rows. active: arrays that have work. seen: for each tile of keys that the
            block sees, how many of its tiles of rows see it; first: number of the first such tile of keys.
    """

    block: int
    rows: int
    active: int
    seen: tuple[int, ...]
    first: int


def rounds(profile: Profile, request: AttentionRequest) -> list[tuple[Round, int]]:
    """All rounds in order, equal ones together: (round, how often)."""
    blocks, heads = Blocks.of(profile, request.dtype), request.batch * request.heads_q
    size = row_tiles(profile, request) * blocks.rows
    found = [_block(request, blocks, number, size) for number in range(-(-request.len_q // size))]
    found = sorted((block for block in found if block.seen), key=lambda block: -sum(block.seen))
    queue = [block for block in found for _ in range(heads)]
    together = [queue[start : start + blocks.arrays] for start in range(0, len(queue), blocks.arrays)]
    made = [part[0]._replace(active=len(part)) for part in together]
    return [(key, len(list(group))) for key, group in groupby(made)]


def _block(request: AttentionRequest, blocks: Blocks, number: int, size: int) -> Round:
    """One query block: which tiles of keys its tiles of rows see."""
    start, stop = number * size, min((number + 1) * size, request.len_q)
    low, high = request.band(request.len_q, request.len_k)
    seen, first = [], None
    for tile in range(-(-request.len_k // blocks.cols)):
        keys = tile * blocks.cols, min((tile + 1) * blocks.cols, request.len_k)
        top = start if high is None else max(start, keys[0] - high)
        bottom = stop if low is None else min(stop, keys[1] - low)
        if top >= bottom:
            continue
        first = tile if first is None else first
        seen.append(-(-(bottom - start) // blocks.rows) - (top - start) // blocks.rows)
    return Round(number, stop - start, 0, tuple(seen), first or 0)


def fused(profile: Profile, request: AttentionRequest) -> Program:
    """The movement program of a request. Ragged tiles are filled up: they take the time of whole ones."""
    return _Writer(profile, request).whole()


class _Writer:
    """Writes the rounds of one request into a program; what an instruction moves is that of all active arrays in step."""

    def __init__(self, profile: Profile, request: AttentionRequest) -> None:
        r, b = request, Blocks.of(profile, request.dtype)
        self.request, self.blocks, self.profile = r, b, profile
        self.block_tiles = row_tiles(profile, r)
        self.passes = _SOFTMAX + _MASK * (r.mask != "none") + _CAP * (r.softcap is not None)
        self.chunks = self._chunks(profile.count("buffers.l2"))
        self.parts = -(-r.dim_v // b.cols)  # array tiles across the value's dimension
        self.active, self.turning = b.arrays, False
        self.program = Builder(f"attention {r.describe()}", arrays=b.arrays, dtype=r.dtype)
        self._buffers()
        size, region = b.dtype_bytes, self.program.region
        queries, keys = r.batch * r.heads_q * r.len_q, r.batch * r.heads_kv * r.len_k
        self.base = {
            "queries": region(queries * r.dim_qk * size), "keys": region(keys * r.dim_qk * size),
            "values": region(keys * r.dim_v * size), "output": region(queries * r.dim_v * size),
        }  # fmt: skip

    def _chunks(self, l2: int) -> list[int]:
        """Lengths of the pieces of dim_qk in which queries and keys pass L2: equal ones as long as fit beside the rest."""
        b, dim = self.blocks, self.request.dim_qk
        rest = b.rows * b.cols * (3 * _SUM_BYTES + 2 * b.dtype_bytes) + b.cols**2 * b.dtype_bytes
        longest = max((l2 - rest) // (2 * (b.rows + b.cols) * b.dtype_bytes), 1)
        number = -(-dim // longest)
        return [dim // number + (i < dim % number) for i in range(number)]

    def _buffers(self) -> None:
        r, b, arrays = self.request, self.blocks, self.blocks.arrays
        size, rows, deep = b.dtype_bytes, self.block_tiles * b.rows, self.chunks[0]
        for name, level, slots, held in (
            ("queries", "L3", 2, rows * r.dim_qk * size), ("keys", "L3", 2, b.cols * r.dim_qk * size),
            ("values", "L3", 2, b.cols * r.dim_v * size), ("sums", "L3", 1, rows * (r.dim_v + 2) * _SUM_BYTES),
            ("output", "L3", self.block_tiles, b.rows * r.dim_v * size),
            ("query", "L2", 2, b.rows * deep * size), ("key", "L2", 2, b.cols * deep * size),
            ("value", "L2", 1, b.cols * b.cols * size), ("scores", "L2", 2, b.rows * b.cols * _SUM_BYTES),
            ("weights", "L2", 2, b.rows * b.cols * size), ("mixed", "L2", 1, b.rows * b.cols * _SUM_BYTES),
            ("row lanes", "L1", 2, b.rows * max(deep, b.cols) * size),
            ("column lanes", "L1", 2, b.cols * max(deep, b.cols) * size),
            ("outputs", "PE", 2, 0),
        ):  # fmt: skip
            self.program.buffer(name, level, slots, held * arrays)  # type: ignore[arg-type]

    def whole(self) -> Program:
        """All rounds. The output of a block is stored after the first loads of the next, which need not wait for it."""
        unstored: Round | None = None
        for each, times in rounds(self.profile, self.request):
            self.active = each.active
            self._round(each, unstored)
            self.turning = True
            with self.program.loop(times - 1):
                self._round(each, each)
            self.turning, unstored = False, each
        if unstored is not None:
            self._store(unstored)
        return self.program.build()

    def _round(self, each: Round, unstored: Round | None) -> None:
        r, size, start = self.request, self.blocks.dtype_bytes, each.block * self.block_tiles * self.blocks.rows
        tiles = -(-each.rows // self.blocks.rows)
        self._load("queries", tiles * self.blocks.rows * r.dim_qk * size, start * r.dim_qk * size, ())
        at, first = each.first, True
        for seen, group in groupby(each.seen):
            count = len(list(group))
            if first:
                self._keys(at, ())
                if unstored is not None:
                    self._store(unstored)
                self._scores(release=seen == 1)
                self._rows(seen - 1)
                at, count, first = at + 1, count - 1, False
            with self.program.loop(count):
                self._keys(at, (self.blocks.cols,))
                self._scores(release=seen == 1)
                self._mix(release=True)
                self._rows(seen - 1)
            at += count
        self._mix(release=True)
        for tile in range(tiles):
            elements = self.active * self.blocks.rows * r.dim_v
            taken = [Take("queries")] if tile == tiles - 1 else []
            self.program.vector(taken, "output", operations=_DIVIDE * elements, size=elements * (_SUM_BYTES + size),
                                label="divide")  # fmt: skip

    def _rows(self, left: int) -> None:
        """The remaining tiles of rows of a tile of keys."""
        with self.program.loop(left - 1):
            self._scores(release=False)
            self._mix(release=False)
        if left > 0:
            self._scores(release=True)
            self._mix(release=False)

    def _load(self, name: str, size: int, offset: int, steps: tuple[int, ...]) -> None:
        """A tile of every active array. steps: how far it moves with the turns of a loop inside the round's."""
        r = self.request
        length, dim = (r.len_q, r.dim_qk) if name == "queries" else (r.len_k, r.dim_v if name == "values" else r.dim_qk)
        pitch = max(length * dim * self.blocks.dtype_bytes, size)
        outer = (self.active * pitch,) if self.turning else ()
        place = Place(self.base[name] + offset, size, self.active, pitch, (*outer, *steps))
        self.program.load(name, size * self.active, place=place, label=f"load {name}")

    def _keys(self, tile: int, turns: tuple[int, ...]) -> None:
        r, size = self.request, self.blocks.dtype_bytes
        for name, dim in (("keys", r.dim_qk), ("values", r.dim_v)):
            row = dim * size
            steps = tuple(turn * row for turn in turns)
            self._load(name, self.blocks.cols * row, tile * self.blocks.cols * row, steps)

    def _store(self, each: Round) -> None:
        r, size = self.request, self.blocks.dtype_bytes
        tile, pitch = (
            self.blocks.rows * r.dim_v * size,
            max(r.len_q * r.dim_v * size, self.blocks.rows * r.dim_v * size),
        )
        for number in range(-(-each.rows // self.blocks.rows)):
            base = self.base["output"] + each.block * self.block_tiles * tile + number * tile
            outer = (each.active * pitch,) if self.turning else ()
            place = Place(base, tile, each.active, pitch, outer)
            self.program.store("output", tile * each.active, place=place, label="store output")

    def _scores(self, release: bool) -> None:
        """QK^T of one tile of rows and the held tile of keys, and its weights."""
        b, program = self.blocks, self.program
        size, pairs, last = b.dtype_bytes * self.active, b.rows * b.cols * self.active, len(self.chunks) - 1
        for number, deep in enumerate(self.chunks):
            ends = number == last
            program.move(Take("queries", keep=True), "query", b.rows * deep * size, mover=0, label="query tile")
            program.move(Take("keys", keep=not (ends and release)), "key", b.cols * deep * size, mover=1, reorder="transpose",
                         label="key tile")  # fmt: skip
            program.feed_rows("query", "row lanes", b.rows * deep * size, deep)
            program.feed_cols("key", "column lanes", b.cols * deep * size, deep)
            program.compute(
                ["row lanes", "column lanes"], "outputs" if ends else (), steps=deep,
                total=self.request.dim_qk if ends else 0, array=(b.rows, b.cols), macs=pairs * deep, label="QK^T",
            )  # fmt: skip
        program.drain("outputs", "scores", pairs * _SUM_BYTES, b.cols, label="scores")
        program.vector("scores", "weights", operations=pairs * self.passes, size=pairs * _SUM_BYTES + b.rows * b.cols * size,
                       label="online softmax")  # fmt: skip

    def _mix(self, release: bool) -> None:
        """WV of the oldest weights and the oldest tile of values."""
        b, program = self.blocks, self.program
        size, last = b.dtype_bytes * self.active, self.parts - 1
        for part in range(self.parts):
            wide = min(b.cols, self.request.dim_v - part * b.cols)
            ends, elements = part == last, b.rows * wide * self.active
            program.move(Take("values", keep=not (ends and release)), "value", b.cols * wide * size, mover=1,
                         label="value tile")  # fmt: skip
            program.feed_rows(Take("weights", keep=not ends), "row lanes", b.rows * b.cols * size, b.cols)
            program.feed_cols("value", "column lanes", b.cols * wide * size, b.cols)
            program.compute(
                ["row lanes", "column lanes"], "outputs", steps=b.cols, total=b.cols, array=(b.rows, b.cols),
                macs=elements * b.cols, label="WV",
            )  # fmt: skip
            program.drain("outputs", "mixed", elements * _SUM_BYTES, b.cols, label="mixed values")
            program.vector("mixed", operations=elements * _FADE, size=elements * 3 * _SUM_BYTES, label="fade and add")
