"""Fused attention as a movement program: which tiles move where, and what the array and the vector unit do with them.

An array works through one block of query rows of one head at a time. A block holds as many rows as its L3 has room for, so
that a tile of keys and values comes from DRAM once for all of them. For every tile of keys and every tile of rows that sees it:

    array   S = Q K^T          vector  weights of S, with the largest score and the sum so far
    array   W V                vector  the output so far, faded, plus it

The array takes the next tile's QK^T before this one's WV, so that it does not wait for the vector unit. Scores and weights stay
in L2; DRAM sees query, key, value and output alone. Blocks of different heads run on all arrays in step, the costliest first.
"""

from __future__ import annotations

from collections import Counter
from functools import lru_cache
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


#: Keys in a tile of scores where an array has fewer columns and L2 has room: a longer PV hides more of the wave's way out.
_KEYS = 64
#: Elements of dim_qk that a piece of queries or keys in L2 should hold at least.
_PIECE = 8


@attrs.frozen
class Blocks:
    """How attention is cut for one kind of array.

    Attributes:
        rows, cols: of the array. arrays: how many work at once. dtype_bytes: of an operand.
        keys: in a tile of scores, a multiple of cols. Its rows are the array's.
    """

    rows: int
    cols: int
    arrays: int
    dtype_bytes: int
    keys: int

    @classmethod
    def of(cls, profile: Profile, dtype: str) -> Blocks:
        rows, cols, arrays = profile.arrays(dtype)
        blocks = cls(rows, cols, arrays, DTYPE_BYTES[dtype], cols)
        while blocks.keys * 2 <= _KEYS:
            wider = attrs.evolve(blocks, keys=blocks.keys * 2)
            if wider.staged(profile.count("buffers.l2")) < _PIECE:
                break
            blocks = wider
        return blocks

    @property
    def wide(self) -> int:
        """Array tiles in a tile of scores."""
        return self.keys // self.cols

    def staged(self, l2: int) -> int:
        """Elements of dim_qk that pieces of queries and keys may have in an L2 of so many bytes, two of each held.

        Beside them: scores of one tile and one array tile more, weights of two tiles, values of one array tile, and one
        array tile of output.
        """
        pairs, b = self.rows * self.cols, self.dtype_bytes
        rest = pairs * ((self.wide + 2) * _SUM_BYTES + 2 * self.wide * b) + self.keys * self.cols * b
        return (l2 - rest) // (2 * (self.rows + self.cols) * b)


def room(blocks: Blocks, dim_qk: int, dim_v: int, row_tiles: int = 1, query_blocks: int = 1) -> int:
    """Bytes of L3 beside one array that a query block of `row_tiles` tiles needs.

    The queries, or two blocks of them; two tiles of keys and two of values (one is loaded while the other is read); the
    unnormalised output and two float32 sums a row; the finished output, which waits to be stored.
    """
    b, rows = blocks.dtype_bytes, row_tiles * blocks.rows
    held = rows * (query_blocks * dim_qk * b + dim_v * (_SUM_BYTES + b) + 2 * _SUM_BYTES)
    return held + 2 * blocks.keys * (dim_qk + dim_v) * b


