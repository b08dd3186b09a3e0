"""The PE array, cycle by cycle: values, cycles and active MACs from the same registers.

Every PE has a register for the operand that goes right, one for the operand that goes down (a partial sum where an
operand is stationary), and an accumulator or a stationary operand. Beside each moving register go two bits: a slot (the
streamer sent something in this cycle) and real (it is an element of the matrix, not the filling of a ragged tile). A PE
fires when both its slots are set: nothing else starts a multiply-accumulate, and no count comes from a formula.

Tiles of one product do not depend on each other, so their arrays stand side by side: the state is [rows, cols, tiles],
and one step moves every register of every tile by one cycle.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal, TypeAlias

import attrs
import numpy as np
from numpy.typing import NDArray

from hal_core.plugin_api import ContractError

Dataflow: TypeAlias = Literal["os", "ws", "is"]
Array: TypeAlias = NDArray[Any]
DATAFLOWS: tuple[Dataflow, ...] = ("os", "ws", "is")
SLOT, REAL = 1, 2
_STATE_BYTES = 1 << 18  # one register of all tiles that step together: stays in a core's cache


@attrs.frozen
class Wavefront:
    """What the array did.

    Attributes:
        product: [batch, M, N], in the accumulators' dtype.
        tile_cycles: of each tile, from its first operand (or stationary row) to its last firing, int64 [tiles].
        drain_cycles: of each tile, cycles in which outputs still leave the array after the last firing, int64 [tiles].
        active_macs: firings with two real operands, over all tiles.
        firings: all firings, filling included: PEs x cycles they were occupied.
    """

    product: Array
    tile_cycles: NDArray[np.int64]
    drain_cycles: NDArray[np.int64]
    active_macs: int
    firings: int

    @property
    def compute_cycles(self) -> int:
        """Index of the last cycle with a firing when the tiles run one after the other, counted from 0 (as
        SCALE-Sim).
        """
        return int(self.tile_cycles.sum()) - 1


def accumulator_dtype(*dtypes: np.dtype[Any]) -> np.dtype[Any]:
    """int32 for integers of up to 32 bits (wraps, as two's complement does), int64 above, floats at least float32."""
    wide = np.result_type(*dtypes)
    if wide.kind in "biu":
        return np.dtype(np.int64 if wide.itemsize > 4 or wide == np.uint32 else np.int32)
    return np.dtype(np.float64 if wide == np.float64 else np.float32)


def multiply(
    a: Array, b: Array, rows: int, cols: int, dataflow: Dataflow = "os", delays: tuple[tuple[str, int, int], ...] = ()
) -> Wavefront:
    """a @ b on a rows x cols array.

    Args:
        a: [batch, M, K] or [M, K]. b: [batch, K, N] or [K, N]. Integers or floats.
        dataflow: what stays in the PEs: "os" outputs, "ws" b (the weights), "is" a (the inputs).
        delays: registers made one cycle late, as (which, row, col), which being "right" or "down". For tests: the
            values, the firings and the cycles then come out as a chip with that fault would give them.

    Raises:
        ContractError: shapes that do not fit each other, an empty operand, or an unknown dataflow.
    """
    if a.ndim == b.ndim == 2:
        a, b = a[None], b[None]
    if a.ndim != 3 or b.ndim != 3 or a.shape[0] != b.shape[0] or a.shape[2] != b.shape[1] or not a.size * b.size:
        raise ContractError(
            f"an array multiplies [batch, M, K] by [batch, K, N], none of them 0; {list(a.shape)} and {list(b.shape)} "
            "were given: reshape them"
        )
    if dataflow not in DATAFLOWS:
        raise ContractError(f"dataflow {dataflow!r} was given: use 'os', 'ws' or 'is'")
    if min(rows, cols) < 1:
        raise ContractError(f"an array of {rows} x {cols} was given: at least one row and one column are wanted")
    dtype = accumulator_dtype(a.dtype, b.dtype)
    a, b = a.astype(dtype, copy=False), b.astype(dtype, copy=False)
    with np.errstate(over="ignore", invalid="ignore"):
        if dataflow == "os":
            return _output_stationary(a, b, rows, cols, delays)
        if dataflow == "ws":
            return _operand_stationary(a, b, rows, cols, delays)
        turned = _operand_stationary(b.transpose(0, 2, 1), a.transpose(0, 2, 1), rows, cols, delays)
        return attrs.evolve(turned, product=turned.product.transpose(0, 2, 1))


class _Registers:
    """One moving register of every PE, [rows, cols, tiles], with its bits. Two copies: before and after a clock
    edge.
    """

    def __init__(
        self, shape: tuple[int, int, int], dtype: np.dtype[Any], down: bool, late: list[tuple[int, int]]
    ) -> None:
        self.value, self._next = np.zeros(shape, dtype), np.zeros(shape, dtype)
        self.bits, self._next_bits = np.zeros(shape, np.uint8), np.zeros(shape, np.uint8)
        self._down = down
        # a late register has a second one behind it
        self._late = [(at, np.zeros(shape[2], dtype), np.zeros(shape[2], np.uint8)) for at in late]

    def clock(self, edge: Array | int, edge_bits: NDArray[np.uint8], passing: Array | None = None) -> None:
        """Move one PE on; the edge takes [lanes, tiles] from a streamer. `passing`: what the PEs send, if not the
        value.
        """
        value = self.value if passing is None else passing
        if self._down:
            self._next[1:], self._next_bits[1:] = value[:-1], self.bits[:-1]
            self._next[0], self._next_bits[0] = edge, edge_bits
        else:
            self._next[:, 1:], self._next_bits[:, 1:] = value[:, :-1], self.bits[:, :-1]
            self._next[:, 0], self._next_bits[:, 0] = edge, edge_bits
        for index, (at, held, held_bits) in enumerate(self._late):
            arriving, arriving_bits = self._next[at].copy(), self._next_bits[at].copy()
            self._next[at], self._next_bits[at] = held, held_bits
            self._late[index] = (at, arriving, arriving_bits)
        self.value, self._next = self._next, self.value
        self.bits, self._next_bits = self._next_bits, self.bits


class _Count:
    """Firings of every tile, and when the last one was."""

    def __init__(self, tiles: int) -> None:
        self.last = np.full(tiles, -1, np.int64)
        self.firings = self.active = 0

    def see(self, cycle: int, fires: Array) -> None:
        """`fires`: bits that both operands of a PE have, [rows, cols, tiles]."""
        slots = np.bitwise_or.reduce(fires.reshape(-1, fires.shape[2]), axis=0) & SLOT
        self.last[slots != 0] = cycle
        self.firings += int(np.count_nonzero(fires))
        self.active += int(np.count_nonzero(fires & REAL))


class _Totals:
    """Firings over all parts."""

    def __init__(self) -> None:
        self.firings = self.active = 0

    def add(self, seen: _Count) -> None:
        self.firings += seen.firings
        self.active += seen.active


def _split(number: int, shape: tuple[int, int], itemsize: int) -> Iterator[slice]:
    """Tiles that step together."""
    step = max(1, _STATE_BYTES // (shape[0] * shape[1] * itemsize))
    for start in range(0, number, step):
        yield slice(start, min(start + step, number))


def _skew(stream: Array, length: int) -> Array:
    """What a streamer sends in each cycle, lane i from cycle i on: [lanes, steps, groups] -> [length, lanes,
    groups].
    """
    lanes, steps, groups = stream.shape
    sent = np.zeros((length, lanes, groups), stream.dtype)
    for lane in range(lanes):
        sent[lane : lane + steps, lane] = stream[lane]
    return sent


def _blocks(matrix: Array, lanes: int) -> tuple[Array, Array]:
    """[batch, size, steps] cut along size into filled blocks: ([lanes, steps, batch x blocks], its bits)."""
    batch, size, steps = matrix.shape
    blocks = -(-size // lanes)
    filled = np.zeros((batch, blocks * lanes, steps), matrix.dtype)
    filled[:, :size] = matrix
    bits = np.full((batch, blocks * lanes, steps), SLOT, np.uint8)
    bits[:, :size] |= REAL
    shape = (batch * blocks, lanes, steps)
    return filled.reshape(shape).transpose(1, 2, 0), bits.reshape(shape).transpose(1, 2, 0)


def _output_stationary(a: Array, b: Array, rows: int, cols: int, delays: tuple[tuple[str, int, int], ...]) -> Wavefront:
    """a goes right, b goes down, sums stay; then every column shifts its sums out at the bottom, a row a cycle."""
    (batch, M, K), N = a.shape, b.shape[2]
    down_tiles, right_tiles = -(-M // rows), -(-N // cols)
    length = K + rows + cols - 2 + 2 * len(delays)
    left, left_bits = (_skew(x, length) for x in _blocks(a, rows))
    top, top_bits = (_skew(x, length) for x in _blocks(b.transpose(0, 2, 1), cols))
    tile = np.arange(batch * down_tiles * right_tiles)
    group = tile // (down_tiles * right_tiles)
    from_left = group * down_tiles + tile // right_tiles % down_tiles
    from_top = group * right_tiles + tile % right_tiles
    sums = np.empty((rows, cols, len(tile)), a.dtype)
    totals, cycles = _Totals(), np.empty(len(tile), np.int64)
    for part in _split(len(tile), (rows, cols), a.itemsize):
        at_left, at_top = from_left[part], from_top[part]
        shape = (rows, cols, len(at_left))
        right = _Registers(shape, a.dtype, False, [d[1:] for d in delays if d[0] == "right"])
        down = _Registers(shape, a.dtype, True, [d[1:] for d in delays if d[0] == "down"])
        total, product, seen = np.zeros(shape, a.dtype), np.empty(shape, a.dtype), _Count(len(at_left))
        for cycle in range(length):
            right.clock(left[cycle][:, at_left], left_bits[cycle][:, at_left])
            down.clock(top[cycle][:, at_top], top_bits[cycle][:, at_top])
            fires = right.bits & down.bits
            np.multiply(right.value, down.value, out=product)
            if delays:  # else a value never meets an empty register
                product[fires == 0] = 0
            total += product
            seen.see(cycle, fires)
        for step in range(rows):  # the bottom row leaves first
            sums[rows - 1 - step][:, part] = total[-1]
            total[1:] = total[:-1].copy()
        cycles[part] = seen.last + 1
        totals.add(seen)
    shaped = sums.reshape(rows, cols, batch, down_tiles, right_tiles).transpose(2, 3, 0, 4, 1)
    product_ = shaped.reshape(batch, down_tiles * rows, right_tiles * cols)[:, :M, :N]
    return Wavefront(product_, cycles, np.full(len(tile), rows, np.int64), totals.active, totals.firings)


def _operand_stationary(
    a: Array, b: Array, rows: int, cols: int, delays: tuple[tuple[str, int, int], ...]
) -> Wavefront:
    """b is shifted in from the top and stays; a goes right, partial sums go down and leave at the bottom as they are
    done.
    """
    (batch, M, K), N = a.shape, b.shape[2]
    deep_tiles, right_tiles = -(-K // rows), -(-N // cols)
    length = M + rows + cols - 2 + 2 * len(delays)
    left, left_bits = (_skew(x, length) for x in _blocks(a.transpose(0, 2, 1), rows))
    start = np.full((cols, M, 1), SLOT | REAL, np.uint8)  # each partial sum starts as a zero at the top
    top_bits = _skew(start, length)
    weights, weight_bits = _stationary(b, rows, cols)
    tile = np.arange(batch * right_tiles * deep_tiles)  # the sum over K runs innermost
    group = tile // (right_tiles * deep_tiles)
    from_left = group * deep_tiles + tile % deep_tiles
    sums = np.zeros((M, cols, batch * right_tiles), a.dtype)
    totals, cycles = _Totals(), np.empty(len(tile), np.int64)
    late = {way: [d[1:] for d in delays if d[0] == way] for way in ("right", "down")}
    for part in _split(len(tile), (rows, cols), a.itemsize):
        at_left = from_left[part]
        shape = (rows, cols, len(at_left))
        held = _Registers(shape, a.dtype, True, late["down"])
        for step in range(rows):  # the bottom row goes in first
            held.clock(weights[rows - 1 - step][:, part], weight_bits[rows - 1 - step][:, part])
        right, down = _Registers(shape, a.dtype, False, late["right"]), _Registers(shape, a.dtype, True, late["down"])
        outgoing, seen = np.zeros(shape, a.dtype), _Count(len(at_left))
        left_at, bits_at = (
            np.zeros((length, cols, len(at_left)), a.dtype),
            np.zeros((length, cols, len(at_left)), np.uint8),
        )
        for cycle in range(length):
            right.clock(left[cycle][:, at_left], left_bits[cycle][:, at_left])
            down.clock(0, top_bits[cycle], passing=outgoing)
            fires = right.bits & down.bits
            np.multiply(right.value, held.value, out=outgoing)
            if delays:
                outgoing[fires == 0] = 0
            outgoing += down.value
            seen.see(rows + cycle, (fires & SLOT) | (fires & held.bits & REAL))
            left_at[cycle], bits_at[cycle] = outgoing[-1], down.bits[-1]
        first = bits_at.argmax(axis=0)  # a column's results leave in consecutive cycles
        order = np.minimum(first[None] + np.arange(M)[:, None, None], length - 1)
        results = np.take_along_axis(left_at, order, axis=0)
        for index, number in enumerate(range(part.start, part.stop)):
            sums[:, :, number // deep_tiles] += results[:, :, index]
        cycles[part] = seen.last + 1
        totals.add(seen)
    shaped = sums.reshape(M, cols, batch, right_tiles).transpose(2, 0, 3, 1)
    product = shaped.reshape(batch, M, right_tiles * cols)[:, :, :N]
    return Wavefront(product, cycles, np.zeros(len(tile), np.int64), totals.active, totals.firings)


def _stationary(b: Array, rows: int, cols: int) -> tuple[Array, NDArray[np.uint8]]:
    """[batch, K, N] as filled tiles [rows, cols, batch x right x deep] with their bits."""
    batch, K, N = b.shape
    deep, right = -(-K // rows), -(-N // cols)
    filled, bits = (
        np.zeros((batch, deep * rows, right * cols), b.dtype),
        np.full((deep * rows, right * cols), SLOT, np.uint8),
    )
    filled[:, :K, :N] = b
    bits[:K, :N] |= REAL

    def tiles(x: Array) -> Array:
        return x.reshape(-1, deep, rows, right, cols).transpose(2, 4, 0, 3, 1).reshape(rows, cols, -1)

    return tiles(filled), tiles(np.broadcast_to(bits, (batch, *bits.shape)))
