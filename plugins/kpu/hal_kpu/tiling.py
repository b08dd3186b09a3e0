"""How attention is cut for a machine: tiles of scores, blocks of query rows, and the rounds in which all arrays work in
step.

An array works through one block of query rows of one head at a time. A block holds as many rows as its L3 has room for
and as keep all arrays busy, so that a tile of keys and values comes from DRAM once for all of them.
"""

from __future__ import annotations

from collections import Counter
from functools import lru_cache
from itertools import groupby
from typing import NamedTuple

import attrs

from hal_core.plugin_api import DTYPE_BYTES, AttentionRequest

from .profiles.profile import Profile

SUM_BYTES = 4  # float32, what the processing elements and the vector unit keep
#: Operations of the vector unit on one score: scale, largest, difference, exponential (6), sum. A mask adds 1, a cap 8.
_SOFTMAX, _MASK, _CAP = 10, 1, 8
#: On one element of the output: fade and add with every tile of keys, divide at the end.
FADE, DIVIDE = 2, 1


#: Keys in a tile of scores where an array has fewer columns and L2 has room: a longer PV hides more of the wave's way
#: out.
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
        rest = pairs * ((self.wide + 2) * SUM_BYTES + 2 * self.wide * b) + self.keys * self.cols * b
        return (l2 - rest) // (2 * (self.rows + self.cols) * b)


def room(blocks: Blocks, dim_qk: int, dim_v: int, row_tiles: int = 1, query_blocks: int = 1) -> int:
    """Bytes of L3 beside one array that a query block of `row_tiles` tiles needs.

    The queries, or two blocks of them; two tiles of keys and two of values (one is loaded while the other is read); the
    unnormalised output and two float32 sums a row; the finished output, which waits to be stored.
    """
    b, rows = blocks.dtype_bytes, row_tiles * blocks.rows
    held = rows * (query_blocks * dim_qk * b + dim_v * (SUM_BYTES + b) + 2 * SUM_BYTES)
    return held + 2 * blocks.keys * (dim_qk + dim_v) * b


def longest_head(profile: Profile, dtype: str) -> int:
    """The largest head_dim, of keys and values alike, whose smallest query block fits the L3."""
    blocks, held = Blocks.of(profile, dtype), profile.count("buffers.l3")
    fixed = room(blocks, 0, 0)
    return max((held - fixed) // (room(blocks, 1, 1) - fixed), 0)


@lru_cache(maxsize=4096)
def row_tiles(profile: Profile, request: AttentionRequest) -> int:
    """Tiles of rows in a query block: of those that fit the L3, the number that takes least time over all rounds.

    A round takes, for each tile of keys, the longer of loading it and of computing it with the tiles of rows that see
    it; and at its ends its queries' way in and one tile's way through.
    """
    r, blocks, held = request, Blocks.of(profile, request.dtype), profile.count("buffers.l3")
    wave, parts, lanes = blocks.rows + blocks.cols - 2, -(-r.dim_v // blocks.cols), profile["engines.vector_lanes"]
    array = blocks.wide * (r.dim_qk + wave) + parts * (blocks.keys + wave)
    vector = blocks.rows * (softmax_passes(r) * blocks.keys + FADE * r.dim_v) / lanes
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
        rows: of a block. active: arrays that have work. heads: key heads among them: arrays of one head share what it
            loads.
        seen: for each tile of keys that the block sees, how many of its tiles of rows see it. first: the first such
            tile.
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
