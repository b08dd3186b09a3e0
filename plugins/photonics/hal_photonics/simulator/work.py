"""The work of products and of attention on weights that are held: tiles to load, and rows that are streamed."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

from hal_simulation import ProductSize

from hal_core.plugin_api import AttentionRequest, TilePlan

from ..profiles.profile import Profile
from ..tiling import narrowed

#: Row ranges that the cost of a plan is summed over at most.
_MOST_RANGES = 4096


class Work(NamedTuple):
    """Products with weights held and vectors streamed.

    Attributes:
        loads: weight tiles to load. rows: vectors streamed, over all tiles. macs: multiply-accumulates.
    """

    loads: int
    rows: int
    macs: int


def product_work(profile: Profile, size: ProductSize) -> Work:
    """The work of products with the second operand held as weights."""
    across = -(-size.outputs // profile.count("array.outputs"))
    along = -(-size.length // profile.count("array.inputs"))
    tiles = size.batch * across * along
    return Work(tiles, tiles * size.rows, size.macs)


def attention_work(profile: Profile, request: AttentionRequest, plan: TilePlan | None = None) -> Work:
    """The work of QK^T with keys held and of PV with values held.

    Rows that causal and window hide from a whole tile are not streamed. With a tiling that the caller brought, tiles
    are loaded anew for each of its row ranges.

    Args:
        plan: of the request's tiling at its exact lengths; None: from its block sizes.
    """
    r = request
    outputs, inputs = profile.count("array.outputs"), profile.count("array.inputs")
    group_size, heads = r.heads_q // max(r.heads_kv, 1), r.batch * r.heads_kv
    deep = -(-r.dim_qk // inputs)  # tiles along the reduction of QK^T
    wide = -(-r.dim_v // outputs)  # tiles along the outputs of PV
    if r.tiling is not None and (plan is not None or min(r.tiling[1:]) > 0):
        (keys, key_rows), (values, value_rows) = _tiles_of_plan(r, plan, outputs, inputs)
    else:
        keys, key_rows = tiles_seen(r, outputs)
        values, value_rows = tiles_seen(r, narrowed(r.window, inputs))
    rows = heads * group_size * (deep * key_rows + wide * value_rows)
    return Work(heads * (deep * keys + wide * values), rows, r.visible_macs)


@lru_cache(maxsize=1024)
def tiles_seen(request: AttentionRequest, size: int) -> tuple[int, int]:
    """Of tiles of `size` keys: how many are seen by some query row, and the sum over them of the rows that do.

    Row r sees some of the keys a to b (excluded) if r + low < b and r + high >= a. The number of these rows is linear
    in the tile's number between a few points, so the time does not depend on the lengths.
    """
    len_q, len_k = request.len_q, request.len_k
    if not len_q or not len_k:
        return 0, 0
    low, high = request.band(len_q, len_k)
    low, high = -len_q if low is None else low, len_k if high is None else high
    if low > high:
        return 0, 0
    last = -(-len_k // size) - 1

    def rows(tile: int) -> int:
        start, stop = tile * size, min((tile + 1) * size, len_k)
        return max(min(len_q, stop - low) - max(0, start - high), 0)

    bends = (low // size, -(-(len_q + low) // size) - 1, high // size + 1, -(-(len_q + high) // size))
    points = sorted({0, last, *(min(max(bend, 0), last) for bend in bends)})
    tiles, total = int(rows(last) > 0), rows(last)
    for start, stop in pairwise(points):
        if rows(start):
            tiles += stop - start
            total += (rows(start) + rows(stop - 1)) * (stop - start) // 2
    return tiles, total


def _tiles_of_plan(
    request: AttentionRequest, plan: TilePlan | None, outputs: int, inputs: int
) -> tuple[tuple[int, int], tuple[int, int]]:
    """(tiles, rows streamed) of QK^T, and of PV, for one key head and one query head of a plan."""
    keys = key_rows = values = value_rows = 0
    for rows, times, seen, tiles in _ranges(request, plan, inputs):
        loads = -(-seen // outputs) * times
        keys, key_rows = keys + loads, key_rows + loads * rows
        values, value_rows = values + tiles * times, value_rows + tiles * times * rows
    return (keys, key_rows), (values, value_rows)


def _ranges(request: AttentionRequest, plan: TilePlan | None, inputs: int) -> Iterator[tuple[int, int, int, int]]:
    """(rows, how often, keys from the first to the last, tiles of PV) of the row ranges of a plan."""
    if plan is not None and plan.ranges is not None:
        for start, stop, spans in plan.ranges:
            if spans:
                tiles = sum(-(-(k_stop - k_start) // inputs) for k_start, k_stop in spans)
                yield stop - start, 1, spans[-1][1] - spans[0][0], tiles
        return
    assert request.tiling is not None
    _, block_q, block_k = request.tiling if plan is None else ("", plan.block_q, plan.block_k)
    plan = TilePlan.equal(request, block_q, block_k)
    # Neighbouring row blocks count as one, so that a long call is not slow to estimate.
    times = max(-(-request.len_q // (block_q * _MOST_RANGES)), 1)
    for start in range(0, request.len_q, block_q * times):
        stop = min(start + block_q * times, request.len_q)
        first, last = plan.visible(start)[0] // block_k * block_k, plan.visible(stop - 1)[1]
        if first < last:
            blocks = -(-(stop - start) // block_q)
            tiles = -(-(last - first) // block_k) * -(-block_k // inputs)
            yield -(-(stop - start) // blocks), blocks, last - first, tiles
