"""Device memory by sub-allocation: regions of a few large blocks; neighbours are joined when they are freed."""

from __future__ import annotations

import bisect
from collections.abc import Callable
from typing import Any

import attrs

from hal_core.plugin_api import ContractError, HalError, MemoryLimitError

BLOCK = 32 << 20


class OutOfMemoryError(MemoryLimitError):
    """The driver has no memory left, although the session is within its limit."""

    def __init__(self, name: str, whose: str, what: str, nbytes: int, limit: int) -> None:
        HalError.__init__(
            self,
            f"{name} is out of {whose} memory in {what} ({nbytes:,} bytes asked): nothing was run; close other "
            f"programs that use it, call trim(), or shorten the request",
        )
        self.requested, self.in_use, self.limit = nbytes, 0, limit


@attrs.define(eq=False)
class Region:
    """A piece of a block. `block` is what the pool's `create` returned for it."""

    block: Any
    offset: int
    size: int
    freed: bool = False


@attrs.define(eq=False)
class _Block:
    handle: Any
    size: int
    free: list[tuple[int, int]]  # (offset, size), sorted, never adjacent


class DevicePool:
    """Regions of device memory within a limit. Not thread-safe: the session holds its lock."""

    def __init__(
        self,
        name: str,
        create: Callable[[int], Any],
        destroy: Callable[[Any], None],
        *,
        alignment: int,
        largest: int,
        limit: int,
        block: int = BLOCK,
        borrows: bool = False,
    ) -> None:
        """Start empty.

        Args:
            create: allocates a block of so many bytes and returns its handle. destroy: frees it.
            alignment, largest: bytes, of every region. limit: bytes of all blocks.
            block: bytes of a block, at least. borrows: whether blocks are buffers of the session's memory manager.
        """
        self._name, self._create, self._destroy = name, create, destroy
        self.alignment, self.largest, self.limit = alignment, largest, limit
        self.block, self.borrows = min(block, largest), borrows
        #: Bytes of the buffers that the blocks are; 0 unless it borrows them.
        self.borrowed = 0
        self._blocks: list[_Block] = []
        self.in_use = self.peak = self.allocations = self.reuses = 0

    @property
    def reserved(self) -> int:
        """Bytes of all blocks."""
        return sum(block.size for block in self._blocks)

    @property
    def fragmentation(self) -> float:
        """1 - largest free piece / free bytes of the worst block; 0 where each block's free bytes lie together."""
        return max(
            (1 - max(s for _, s in b.free) / sum(s for _, s in b.free) for b in self._blocks if b.free), default=0.0
        )

    def allocate(self, nbytes: int) -> Region:
        """A region of the first free piece that is large enough.

        Raises:
            MemoryLimitError: it would exceed the limit or the largest region.
        """
        size = max(-(-nbytes // self.alignment), 1) * self.alignment
        if size > self.largest:
            raise MemoryLimitError(self._name, size, self.in_use, self.largest)
        for block in self._blocks:
            for place, (offset, free) in enumerate(block.free):
                if free >= size:
                    block.free[place : place + 1] = [(offset + size, free - size)] if free > size else []
                    self.reuses += 1
                    return self._take(block, offset, size)
        wanted = max(size, self.block)
        if self.reserved + wanted > self.limit:
            self.trim()
            wanted = size
        if self.reserved + wanted > self.limit:
            raise MemoryLimitError(self._name, size, self.in_use, self.limit)
        block = _Block(self._create(wanted), wanted, [(size, wanted - size)] if wanted > size else [])
        self._blocks.append(block)
        return self._take(block, 0, size)

    def _take(self, block: _Block, offset: int, size: int) -> Region:
        self.allocations += 1
        self.in_use += size
        self.peak = max(self.peak, self.in_use)
        return Region(block.handle, offset, size)

    def free(self, region: Region) -> None:
        """Free a region and join it with its free neighbours."""
        if region.freed:
            raise ContractError("this region was freed already: allocate a new one")
        region.freed = True
        block = next(b for b in self._blocks if b.handle is region.block)
        bisect.insort(block.free, (region.offset, region.size))
        joined: list[tuple[int, int]] = []
        for offset, size in block.free:
            if joined and joined[-1][0] + joined[-1][1] == offset:
                joined[-1] = (joined[-1][0], joined[-1][1] + size)
            else:
                joined.append((offset, size))
        block.free = joined
        self.in_use -= region.size

    def free_all(self) -> None:
        """Free every region at once, also those that an interrupted caller has lost."""
        for block in self._blocks:
            block.free = [(0, block.size)]
        self.in_use = 0

    def trim(self) -> int:
        """Free blocks without a region in use; returns their bytes. Resets `peak`."""
        self.peak = self.in_use
        idle = [b for b in self._blocks if b.free == [(0, b.size)]]
        self._blocks = [b for b in self._blocks if b not in idle]
        for block in idle:
            self._destroy(block.handle)
        return sum(block.size for block in idle)
