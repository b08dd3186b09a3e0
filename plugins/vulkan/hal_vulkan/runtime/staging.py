"""A bounded ring of host memory through which large tensors reach device memory that is not mapped."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from hal_compute import waits
from hal_compute.staging import pieces
from torch import Tensor

from ._vk import Bound, Gpu, Memory


class _Slot(NamedTuple):
    place: Bound
    host: Tensor
    commands: Any


class StagingRing:
    """Slots of host memory: the host copies a piece of a tensor into one while the device transfers another.

    The memory is allocated at the first use and stays until `trim`. Not thread-safe: the session holds its lock.
    """

    def __init__(self, gpu: Gpu, *, slots: int = 4, slot_bytes: int = 4 << 20) -> None:
        self._gpu, self._count, self._slot_bytes = gpu, slots, slot_bytes
        self._block: Memory | None = None
        self._slots: list[_Slot] = []
        self._last = [0] * slots  # the submission that used each slot last
        self._next = 0

    @property
    def nbytes(self) -> int:
        """Bytes that the ring holds now."""
        return self._count * self._slot_bytes if self._block is not None else 0

    def upload(self, tensor: Tensor, target: Bound, wide: int, what: str) -> None:
        """Submit the transfer of a tensor, rows padded with zeros to `wide` elements. It has been read on return."""
        done = 0
        for piece, each in pieces(tensor, wide, self._slot_bytes):
            slot, nbytes = self._take(what), piece.shape[0] * each * piece.element_size()
            rows = slot.host[:nbytes].view(piece.dtype).view(-1, each)
            rows[:, : piece.shape[1]].copy_(piece)
            if each != piece.shape[1]:
                rows[:, piece.shape[1] :].zero_()
            source = Bound(slot.place.block, slot.place.offset, nbytes)
            self._transfer(slot, source, Bound(target.block, target.offset + done, nbytes))
            done += nbytes

    def download(self, source: Bound, tensor: Tensor, wide: int, what: str) -> None:
        """Fill a tensor from device memory whose rows have `wide` elements, of which the first are read."""
        under_way: list[tuple[_Slot, int, Tensor, int]] = []
        done = 0
        for piece, each in pieces(tensor, wide, self._slot_bytes):
            if len(under_way) == self._count:
                self._fetch(*under_way.pop(0), what)
            slot, nbytes = self._take(what), piece.shape[0] * each * piece.element_size()
            target = Bound(slot.place.block, slot.place.offset, nbytes)
            number = self._transfer(slot, Bound(source.block, source.offset + done, nbytes), target)
            under_way.append((slot, number, piece, each))
            done += nbytes
        for transfer in under_way:
            self._fetch(*transfer, what)

    def _fetch(self, slot: _Slot, number: int, piece: Tensor, wide: int, what: str) -> None:
        self._gpu.wait(number, f"transfer a result ({what})", waits.TIMEOUT)
        nbytes = piece.shape[0] * wide * piece.element_size()
        piece.copy_(slot.host[:nbytes].view(piece.dtype).view(-1, wide)[:, : piece.shape[1]])

    def _take(self, what: str) -> _Slot:
        """The least recently used slot, once the device no longer uses it."""
        if self._block is None:
            block = self._block = self._gpu.allocate(self._count * self._slot_bytes, host=True)
            for start in range(0, self._count * self._slot_bytes, self._slot_bytes):
                host = torch.frombuffer(block.mapped, dtype=torch.uint8, count=self._slot_bytes, offset=start)
                commands = self._gpu.begin()
                self._gpu.end(commands)  # each transfer records it again
                self._slots.append(_Slot(Bound(block, start, self._slot_bytes), host, commands))
        self._gpu.wait(self._last[self._next], f"transfer a tensor ({what})", waits.TIMEOUT)
        return self._slots[self._next]

    def _transfer(self, slot: _Slot, source: Bound, target: Bound) -> int:
        gpu = self._gpu
        gpu.begin(slot.commands)
        gpu.barrier(slot.commands)  # shaders wrote the result before
        gpu.copy(slot.commands, source, target)
        gpu.barrier(slot.commands)
        gpu.end(slot.commands)
        number = self._last[self._next] = gpu.submit(slot.commands)
        self._next = (self._next + 1) % self._count
        return number

    def trim(self) -> int:
        """Free the memory once no transfer is under way; returns its bytes."""
        freed = self.nbytes
        if self._block is not None:
            if not self._gpu.lost:
                self._gpu.wait(max(self._last), "finish transfers before their memory is freed", waits.TIMEOUT)
            for slot in self._slots:
                self._gpu.drop(slot.commands)
            self._gpu.free(self._block)
            self._block, self._slots = None, []
        return freed
