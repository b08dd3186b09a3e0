"""How attention is cut for a machine: `KPUTiling`, and the rounds in which all arrays work in step.

A plan has blocks of query rows and tiles of keys. An array works through one block of query rows of one head at a
time. A block holds as many rows as fit its L3 and keep all arrays busy, so that a tile of keys and values comes from
DRAM once for all of them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from itertools import groupby
from typing import TYPE_CHECKING, NamedTuple

import attrs

from hal_core.plugin_api import DTYPE_BYTES, AttentionRequest, DenseTiling, TilePlan

from .profiles.profile import Profile

if TYPE_CHECKING:
    from torch import Tensor

SUM_BYTES = 4  # float32, what the processing elements and the vector unit keep
#: Operations of the vector unit on one score: scale, largest, difference, exponential (6), sum. A mask adds 1, a cap 8.
_SOFTMAX, _MASK, _CAP = 10, 1, 8
#: On one element of the output: fade and add with every tile of keys, divide at the end.
FADE, DIVIDE = 2, 1


#: A larger call is represented, where its cut is chosen and its time estimated, by one of at most so many tiles of
#: scores (the root of their number in a head), and of at most so many heads for each array.
LONGEST, ROUNDS = 96, 2
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
        for each, times in _rounds(r, Cut(blocks, size * blocks.rows, blocks.keys, size)):
            tiles = sum(max(seen * step, each.heads * loaded) * many for seen, many in Counter(each.seen).items())
            total += times * (tiles + array + vector + each.active * each.rows * r.dim_qk * element)
        return total

    tiles = -(-r.len_q // blocks.rows)
    sizes = {-(-tiles // number) for number in range(1, tiles + 1)}
    fit = [size for size in sizes if room(blocks, r.dim_qk, r.dim_v, size, 2) <= held]
    return min(fit, key=lambda size: (time(size), -size), default=1)


class Cut(NamedTuple):
    """How the machine works through equal blocks: `TilePlan.block_q` rows by `TilePlan.block_k` keys.

    A block that the buffers do not hold is worked through in equal pieces that fit.

    Attributes:
        blocks: the arrays, and the keys that a tile of scores is computed with: block_k filled up to whole array tiles.
        block_q, block_k: rows and keys from one piece to the next. row_tiles: array tiles that block_q rows take.
    """

    blocks: Blocks
    block_q: int
    block_k: int
    row_tiles: int


def own_cut(profile: Profile, request: AttentionRequest) -> Cut:
    """The machine's own choice for a request."""
    blocks, tiles = Blocks.of(profile, request.dtype), row_tiles(profile, request)
    return Cut(blocks, tiles * blocks.rows, blocks.keys, tiles)


def cut_of(profile: Profile, request: AttentionRequest) -> Cut:
    """The cut of a request: that of the tiling that it names, or the machine's own."""
    if request.tiling is None:
        return own_cut(profile, request)
    return cut_into(profile, request, *request.tiling[1:])


