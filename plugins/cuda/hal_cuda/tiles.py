"""How the plain Triton kernel cuts a request: tiles of rows and keys, and splits of the keys."""

from __future__ import annotations

from typing import NamedTuple

from hal_core.plugin_api import AttentionRequest, Causal, MaskKind

from .chip import Chip

#: Rows (tokens times heads of a group) up to which a group shares one tile.
MOST_PACKED_ROWS = 64
MOST_PACKED_TOKENS = 16


class Tiles(NamedTuple):
    """Rows and keys of a tile, warps of a program, stages of its loads."""

    rows: int
    keys: int
    warps: int
    stages: int


def packs(request: AttentionRequest, len_q: int) -> bool:
    """Whether the query heads of a group share a tile."""
    few = len_q <= MOST_PACKED_TOKENS and len_q * (request.heads_q // request.heads_kv) <= MOST_PACKED_ROWS
    return few and not request.packed and request.block_plan is None


def choose_tiles(request: AttentionRequest, len_q: int) -> Tiles:
    """Tiles measured on Hopper; `shrunk` gives the next smaller ones where a chip's shared memory does not hold
    them.
    """
    wide = max(power_of_two(request.dim_qk), power_of_two(request.dim_v))
    plain = request.mask is MaskKind.NONE
    if packs(request, len_q):
        rows = max(16, power_of_two(len_q * (request.heads_q // request.heads_kv)))
        if request.dtype == "float32":
            return Tiles(rows, 32, 4, 2)
        many = wide <= 64 or (wide <= 128 and request.len_k > 2048)
        return Tiles(rows, 128 if many and plain and rows <= 32 else 64, 4, 3 if plain else 2)
    if request.dtype == "float32":
        tiles = Tiles(32, 32, 4, 2 if wide <= 128 else 1)
    elif wide > 128:
        tiles = Tiles(128, 32, 8, 3)
    elif request.block_plan is not None and plain:
        tiles = Tiles(128, 64, 4, 2)
    else:
        tiles = Tiles(64, 64, 4, 3)
    rows, keys = min(tiles.rows, max(16, power_of_two(len_q))), tiles.keys
    if (
        request.block_plan is not None
    ):  # a tile lies in one block of rows; blocks of odd sizes waste least in small tiles
        block_q, block_k = request.block_plan[:2]
        rows = min(rows, max(16, block_q & -block_q if block_q > 16 else 16))
        keys = min(keys, max(16, power_of_two(block_k)))
    return tiles._replace(rows=rows, keys=keys, warps=4 if rows <= 64 else tiles.warps)


def shrunk(tiles: Tiles) -> Tiles | None:
    """The next smaller tiles: fewer stages, then fewer keys, then fewer rows; None where there are none."""
    if tiles.stages > 1:
        return tiles._replace(stages=tiles.stages - 1)
    if tiles.keys > 16:
        return tiles._replace(keys=tiles.keys // 2, stages=2)
    return tiles._replace(rows=tiles.rows // 2, stages=2) if tiles.rows > 16 else None


class Splits(NamedTuple):
    """Programs that share the keys of a tile, and keys of each."""

    count: int
    chunk: int


def choose_splits(request: AttentionRequest, tiles: Tiles, len_q: int, len_k: int, batch: int, chip: Chip) -> Splits:
    """Divide the keys where tiles alone would leave multiprocessors idle."""
    heads = request.heads_kv
    row_tiles = -(-len_q * (request.heads_q // request.heads_kv) // tiles.rows)
    keys = len_k
    if request.window is not None and request.window[0] is not None:
        right = 0 if request.causal is not Causal.NONE else request.window[1]
        if right is not None:
            keys = min(keys, request.window[0] + right + len_q + tiles.keys)
    steps = max(-(-keys // tiles.keys), 1)
    programs = heads * batch * row_tiles
    slots = chip.multiprocessors * chip.decode_programs
    wanted = max(slots // max(programs, 1), 1)
    if request.page_size is not None and programs * 2 > slots:
        wanted = -(-keys // 4096)  # lengths differ within a batch: even pieces keep the longest from finishing alone
    steps_each = -(-steps // max(min(wanted, steps, 128), 1))
    return Splits(-(-steps // steps_each), steps_each * tiles.keys)


def power_of_two(number: int) -> int:
    return 1 << max(number - 1, 0).bit_length()