def longest_head(profile: Profile, dtype: str) -> int:
    """The largest head_dim, of keys and values alike, whose smallest query block fits the L3."""
    blocks, held = Blocks.of(profile, dtype), profile.count("buffers.l3")
    fixed = room(blocks, 0, 0)
    return max((held - fixed) // (room(blocks, 1, 1) - fixed), 0)


@lru_cache(maxsize=4096)
def row_tiles(profile: Profile, request: AttentionRequest) -> int:
    """Tiles of rows in a query block: of those that fit the L3, the number that takes least time over all rounds.

    A round takes, for each tile of keys, the longer of loading it and of computing it with the tiles of rows that see it; and
    at its ends its queries' way in and one tile's way through.
    """
    r, blocks, held = request, Blocks.of(profile, request.dtype), profile.count("buffers.l3")
    wave, parts, lanes = blocks.rows + blocks.cols - 2, -(-r.dim_v // blocks.cols), profile["engines.vector_lanes"]
    array = blocks.wide * (r.dim_qk + wave) + parts * (blocks.keys + wave)
    vector = blocks.rows * (softmax_passes(r) * blocks.keys + _FADE * r.dim_v) / lanes
    element = blocks.dtype_bytes / profile.bytes_per_cycle()  # cycles to load one
    loaded, step = blocks.keys * (r.dim_qk + r.dim_v) * element, max(array, vector)

    def time(size: int) -> float:
        total = 0.0
        for each, times in _cut(r, blocks, size):
            tiles = sum(max(seen * step, each.heads * loaded) * many for seen, many in Counter(each.seen).items())
            total += times * (tiles + array + vector + each.active * each.rows * r.dim_qk * element)
        return total

    tiles = -(-r.len_q // blocks.rows)
    sizes = {-(-tiles // number) for number in range(1, tiles + 1)}
    fit = [size for size in sizes if room(blocks, r.dim_qk, r.dim_v, size, 2) <= held]
    return min(fit, key=lambda size: (time(size), -size), default=1)


class Round(NamedTuple):
    """What all arrays do in step. Where their blocks differ, each does, and counts, what the costliest of them does.

    Attributes:
        rows: of a block. active: arrays that have work. heads: key heads among them: arrays of one head share what it loads.
        seen: for each tile of keys that the block sees, how many of its tiles of rows see it. first: the first such tile.
    """

    rows: int
    active: int
    heads: int
    seen: tuple[int, ...]
    first: int


def rounds(profile: Profile, request: AttentionRequest) -> list[tuple[Round, int]]:
    """All rounds in order, equal ones together: (round, how often)."""
    return _cut(request, Blocks.of(profile, request.dtype), row_tiles(profile, request))


def _cut(r: AttentionRequest, blocks: Blocks, tiles: int) -> list[tuple[Round, int]]:
    """The rounds of query blocks of so many tiles of rows."""
    size, share = tiles * blocks.rows, r.heads_q // max(r.heads_kv, 1)
    found = [_block(r, blocks, start, min(start + size, r.len_q)) for start in range(0, r.len_q, size)]
    queue = [(head // share, block) for head in range(r.batch * r.heads_q) for block in found if block.seen]
    queue.sort(key=lambda item: -sum(item[1].seen))  # stable: blocks of a head stay together where they cost the same
    together = [queue[start : start + blocks.arrays] for start in range(0, len(queue), blocks.arrays)]
    made = [part[0][1]._replace(active=len(part), heads=len({head for head, _ in part})) for part in together]
    return [(key, len(list(group))) for key, group in groupby(made)]


def _block(request: AttentionRequest, blocks: Blocks, start: int, stop: int) -> Round:
    """One query block: which tiles of keys its tiles of rows see."""
    low, high = request.band(request.len_q, request.len_k)
    if low is None and high is None:
        return Round(stop - start, 0, 0, (-(-(stop - start) // blocks.rows),) * -(-request.len_k // blocks.keys), 0)
    seen, first = [], None
    for tile in range(-(-request.len_k // blocks.keys)):
        keys = tile * blocks.keys, min((tile + 1) * blocks.keys, request.len_k)
        top = start if high is None else max(start, keys[0] - high)
        bottom = stop if low is None else min(stop, keys[1] - low)
        if top >= bottom:
            continue
        first = tile if first is None else first
        seen.append(-(-(bottom - start) // blocks.rows) - (top - start) // blocks.rows)
    return Round(stop - start, 0, 0, tuple(seen), first or 0)


def softmax_passes(request: AttentionRequest) -> int:
    """Operations of the vector unit on one score."""
    return _SOFTMAX + _MASK * (request.mask != "none") + _CAP * (request.softcap is not None)


def fused(profile: Profile, request: AttentionRequest) -> Program:
    """The movement program of a request. Ragged tiles are filled up: they take the time of whole ones."""
    return _Writer(profile, request).whole()


class _Writer:
    """Writes the rounds of one request into a program; what an instruction moves is that of all active arrays in step."""

    def __init__(self, profile: Profile, request: AttentionRequest) -> None:
        r, b = request, Blocks.of(profile, request.dtype)
        self.request, self.blocks, self.profile = r, b, profile
        self.block_tiles = row_tiles(profile, r)
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
            "queries": region(queries * r.dim_qk * size), "keys": region(keys * r.dim_qk * size),
            "values": region(keys * r.dim_v * size), "output": region(queries * r.dim_v * size),
        }  # fmt: skip

    def _pieces(self, most: int) -> list[int]:
        """Lengths of the pieces of dim_qk in which queries and keys pass L2: as few as hold at most so many elements."""
        dim = self.request.dim_qk
        number = -(-dim // max(most, 1))
        return [dim // number + (i < dim % number) for i in range(number)]

    def _buffers(self) -> None:
        r, b, arrays = self.request, self.blocks, self.blocks.arrays
        size, rows, deep = b.dtype_bytes, self.block_tiles * b.rows, max(self.pieces[0], b.keys)
        for name, level, slots, held in (
            ("queries", "L3", self.query_blocks, rows * r.dim_qk * size), ("keys", "L3", 2, b.keys * r.dim_qk * size),
            ("values", "L3", 2, b.keys * r.dim_v * size), ("sums", "L3", 1, rows * (r.dim_v + 2) * _SUM_BYTES),
            ("output", "L3", self.block_tiles, b.rows * r.dim_v * size),
            ("query", "L2", 2, b.rows * self.pieces[0] * size), ("key", "L2", 2, b.cols * self.pieces[0] * size),
            ("value", "L2", 1, b.keys * b.cols * size), ("scores", "L2", b.wide + 1, b.rows * b.cols * _SUM_BYTES),
            ("weights", "L2", 2, b.rows * b.keys * size), ("mixed", "L2", 1, b.rows * b.cols * _SUM_BYTES),
            ("row lanes", "L1", 2, b.rows * deep * size), ("column lanes", "L1", 2, b.cols * deep * size),
            ("outputs", "PE", 2, 0),
        ):  # fmt: skip
            self.program.buffer(name, level, slots, held * arrays)  # type: ignore[arg-type]

    def whole(self) -> Program:
        """All rounds. The output of a block is stored after the first loads of the next, which need not wait for it."""
        unstored: Round | None = None
        for each, times in rounds(self.profile, self.request):
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
                self._keys(at, (self.blocks.keys,))
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
            taken, "weights", operations=pairs * self.passes, size=pairs * _SUM_BYTES + b.rows * b.keys * size,
            label="online softmax",
        )  # fmt: skip

    def _array_tile(self, release: bool) -> None:
        """QK^T of as many keys as the array has columns."""
        b, program, last = self.blocks, self.program, len(self.pieces) - 1
        size, pairs = b.dtype_bytes * self.active, b.rows * b.cols * self.active
        for number, deep in enumerate(self.pieces):
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

    def _mix(self, release: bool) -> None:
        """WV of the oldest weights and the oldest tile of values."""
        b, program = self.blocks, self.program
        size, last = b.dtype_bytes * self.active, self.parts - 1
        for part in range(self.parts):
            wide = min(b.cols, self.request.dim_v - part * b.cols)
            ends, elements = part == last, b.rows * wide * self.active
            program.move(Take("values", keep=not (ends and release)), "value", b.keys * wide * size, mover=1,
                         label="value tile")  # fmt: skip
            program.feed_rows(Take("weights", keep=not ends), "row lanes", b.rows * b.keys * size, b.keys)
            program.feed_cols("value", "column lanes", b.keys * wide * size, b.keys)
            program.compute(
                ["row lanes", "column lanes"], "outputs", steps=b.keys, total=b.keys, array=(b.rows, b.cols),
                macs=elements * b.keys, label="WV",
            )  # fmt: skip
            program.drain("outputs", "mixed", elements * _SUM_BYTES, b.cols, label="mixed values")
            program.vector("mixed", operations=elements * _FADE, size=elements * 3 * _SUM_BYTES, label="fade and add")