@lru_cache(maxsize=4096)
def cut_into(profile: Profile, request: AttentionRequest, block_q: int, block_k: int) -> Cut:
    """How the machine works through blocks of block_q rows by block_k keys."""
    blocks, l2, l3 = Blocks.of(profile, request.dtype), profile.count("buffers.l2"), profile.count("buffers.l3")
    block_q, block_k = min(block_q, max(request.len_q, 1)), min(block_k, max(request.len_k, 1))
    rows, keys = block_q, block_k
    while rows > blocks.rows or keys > blocks.cols:
        piece = attrs.evolve(blocks, keys=-(-keys // blocks.cols) * blocks.cols)
        if piece.staged(l2) < 1 and keys > blocks.cols:
            keys = _smaller(block_k, keys)
        elif room(piece, request.dim_qk, request.dim_v, -(-rows // blocks.rows)) <= l3:
            break
        elif rows > blocks.rows:
            rows = _smaller(block_q, rows)
        else:
            keys = _smaller(block_k, keys)
    tile = attrs.evolve(blocks, keys=-(-keys // blocks.cols) * blocks.cols)
    return Cut(tile, rows, keys, -(-rows // blocks.rows))


def _smaller(block: int, piece: int) -> int:
    """The next smaller equal piece of a block; `piece` is 2 or more."""
    number = -(-block // (piece - 1))  # the fewest pieces of which each is smaller
    return -(-block // number)


def steps_of(profile: Profile, request: AttentionRequest) -> tuple[int, int]:
    """(rows of a block that lengths are filled up to, keys of a tile) of a request's cut."""
    if request.block_plan is not None:
        block_q, block_k, _ = request.block_plan
        return block_q, cut_into(profile, request, block_q, block_k).block_k
    if request.tiling is None:
        blocks = Blocks.of(profile, request.dtype)
        return blocks.rows, blocks.keys
    cut = cut_into(profile, request, *request.tiling[1:])
    return cut.blocks.rows if cut.block_q % cut.blocks.rows == 0 else 1, cut.block_k


def filled_up(profile: Profile, request: AttentionRequest) -> AttentionRequest:
    """The request with lengths filled up to whole tiles, and without what does not change its time."""
    r, (rows, keys) = request, steps_of(profile, request)
    return replace(
        without_values(r),
        len_q=-(-r.len_q // rows) * rows,
        len_k=-(-r.len_k // keys) * keys,
        tiling=None if r.tiling is None else ("", *r.tiling[1:]),
    )


def without_values(request: AttentionRequest) -> AttentionRequest:
    """The request without what changes its values alone, and not its time."""
    return replace(
        request,
        mask_batch=1,
        mask_heads=1,
        options=(),
        scale=None,
        softcap=None if request.softcap is None else 1.0,
        grads=frozenset(),
        lse=False,
        grad_lse=False,
        device="cpu",
        last_dim_contiguous=True,
        deterministic=False,
        max_error=None,
    )


def shortened(profile: Profile, request: AttentionRequest, longest: int | None = None) -> AttentionRequest:
    """The filled-up request itself, or one of the same proportions of at most `longest` squared tiles of scores
    (`LONGEST`), and with fewer heads.
    """
    r, (rows, keys), longest = request, steps_of(profile, request), longest or LONGEST
    heads, group = r.batch * r.heads_kv, r.heads_q // max(r.heads_kv, 1)
    most = ROUNDS * Blocks.of(profile, r.dtype).arrays
    if heads * group > most:
        heads = max(most // group, 1)
        r = replace(r, batch=1, heads_q=heads * group, heads_kv=heads)
    down, right = r.len_q // rows, r.len_k // keys
    if down * right > longest**2:
        part = longest / (down * right) ** 0.5
        down, right = (max(round(tiles * part), 1) for tiles in (down, right))
        if min(down, right) == 1:  # the shorter side cannot be shortened any further
            down, right = (min(tiles, 8 * longest) for tiles in (down, right))
        r = replace(r, len_q=down * rows, len_k=right * keys)
    return r


def machine_of(profile: Profile, request: AttentionRequest) -> Profile:
    """The machine at the clock that a request's options ask for."""
    clock = dict(request.options).get("clock_mhz")
    return profile if clock is None else _clocked(profile, clock)


@lru_cache(maxsize=64)
def _clocked(profile: Profile, mhz: int) -> Profile:
    return profile.replace(clock__frequency=mhz * 1e6)


class KPUTiling(DenseTiling):
    """The machine's own cut: as many query rows in a block as take least time, and tiles of keys that fit L2.

    Args:
        profile: of the machine. block_q, block_k: fixed block sizes instead of the machine's choice.
    """

    def __init__(self, profile: Profile, block_q: int | None = None, block_k: int | None = None) -> None:
        super().__init__(block_q, block_k, cut_by="kpu")
        self.profile = profile
        fixed = "" if block_q is None else f" {self.block_q}x{self.block_k}"
        self.name = f"kpu({profile.name}-{profile.digest[:8]}{fixed})"

    def plan(
        self,
        request: AttentionRequest,
        limits: Mapping[str, int],
        *,
        query: Tensor | None = None,
        key: Tensor | None = None,
    ) -> TilePlan:
        """Equal blocks for the buffers of the profile, within the bounds that `limits` sets.

        Args:
            limits: "minimum" and "maximum" of both block sizes, "block_q" and "block_k" for the largest of each, and
                "available_memory": bytes that the operands and scores of one tile may take. Each is optional.
        """
        if self.block_q is not None and self.block_k is not None:
            sizes = self.block_q, self.block_k
        else:
            machine = machine_of(self.profile, request)
            cut = own_cut(machine, shortened(machine, filled_up(machine, replace(request, tiling=None))))
            sizes = cut.block_q, cut.block_k
        low, high = limits.get("minimum", 1), limits.get("maximum", max(sizes))
        rows, keys = (
            max(low, min(size, high, limits.get(name, size)))
            for name, size in zip(("block_q", "block_k"), sizes, strict=True)
        )
        space, size = limits.get("available_memory"), DTYPE_BYTES.get(request.dtype, 4)
        while space is not None and max(rows, keys) > low:
            operands = (rows * request.dim_qk + keys * (request.dim_qk + request.dim_v)) * size
            if operands + rows * keys * SUM_BYTES <= space:
                break
            rows, keys = (max(rows // 2, low), keys) if rows >= keys else (rows, max(keys // 2, low))
        return TilePlan.equal(request, rows, keys, cut_by=self.cut_by)

    def choices(self, request: AttentionRequest, limits: Mapping[str, int]) -> Sequence[KPUTiling]:
        """This cut, and those with half and twice the rows or keys in a block."""
        best = self.plan(request, limits)
        sizes = [(best.block_q, best.block_k)]
        sizes += [(best.block_q * 2, best.block_k), (max(best.block_q // 2, 1), best.block_k)]
        sizes += [(best.block_q, best.block_k * 2), (best.block_q, max(best.block_k // 2, 1))]
        low, high = limits.get("minimum", 1), limits.get("maximum", max(max(pair) for pair in sizes))
        others = dict.fromkeys(pair for pair in sizes if low <= min(pair) and max(pair) <= high)
        return [KPUTiling(self.profile, *pair) for pair in others]


class Round(NamedTuple):
    """What all arrays do in step. Where their blocks differ, each does, and counts, what the costliest of them does.

    Attributes:
        rows: of a block. active: arrays that have work. heads: key heads among them: arrays of one head share what it
            loads.
        seen: for each tile of keys that the block sees, how many of its tiles of rows see it. at: the number of each
            such tile.
    """

    rows: int
    active: int
    heads: int
    seen: tuple[int, ...]
    at: Sequence[int]

    def runs(self) -> Iterator[tuple[int, int, int]]:
        """(first tile, tiles of rows that see it, how many tiles) of neighbouring tiles that as many rows see."""
        first = count = rows = 0
        for tile, seen in zip(self.at, self.seen, strict=True):
            if count and (tile, seen) == (first + count, rows):
                count += 1
                continue
            if count:
                yield first, rows, count
            first, rows, count = tile, seen, 1
        if count:
            yield first, rows, count


def rounds(profile: Profile, request: AttentionRequest) -> list[tuple[Round, int]]:
    """All rounds in order, equal ones together: (round, how often)."""
    return _rounds(request, cut_of(profile, request))


def _rounds(r: AttentionRequest, cut: Cut) -> list[tuple[Round, int]]:
    """The rounds of a cut: query blocks of all heads, the costliest first, as many at once as there are arrays."""
    size, group_size, arrays = cut.block_q, r.heads_q // max(r.heads_kv, 1), cut.blocks.arrays
    found = [_block(r, cut, start, min(start + size, r.len_q)) for start in range(0, r.len_q, size)]
    queue = [(head // group_size, block) for head in range(r.batch * r.heads_q) for block in found if block.seen]
    queue.sort(key=lambda item: -sum(item[1].seen))  # stable: blocks of a head stay together where they cost the same
    together = [queue[start : start + arrays] for start in range(0, len(queue), arrays)]
    made = [part[0][1]._replace(active=len(part), heads=len({head for head, _ in part})) for part in together]
    return [(key, len(list(group))) for key, group in groupby(made)]


def _block(request: AttentionRequest, cut: Cut, start: int, stop: int) -> Round:
    """One query block of a dense call: which tiles of keys its tiles of rows see."""
    len_k, size = request.len_k, cut.block_k
    tiles = -(-len_k // size)
    if request.band(request.len_q, len_k) == (None, None):
        return Round(stop - start, 0, 0, (-(-(stop - start) // cut.blocks.rows),) * tiles, range(tiles))
    listed = [(tile, tile * size, min((tile + 1) * size, len_k)) for tile in range(tiles)]
    return block_of(request, cut, start, stop, listed)


def block_of(
    request: AttentionRequest, cut: Cut, start: int, stop: int, tiles: Sequence[tuple[int, int, int]]
) -> Round:
    """Query rows start to stop against tiles of keys, each (number, first key, last key + 1): those that causal and
    window leave, with how many tiles of rows see them.
    """
    (low, high), rows = request.band(request.len_q, request.len_k), cut.blocks.rows
    seen, at = [], []
    for tile, first, last in tiles:
        top = start if high is None else max(start, first - high)
        bottom = stop if low is None else min(stop, last - low)
        if top < bottom:
            seen.append(-(-(bottom - start) // rows) - (top - start) // rows)
            at.append(tile)
    return Round(stop - start, 0, 0, tuple(seen), tuple(at))


def softmax_passes(request: AttentionRequest) -> int:
    """Operations of the vector unit on one score."""
    return _SOFTMAX + _MASK * (request.mask != "none") + _CAP * (request.softcap is not None)
