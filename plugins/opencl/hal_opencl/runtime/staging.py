"""Copies between the host and a device's own memory through a ring of pinned slots.

The host copies into one slot while the device reads another, and pinned memory stays bounded for tensors of any size.
"""

from __future__ import annotations

from collections import deque
from typing import Any, NamedTuple

import numpy as np
import pyopencl as cl
import torch
from hal_compute.staging import pieces
from torch import Tensor

from hal_core.plugin_api import HalError

from .engine import Engine

_SLOT = 4 << 20  # bytes
_BYTES: Any = np.uint8
_SLOTS = 4


class _Slot(NamedTuple):
    """A pinned buffer, its mapping, and its bytes as the host sees them."""

    buffer: Any
    mapping: Any
    host: Tensor


class StagingRing:
    """At most `_SLOTS` slots, created when copies need them. Not thread-safe: the session holds its lock."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._free: deque[_Slot] = deque()
        self._busy: deque[tuple[Any, _Slot]] = deque()  # (event of the last command that uses it, slot), oldest first
        self._made = 0  # slots that exist

    @property
    def nbytes(self) -> int:
        """Bytes of pinned memory that the ring holds now."""
        return self._made * _SLOT

    def upload(self, tensor: Tensor, buffer: Any, offset: int, dim: int) -> None:
        """Queue a copy of a tensor of any strides to `offset`; its rows are padded with zeros to `dim` elements.

        The tensor may change once this returns: its values have been read.
        """
        place, slot, filled = offset, None, 0
        for piece, width in pieces(tensor, dim, _SLOT):
            nbytes, last = len(piece) * width * piece.element_size(), piece.shape[1]
            if slot is not None and filled + nbytes > _SLOT:  # pieces share a slot while they fit
                place += self._send(slot, buffer, place, filled)
                slot = None
            if slot is None:
                slot, filled = self._take(), 0
            rows = slot.host[filled : filled + nbytes].view(piece.dtype).view(-1, width)
            rows[:, :last].copy_(piece)
            if width != last:
                rows[:, last:].zero_()
            filled += nbytes
        if slot is not None:
            self._send(slot, buffer, place, filled)

    def download(self, buffer: Any, offset: int, tensor: Tensor, dim: int, what: str) -> None:
        """Fill a contiguous tensor from rows of `dim` elements at `offset`, after everything that is in the queue.

        Raises:
            DeviceUnavailableError: `what`, the work for messages, did not end in time.
        """
        place, coming = offset, deque[tuple[Any, _Slot, Tensor]]()
        width = dim
        try:
            for piece, width in pieces(tensor, dim, _SLOT):
                if len(coming) == _SLOTS:
                    self._receive(coming, width, what)
                slot, nbytes = self._take(), len(piece) * width * piece.element_size()
                event = self._copy(slot, slot.host.numpy()[:nbytes], buffer, src_offset=place)
                coming.append((event, slot, piece))
                place += nbytes
            while coming:
                self._receive(coming, width, what)
        finally:  # after a failure the device may still write to these slots
            self._busy.extend((event, slot) for event, slot, _ in coming)

    def _send(self, slot: _Slot, buffer: Any, place: int, nbytes: int) -> int:
        self._busy.append((self._copy(slot, buffer, slot.host.numpy()[:nbytes], dst_offset=place), slot))
        return nbytes

    def _copy(self, slot: _Slot, target: Any, source: Any, **place: Any) -> Any:
        """Queue a copy to or from a slot and return its event; the slot is free again where that fails."""
        try:
            with self._engine.named("copy operands or results"):
                return cl.enqueue_copy(self._engine.queue, target, source, is_blocking=False, **place)
        except HalError:
            self._free.append(slot)
            raise

    def _receive(self, coming: deque[tuple[Any, _Slot, Tensor]], width: int, what: str) -> None:
        """Wait for the oldest copy to the host, and read it from its slot."""
        event, slot, piece = coming[0]
        self._engine.wait(what, event=event)
        rows = slot.host[: len(piece) * width * piece.element_size()].view(piece.dtype).view(-1, width)
        piece.copy_(rows[:, : piece.shape[1]])
        coming.popleft()
        self._free.append(slot)

    def _take(self) -> _Slot:
        """A slot that no command uses: a new one up to `_SLOTS`, then the oldest."""
        if not self._free and self._made < _SLOTS:
            return self._make()
        if not self._free:
            self._reap()
        return self._free.popleft()

    def _make(self) -> _Slot:
        engine = self._engine
        with engine.named(f"pin {_SLOT:,} bytes", _SLOT):
            flags = cl.mem_flags.READ_WRITE | cl.mem_flags.ALLOC_HOST_PTR
            buffer = cl.Buffer(engine.context, flags, _SLOT)
            both: Any = cl.map_flags.READ | cl.map_flags.WRITE
            host, _ = cl.enqueue_map_buffer(engine.queue, buffer, both, 0, (_SLOT,), _BYTES, is_blocking=True)
        self._made += 1
        return _Slot(buffer, host.base, torch.from_numpy(host))

    def _reap(self) -> None:
        """Wait until the oldest command has ended and its slot is free."""
        event = self._busy[0][0]
        try:
            self._engine.wait("copy operands", event=event)
        finally:
            if self._engine.ended(event):  # a copy that failed has ended too
                self._free.append(self._busy.popleft()[1])

    def trim(self) -> int:
        """Free the ring once no command uses it; returns its bytes."""
        while self._busy:
            self._reap()
        freed = len(self._free) * _SLOT
        for slot in self._free:
            slot.mapping.release(self._engine.queue)
            slot.buffer.release()
        self._made -= len(self._free)
        self._free.clear()
        return freed
