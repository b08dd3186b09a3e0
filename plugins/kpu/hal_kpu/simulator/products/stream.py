"""Operations without a product: tiles stream from DRAM through the vector units, or through the block movers, and
back.
"""

from __future__ import annotations

import itertools

import attrs

from ...profiles.profile import Profile
from ..engines import BufferTooSmallError, capacity
from ..movement import Builder, Place, Program, Reorder

CHUNK = 4096
"""Bytes of a tile beside one array: four of them are in its L2 at a time."""


@attrs.frozen(kw_only=True)
class Stream:
    """What streams: bytes read and written, and the vector operations done on the way (0: none)."""

    reads: int
    writes: int
    operations: int = 0
    dtype: str = "float32"
    reorder: Reorder = "identity"


def streamed(stream: Stream, profile: Profile) -> Program:
    """The movement program of an elementwise operation, a reduction or a copy, over all arrays of the machine.

    Raises:
        BufferTooSmallError: the smallest tile does not fit.
    """
    arrays = profile.count("array.tiles")
    room = min(capacity(profile, "L2", arrays), capacity(profile, "L3", arrays)) // 4
    largest = max(stream.reads, stream.writes, 1)
    chunk = min(CHUNK * arrays, largest)
    while chunk > room:
        chunk //= 2
    if chunk < 1:
        raise BufferTooSmallError(
            f"profile {profile.name}: L2 and L3 hold {4 * room} B, 4 B are needed for one element"
        )
    parts = -(-largest // chunk)
    builder = Builder(f"stream of {stream.reads} B to {stream.writes} B", arrays, stream.dtype)
    source, target = builder.region(stream.reads), builder.region(stream.writes)
    totals = stream.reads, stream.writes, stream.operations
    slots = 2 if parts > 1 else 1
    for name, level, total in (
        ("in L3", "L3", stream.reads),
        ("in L2", "L2", stream.reads),
        ("out L2", "L2", stream.writes),
        ("out L3", "L3", stream.writes),
    ):
        builder.buffer(name, level, slots, -(-total // parts))  # type: ignore[arg-type]
    edges = sorted({0, parts, *(total % parts for total in totals)})  # the first total % parts pieces are one larger
    at = [source, target]
    for first, last in itertools.pairwise(edges):
        reads, writes, operations = (total // parts + (first < total % parts) for total in totals)
        with builder.loop(last - first):
            count = (last - first,)
            places = Place(at[0], reads, 1, 0, (reads,), count), Place(at[1], writes, 1, 0, (writes,), count)
            _piece(builder, stream, reads, writes, operations, *places)
        at = [at[0] + (last - first) * reads, at[1] + (last - first) * writes]
    return builder.build()


def _piece(b: Builder, stream: Stream, reads: int, writes: int, operations: int, source: Place, target: Place) -> None:
    """One tile in, through, and out."""
    if reads:
        b.load("in L3", reads, channel=0, place=source)
    if stream.operations:
        if reads:
            b.move("in L3", "in L2", reads, mover=0)
        b.vector(["in L2"] if reads else [], ["out L2"] if writes else [], operations=operations, size=reads + writes)
        if writes:
            b.move("out L2", "out L3", writes, mover=2)
    elif writes:
        b.move(["in L3"] if reads else [], "out L3", writes, mover=0, reorder=stream.reorder)
    if writes:
        b.store("out L3", writes, channel=2, place=target, late=True)
