"""Long calls on a processor's driver: keys and values stream through uniform buffers (forward_stream.comp)."""

from __future__ import annotations

import math

from hal_compute.problem import LAYOUT, OPEN, Call

from .commands import Operand, VulkanCommandBuffer
from .recorder import Recorder
from .setting import Setting

_BYTES = 1 << 16  # of keys, and of values, that a uniform buffer holds
_LANES = 8  # invocations of a subgroup, and of a work group
_SHUFFLE = 0x10  # VK_SUBGROUP_FEATURE_SHUFFLE_BIT
#: Bytes of keys, and part of the session's limit, that may be chunks filled less than half: short rows of many
#: sequences.
_SPARE, _SPARE_PART = 128 << 20, 16
#: Multiply-accumulates, per float of a query that an invocation holds, from which compiling that much pays.
_FROM = 1 << 16


def suits(recorder: Recorder, call: Call, dim: int) -> bool:
    """Whether forward_stream.comp is the better kernel: long calls without a block plan on a processor's driver."""
    limits, rows = recorder.adapter.limits, call.query.shape[2]
    if rows < _LANES:
        rows *= call.query.shape[1] // call.key.shape[1]
    large = 2 * call.query.numel() * call.key.shape[2] >= _FROM * dim * _rows_each(rows)
    shuffles = limits["subgroupSize"] == _LANES and limits["subgroupOperations"] & _SHUFFLE
    can = recorder.adapter.is_cpu and limits["maxUniformBufferRange"] >= _BYTES and shuffles
    whole = dim <= 128 and _BYTES % (4 * dim) == 0  # chunks follow each other without gaps
    return bool(call.plan is None and large and can and whole) and _fits(recorder, call, _BYTES // (4 * dim))


def _fits(recorder: Recorder, call: Call, chunk: int) -> bool:
    """Whether keys that fill whole chunks of their buffer fit it, and do not take far more memory than they are."""
    batch, heads, length = call.key.shape[:3]
    nbytes = batch * heads * -(-length // chunk) * _BYTES
    spare = min(_SPARE, recorder.pool.limit // _SPARE_PART)
    return nbytes <= recorder.pool.largest and (2 * length >= chunk or nbytes <= spare)


def _rows_each(rows: int) -> int:
    """Query rows of an invocation for units of `rows`: a power of 2; with 8 compiling takes 10 s and saves nothing."""
    return min(4, 1 << (-(-rows // _LANES) - 1).bit_length())


def record(commands: VulkanCommandBuffer, setting: Setting, call: Call, to: Operand, to_lse: Operand) -> None:
    """One dispatch per key head and chunk of keys that fits a uniform buffer, then the merge that writes the result."""
    dim, len_k = setting.dim, setting.len_k
    rows_each = _rows_each(setting.unit_rows)
    tall, chunk = _LANES * rows_each, _BYTES // (4 * dim)
    chunks, units = -(-len_k // chunk), setting.units
    rows = units * setting.unit_rows
    query = commands.stage(call.query, dim)
    keys, values = (commands.stage(tensor, dim, rows=chunks * chunk, wide=True) for tensor in (call.key, call.value))
    part, part_lse = commands.space(rows * dim * 4), commands.filled(rows * 4, -math.inf)
    group = setting.numbers["group"] // setting.heads_per_unit  # units that read the same keys
    setting.score_in_bits()
    bent = (int(setting.mask is not None), int(bool(call.request.softcap)))
    for number in range(chunks):
        start = number * chunk
        count = min(chunk, len_k - start)
        pieces = [(0, setting.unit_rows, 1)]
        if setting.heads_per_unit == 1:
            pieces = _pieces(setting.len_q, (start, count), (setting.numbers["lower"], setting.numbers["upper"]), tall)
        elif setting.numbers["lower"] == -OPEN and setting.numbers["upper"] == OPEN and count % 8 == 0:
            pieces = [(0, setting.unit_rows, 0)]
        if setting.mask is not None:  # its hidden keys need what keys outside the band need
            pieces = [(begin, end, 1) for begin, end, _ in pieces]
        fresh = True  # no barrier between units: they touch nothing of each other
        for unit in range(0, units, group):
            place = (unit // group * chunks + number) * _BYTES
            tiles = [operand.part(place, _BYTES) for operand in (keys, values)]
            for begin, end, banded in pieces:
                pushed = setting.values(plan_batch=unit, plan_head=begin, block_q=start, chunk=count)
                commands.dispatch(
                    f"forward_stream.{setting.dtype}",
                    (dim, _LANES, rows_each, banded, *bent),
                    [query, *tiles, part, part_lse, setting.tables[0]],
                    pushed,
                    LAYOUT,
                    (-(-(end - begin) // tall), group, 1),
                    kinds="suusss",
                    after=fresh,
                )
                fresh = False
    pushed, groups = setting.values(unit_rows=rows), commands.spread(-(-rows * dim // 4 // 64))
    commands.dispatch(f"merge.{setting.dtype}", (dim, 64), [part, part_lse, to, to_lse], pushed, LAYOUT, groups)


def _pieces(len_q: int, chunk: tuple[int, int], band: tuple[int, int], tall: int) -> list[tuple[int, int, int]]:
    """Rows (begin, end, banded) that read something of a chunk (start, count) of the keys: some or (banded 0) all of
    it.

    Begins are multiples of `tall`. A chunk whose keys are not a multiple of 8 is banded: its end is inside a step.
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
