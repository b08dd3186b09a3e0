"""Long calls on a CPU's driver: keys and values are read in chunks through uniform buffers (forward_stream.comp)."""

from __future__ import annotations

from hal_compute.problem import LAYOUT, Call
from hal_compute.sizes import OPEN

from ..runtime.command_buffer import Operand
from ..tiling import STREAM_BYTES, STREAM_LANES, StreamCut
from .device_problem import DeviceProblem


def record_stream(cut: StreamCut, problem: DeviceProblem, call: Call, to: Operand, to_lse: Operand) -> None:
    """One dispatch per key head and chunk of keys, then the merge that writes the result."""
    sizes, parameters, commands = problem.sizes, problem.parameters, problem.commands
    dim, len_k, chunk, tall = sizes.dim, sizes.len_k, cut.keys, cut.rows
    rows = sizes.units * sizes.unit_rows
    query = commands.stage(call.query, dim)
    keys, values = (
        commands.stage(tensor, dim, rows=cut.chunks * chunk, wide=True) for tensor in (call.key, call.value)
    )
    part, part_sums = commands.space(rows * dim * 4), commands.filled(rows * 8, 0.0)
    group = parameters["group"] // sizes.heads_per_unit  # units that read the same keys
    masked = problem.mask is not None
    band = parameters["lower"], parameters["upper"]
    for number in range(cut.chunks):
        start = number * chunk
        count = min(chunk, len_k - start)
        pieces = [(0, sizes.unit_rows, 1)]
        if sizes.heads_per_unit == 1:
            pieces = _pieces(sizes.len_q, (start, count), band, tall)
        elif band == (-OPEN, OPEN) and count % 8 == 0:
            pieces = [(0, sizes.unit_rows, 0)]
        if masked:  # keys that a mask hides are treated as keys outside the band
            pieces = [(begin, end, 1) for begin, end, _ in pieces]
        fresh = True  # units need no barrier between each other: they share nothing
        for unit in range(0, sizes.units, group):
            place = (unit // group * cut.chunks + number) * STREAM_BYTES
            tiles = [operand.part(place, STREAM_BYTES) for operand in (keys, values)]
            for begin, end, banded in pieces:
                # Parameters that other shaders use for plans and splits hold the piece of this dispatch.
                pushed = problem.values(plan_batch=unit, plan_head=begin, block_q=start, chunk=count)
                commands.dispatch(
                    f"forward_stream.{sizes.dtype}",
                    (dim, STREAM_LANES, cut.rows_each, banded, int(masked), int(bool(parameters["softcap"]))),
                    [query, *tiles, part, part_sums, problem.tables[0]],
                    pushed,
                    LAYOUT,
                    (-(-(end - begin) // tall), group, 1),
                    kinds="suusss",
                    after=fresh,
                )
                fresh = False
    pushed, groups = problem.values(unit_rows=rows), commands.spread(-(-rows * dim // 4 // 64))
    commands.dispatch(f"merge.{sizes.dtype}", (dim, 64), [part, part_sums, to, to_lse], pushed, LAYOUT, groups)


def _pieces(len_q: int, chunk: tuple[int, int], band: tuple[int, int], tall: int) -> list[tuple[int, int, int]]:
    """Rows (begin, end, banded) that read some of a chunk (start, count) of the keys, or all of it (banded 0).

    Begins are multiples of `tall`. A chunk whose length is no multiple of 8 is banded, since its end is inside a step.
    """
    (start, count), (lower, upper) = chunk, band
    begin, end = max(start - upper, 0) // tall * tall, min(start + count - lower, len_q)
    inner = min(max(-(-(start + count - 1 - upper) // tall) * tall, begin), max(begin, end))
    outer = min(max(start - lower + 1, inner), end)
    outer = outer if outer == end else outer // tall * tall
    if count % 8 or outer <= inner:
        inner = outer = begin
    found = [(begin, inner, 1), (inner, outer, 0), (outer, end, 1)]
    return [piece for piece in found if piece[0] < piece[1]]
