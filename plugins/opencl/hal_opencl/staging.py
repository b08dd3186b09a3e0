"""Copies between the host's memory and a device's own, through a ring of pinned slots: the copy into one slot runs
while the device reads another, and pinned memory stays bounded whatever the tensors' size."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pyopencl as cl
import torch
from torch import Tensor

from hal_core.plugin_api import HalError

if TYPE_CHECKING:
    from .engine import Engine

_SLOT = 4 << 20  # bytes
_SLOTS = 4


class _Slot(NamedTuple):
    """A pinned buffer, its mapping, and its bytes as the host sees them."""

    buffer: Any
    mapping: Any
    host: Tensor


class StagingRing:
    """At most `_SLOTS` slots, made as copies need them. Used by one thread at a time: the session holds its lock."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._free: deque[_Slot] = deque()
        self._busy: deque[tuple[Any, _Slot]] = deque()  # (event of the last command that uses it, slot), oldest first
        self._made = 0  # slots that there are

    @property
    def nbytes(self) -> int:
        """Bytes of pinned memory that the ring holds now."""
        return self._made * _SLOT

    def upload(self, tensor: Tensor, buffer: Any, offset: int, dim: int) -> None:
        """Queue a copy of a tensor of any strides; from `offset` on its rows have `dim` elements, filled up with zeros.

        The tensor may change once this returns: its values are in pinned slots then, or beyond.
        """
        tensor, dim = _flat(tensor, dim)
        width, last = dim * tensor.element_size(), tensor.shape[-1]
        rows_each, place = _SLOT // width, offset
        slot, filled = None, 0
        for piece in _pieces(tensor, rows_each):
            if slot is not None and filled + len(piece) > rows_each:
                place += self._send(slot, buffer, place, filled * width)
                slot = None
            if slot is None:
                slot, filled = self._take(), 0
            typed = slot.host[: rows_each * width].view(tensor.dtype).view(rows_each, dim)[filled : filled + len(piece)]
            typed[:, :last].copy_(piece)
            if dim != last:
                typed[:, last:].zero_()
            filled += len(piece)
        if slot is not None:
            self._send(slot, buffer, place, filled * width)

    def download(self, buffer: Any, offset: int, tensor: Tensor, dim: int, what: str) -> None:
        """Fill a contiguous tensor from rows of `dim` elements at `offset`, once the device has done what was queued
        before.

        Raises:
            DeviceUnavailableError: `what`, the work in words, did not end in time.
        """
        tensor, dim = _flat(tensor, dim)
        width, rows_each = dim * tensor.element_size(), _SLOT // (dim * tensor.element_size())
        place, coming = offset, deque[tuple[Any, _Slot, Tensor]]()
        try:
            for piece in _pieces(tensor, rows_each):
                if len(coming) == _SLOTS:
                    self._receive(coming, dim, what)
                slot, nbytes = self._take(), len(piece) * width
                event = self._copy(slot, slot.host.numpy()[:nbytes], buffer, src_offset=place)
                coming.append((event, slot, piece))
                place += nbytes
            while coming:
                self._receive(coming, dim, what)
        finally:  # after a failure the device may still write to them
            self._busy.extend((event, slot) for event, slot, _ in coming)

    def _send(self, slot: _Slot, buffer: Any, place: int, nbytes: int) -> int:
        self._busy.append((self._copy(slot, buffer, slot.host.numpy()[:nbytes], dst_offset=place), slot))
        return nbytes

    def _copy(self, slot: _Slot, target: Any, source: Any, **place: int) -> Any:
        """Queue a copy to or from a slot, which is free again where that fails; gives the copy's event."""
        try:
            with self._engine.named("copy operands or results"):
                return cl.enqueue_copy(self._engine.queue, target, source, is_blocking=False, **place)
        except HalError:
            self._free.append(slot)
            raise

    def _receive(self, coming: deque[tuple[Any, _Slot, Tensor]], dim: int, what: str) -> None:
        """Wait for the oldest copy that comes, and read it out of its slot."""
        event, slot, piece = coming[0]
        self._engine.wait(what, event=event)
        typed = slot.host[: len(piece) * dim * piece.element_size()].view(piece.dtype).view(len(piece), dim)
        piece.copy_(typed[:, : piece.shape[1]])
        coming.popleft()
        self._free.append(slot)

    def _take(self) -> _Slot:
        """A slot that no command uses: a new one while there are fewer than the ring has, then the oldest."""
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
            both = cl.map_flags.READ | cl.map_flags.WRITE
            host, _ = cl.enqueue_map_buffer(engine.queue, buffer, both, 0, (_SLOT,), np.uint8, is_blocking=True)
        self._made += 1
        return _Slot(buffer, host.base, torch.from_numpy(host))

    def _reap(self) -> None:
        """Wait until the oldest command is done with its slot."""
        event = self._busy[0][0]
        try:
            self._engine.wait("copy operands", event=event)
        finally:
            if self._engine.ended(event):  # a copy that failed is over too
                self._free.append(self._busy.popleft()[1])

    def trim(self) -> int:
        """Give the ring back; returns its bytes. Waits until no command uses it."""
        while self._busy:
            self._reap()
        freed = len(self._free) * _SLOT
        for slot in self._free:
            slot.mapping.release(self._engine.queue)
            slot.buffer.release()
        self._made -= len(self._free)
        self._free.clear()
        return freed


def _flat(tensor: Tensor, dim: int) -> tuple[Tensor, int]:
    """Where rows need no filling up, and lie one after another or are too long for a slot: the elements as rows of
    one.
    """
    if dim == tensor.shape[-1] and (tensor.is_contiguous() or dim * tensor.element_size() > _SLOT):
        return tensor.contiguous().view(-1, 1), 1
    return tensor, dim


def _pieces(tensor: Tensor, most: int) -> Iterator[Tensor]:
    """A tensor's rows in order as [rows, last] views of at most `most` rows, whatever its strides."""
    try:
        rows = tensor.view(-1, tensor.shape[-1])
    except RuntimeError:  # its rows have no common stride
        for part in tensor:
            yield from _pieces(part, most)
        return
    for start in range(0, len(rows), most):
        yield rows[start : start + most]
