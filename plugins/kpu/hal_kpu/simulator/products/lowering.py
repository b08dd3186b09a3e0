"""From what an operation asks (`Work`) to the movement program that does it, cut to a machine's buffers.

The schedule is the fastest of all that fit, by the tile-level simulator: the operand that stays, the height of its
panel, double or single buffers, the depth of a piece. More buffer only adds schedules to choose from, and a faster
machine runs each of them no slower (`engines`), so neither makes an operation slower.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import attrs

from ...profiles.profile import Profile
from ..array import Dataflow
from ..cycle_accurate import accurate_below
from ..engines import BufferTooSmallError, check_fit
from ..movement import Opcode, Program
from ..opcodes.work import Work
from ..transactional import cycles_below
from .operand_stationary import operand_stationary
from .output_stationary import output_stationary
from .product import Product, Tiling, spread
from .stream import Stream, streamed

PIECE_BYTES = 128
"""Of one lane in the deepest piece: two bursts of DRAM."""
_FEW = 1000
"""Pieces of a product up to which more depths are tried, and the page-level simulator may choose the schedule."""
_MOST = 8
"""Of a panel, in tiles of height."""


@functools.lru_cache(maxsize=1 << 14)
def lower(work: Work, profile: Profile, dataflow: Dataflow = "os", accurate: bool = False) -> Program | None:
    """The movement program of an operation; None for one that moves nothing.

    Raises:
        BufferTooSmallError: the smallest tiles do not fit, with the buffer, its size and the need.
    """
    if work.engine == "array" and work.macs:
        return lower_product(product_of(work), profile, dataflow, accurate)
    if work.engine == "none" or not (work.reads_bytes or work.writes_bytes):
        return None
    operations = work.elements * work.passes if work.engine == "vector" else 0
    return streamed(
        Stream(
            reads=work.reads_bytes,
            writes=work.writes_bytes,
            operations=operations,
            dtype=work.dtype,
            reorder="identity" if work.engine == "vector" else "shuffle",
        ),
        profile,
    )


def product_of(work: Work) -> Product:
    """The product that an array operation is. One whose b (or a) is the same for the whole batch is one taller
    product.
    """
    size, batch, M, N, K = itemsize(work.dtype), work.batch, work.M, work.N, work.K
    out = max(1, round(work.writes_bytes / (batch * M * N))) if work.writes_bytes else size
    a, b, read = M * K * size, K * N * size, work.reads_bytes or batch * (M + N) * K * size
    share = 1.0
    tall, wide = batch * a + b, a + batch * b  # one b, or one a, for the whole batch
    if batch > 1 and min(tall, wide) <= read < batch * (a + b):
        if tall <= read and not tall < wide <= read:
            batch, M = 1, batch * M
        else:
            batch, N = 1, batch * N
    if read < batch * (a if work.batch == batch else 0) + batch * b:
        share = max(read - batch * b, 0) / (batch * M * K * size)  # overlapping windows of a convolution
        share = min(1.0, max(share, size / (K * size)))
    if not work.epilogue:
        out = min(out, 8)
    return Product(
        batch=batch,
        M=M,
        N=N,
        K=K,
        dtype=work.dtype,
        size=size,
        out_size=out,
        a_share=share,
        epilogue=work.epilogue,
        extra=work.epilogue_bytes,
    )


def itemsize(dtype: str) -> int:
    """Bytes of an element."""
    if dtype.startswith("complex"):
        return int(dtype.removeprefix("complex")) // 8
    digits = "".join(c for c in dtype.split("_")[0] if c.isdigit())
    return int(digits) // 8 if digits else 1


@functools.lru_cache(maxsize=1 << 14)
def lower_product(product: Product, profile: Profile, dataflow: Dataflow = "os", accurate: bool = False) -> Program:
    """The fastest schedule of a product that fits.

    `accurate`: by the page-level simulator, for products of few tiles; for larger ones the tile-level one chooses.

    Raises:
        BufferTooSmallError: none does.
    """
    below = accurate_below if accurate and _few(product, profile) else cycles_below
    programs = sorted(_candidates(product, profile, dataflow), key=lambda program: _bound(program, profile))
    best, fastest = programs[0], 0
    for program in programs if len(programs) > 1 else ():
        if fastest and _bound(program, profile) >= fastest:
            break
        cycles = below(program, profile, fastest)
        if cycles is not None:
            best, fastest = program, cycles
    return best


def _candidates(product: Product, profile: Profile, dataflow: Dataflow) -> list[Program]:
    """Every schedule that fits. Single buffers only where double ones do not fit: a slot more is never slower."""
    found: list[Program] = []
    refused: BufferTooSmallError | None = None
    deepest = max(1, PIECE_BYTES // product.size)
    choice = ((deepest, deepest // 4),) if _few(product, profile) else ((deepest,), (deepest // 4,))
    for depths in (*choice, (deepest // 16,), (1,)):
        for depth in depths:
            for shape in _shapes(product, profile, dataflow) if depth else ():
                for slots in (2, 1):
                    program = _write(product, attrs.evolve(shape, depth=depth, slots=slots), profile, dataflow)
                    try:
                        check_fit(program, profile)
                    except BufferTooSmallError as error:
                        refused = error
                        continue
                    found.append(program)
                    break
        if found:
            return found
    assert refused is not None
    raise refused


def _few(product: Product, profile: Profile) -> bool:
    """Whether a product has few pieces: then there is time to look closer for its schedule."""
    rows, cols, _ = profile.arrays(product.dtype)
    return -(-product.M // rows) * -(-product.N // cols) * -(-product.K * product.size // PIECE_BYTES) <= _FEW


def _write(product: Product, tiling: Tiling, profile: Profile, dataflow: Dataflow) -> Program:
    if dataflow == "os":
        return output_stationary(product, tiling, profile)
    return operand_stationary(product, tiling, profile, inputs=dataflow == "is")


def _shapes(product: Product, profile: Profile, dataflow: Dataflow) -> Iterator[Tiling]:
    """Tilings that differ in what stays in L3 and how much of it."""
    p = product
    rows, cols, arrays = profile.arrays(p.dtype)
    if dataflow != "os":
        batches, _, right = spread(p.batch, 1, -(-(p.M if dataflow == "is" else p.N) // cols), arrays)
        yield Tiling(batches=batches, down=1, right=right, depth=1)
        yield Tiling(batches=batches, down=1, right=right, depth=1, spill=True)
        return
    tiles = -(-p.M // rows), -(-p.N // cols)
    batches, down, right = spread(p.batch, *tiles, arrays)
    plain = Tiling(batches=batches, down=down, right=right, depth=1)
    yield plain
    for stays, extent in (("a", -(-tiles[0] // down)), ("b", -(-tiles[1] // right))):
        panel = 1
        while panel <= min(extent, _MOST):
            yield attrs.evolve(plain, stays=stays, panel=panel)  # type: ignore[arg-type]
            panel *= 2


def _bound(program: Program, profile: Profile) -> int:
    """Cycles that the program cannot go below: its DRAM bytes, its arrays' work."""
    steps = sum((i.steps + i.preload) * times for i, times in program.instructions() if i.opcode is Opcode.COMPUTE)
    size = program.total("bytes", Opcode.DMA_LOAD_TILE, Opcode.DMA_STORE_TILE)
    return max(steps, int(size / profile.bytes_per_cycle()))
