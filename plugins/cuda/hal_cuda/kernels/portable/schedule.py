"""Which tile a decode step uses and among how many programs its keys are divided: the least of a modelled time.

A program owns some rows of one key head and walks its part of the keys, tile by tile. As many programs run at once as
multiprocessors hold (registers, shared memory); they begin together, so the work is done in waves. A wave takes the
longer of two times: that of its bytes at the device's bandwidth, and that of one program, which is a chain of latencies
where it is alone on its multiprocessor, and of the products and conversions of all where there are several. Dividing
the keys makes more and shorter programs, and adds the joining of their results.
"""

from __future__ import annotations

from typing import NamedTuple

from ...discovery import Chip

REGISTERS = 65536  # of a multiprocessor
_RESERVED = 1024  # bytes of shared memory that each program takes beside its own
#: Parts of the keys that the last program of a tile joins at most.
MOST_JOINED = 16
MERGED = 16  # parts that the second kernel reads at a time
#: Parts that are considered.
PARTS = (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, 24, 28, 32, 40, 48, 64, 96, 128)


class Tiles(NamedTuple):
    """Rows and keys of a tile, warps of a program, stages of its loads."""

    rows: int
    keys: int
    warps: int
    stages: int


class Work(NamedTuple):
    """A decode step.

    heads: key heads times batch entries. rows: query rows of a head that share its keys. keys: of each head. dim_qk,
    dim_v: head sizes as the kernel computes them. bits: of a number of keys and values. size: bytes of the query's.
    cache: its dtype, or None.
    """

    heads: int
    rows: int
    keys: int
    dim_qk: int
    dim_v: int
    bits: int
    size: int
    cache: str | None

    @property
    def numbers(self) -> int:
        """Numbers of one key and its value."""
        return self.dim_qk + self.dim_v


class Costs(NamedTuple):
    """The model's constants, in seconds, fitted to sweeps over tiles and parts on one H200.

    start: of a program, until its first tile is there. tile: of the chain of latencies of a tile, beside `number` for
    each number of its keys and values that a program alone on its multiprocessor takes, by the cache's dtype. share:
    of that time which a program takes from the others of its multiprocessor. opened: of the memory for each tile,
    beside its bytes. again: of a second wave, whose programs still begin nearly together; those of later waves no
    longer do. join, round: of joining by the last program of a
    tile, and of each of its rounds. merge, merged: of the second kernel, and for each row.
    """

    start: float
    tile: float
    share: float
    opened: float
    again: float
    join: float
    round: float
    merge: float
    merged: float
    number: dict[str | None, float]


COSTS = Costs(
    start=3.0e-6,
    tile=0.49e-6,
    share=0.8,
    opened=0.3e-9,
    again=1.5e-6,
    join=1.5e-6,
    round=0.9e-6,
    merge=4.5e-6,
    merged=8e-9,
    number={None: 30e-12, "int8": 37e-12, "int4": 33e-12, "float8_e4m3fn": 34e-12, "float8_e5m2": 34e-12},
)


def resident(work: Work, tiles: Tiles, chip: Chip) -> int:
    """Programs that a multiprocessor holds at once.

    Triton keeps one tile less than stages in shared memory, and the query and the weights of a tile. Registers are
    those of compiled kernels: about 56, and 7 for every 16 numbers of a tile that a thread holds.
    """
    threads = 32 * tiles.warps
    shared = (tiles.stages - 1) * tiles.keys * work.numbers * work.bits // 8
    shared += tiles.rows * (work.dim_qk + tiles.keys) * work.size + _RESERVED
    registers = min(56 + 7 * tiles.keys * work.numbers // (16 * threads), 255)
    return max(min(chip.shared_memory // shared, REGISTERS // (registers * threads)), 1)


def rows_joined(tiles: Tiles, dim_v: int) -> int:
    """Rows whose partial results the last program of a tile joins in one round: they fill 64 registers of a thread."""
    return min(tiles.rows, max(64 * 32 * tiles.warps // (MOST_JOINED * dim_v), 1))


def fastest(work: Work, tiles: Tiles, most_joined: int, chip: Chip, costs: Costs = COSTS) -> tuple[float, int]:
    """(modelled seconds beside what every launch takes, parts of the keys) of the best division for given tiles.

    most_joined: parts up to which the last program of a tile may join them; beyond, a second kernel does.
    """
    row_tiles = -(-work.rows // tiles.rows)
    whole = work.heads * row_tiles
    tiles_of_keys = max(-(-work.keys // tiles.keys), 1)
    numbers, processors = tiles.keys * work.numbers, chip.multiprocessors
    alone = costs.tile + costs.number[work.cache] * numbers
    reading, beside = numbers * work.bits / 8 / chip.bandwidth + costs.opened, costs.share * alone
    slots = resident(work, tiles, chip) * processors
    joining = costs.join + costs.round * -(-min(work.rows, tiles.rows) // rows_joined(tiles, work.dim_v))
    merging = costs.merge + costs.merged * work.heads * work.rows
    best, steps_before = (float("inf"), 1), 0
    for wanted in PARTS:
        steps = -(-tiles_of_keys // min(wanted, tiles_of_keys))
        if steps == steps_before:
            continue
        steps_before, parts = steps, -(-tiles_of_keys // steps)
        programs = whole * parts
        time = costs.again if programs > slots else 0.0
        for count, running in ((programs // slots, slots), (1, programs % slots)):
            if count and running:
                together = max(-(-running // processors) * beside, alone)
                time += count * max(costs.start + steps * together, steps * running * reading)
        if parts > 1:
            time += joining if parts <= most_joined else merging + costs.round * (parts // MERGED)
        if time < best[0]:
            best = time, parts
        if programs > 4 * slots:
            break
    return best


def tile_choices(rows: int, wide: int, plain: bool, size: int, cache: str | None) -> tuple[Tiles, ...]:
    """Tiles that a step may use: two kernels at most, as each is compiled once.

    rows: of the tile. wide: the larger head size as the kernel computes it. plain: there is no mask, whose loads take
    the registers of larger tiles. size: bytes of a number of the query.
    """
    if size > 2:
        return (Tiles(rows, 32, 4, 2),)
    if not plain:
        return (Tiles(rows, 64, 4, 2),)
    if rows > 32:
        return (Tiles(rows, 64, 4, 3),)
    if cache is not None:
        return (Tiles(rows, 128 if wide <= 128 else 64, 4, 3),)
    if wide <= 64:
        return (Tiles(rows, 128, 4, 3),)
    if wide <= 128:
        return (Tiles(rows, 64, 4, 4), Tiles(rows, 128, 4, 3))
    return (Tiles(rows, 64, 4, 3), Tiles(rows, 32, 4, 3))
