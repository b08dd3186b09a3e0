"""The commands of one call with their memory: recorded once, run many times."""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Sequence
from ctypes import memmove
from operator import itemgetter
from typing import Any, NamedTuple

import torch
from hal_compute import waits
from hal_compute.pool import Region
from torch import Tensor

from hal_core.plugin_api import Buffer, DeviceUnavailableError, HalError, UnsupportedError

from ._vk import Bound, Memory
from .open_device import OpenDevice
from .pool import VulkanMemoryPool

#: Bytes up to which the calling thread copies a tensor alone, beside a card and where the device is the processor:
#: torch shares copies of _SHARED elements and more among threads, and waking them takes longer, above all while they
#: are busy.
PLAIN_COPY, PLAIN_COPY_ON_CPU = 1 << 20, 32 << 20
_SHARED = 1 << 15

Given = Sequence[Tensor | None]
Take = Callable[[Given], Any]  # a tensor of the call, or one made from them


class Operand(NamedTuple):
    """Device memory of a recording. `host`: the same memory as bytes where it is mapped; None elsewhere."""

    bound: Bound
    host: Tensor | None

    def part(self, offset: int, size: int) -> Operand:
        """A piece of it, which only shaders use."""
        return Operand(Bound(self.bound.block, self.bound.offset + offset, size), None)


class _Upload(NamedTuple):
    """A tensor that is copied to `near`; `nbytes` at `address` where both are contiguous (0 where `near` is not)."""

    take: Take
    near: Tensor
    address: int
    nbytes: int


class _Result(NamedTuple):
    """A result. `near`: where torch reads it; None where it passes through the staging ring or was written in place.

    `address`, `nbytes`: of its bytes there if they are contiguous; else address is 0.
    """

    shape: torch.Size
    dtype: torch.dtype
    operand: Operand
    wide: int
    near: Tensor | None
    in_place: Take | None
    address: int
    nbytes: int


class VulkanCommandBuffer:
    """Commands in order, with a barrier before every dispatch that reads what an earlier one wrote.

    During recording `stage` and `result` state the inputs and results; `finish` runs the commands. If every input is
    one of the call's tensors, the commands are `fixed`, and `run` runs them again on other tensors of the same shapes.
    """

    def __init__(self, device: OpenDevice, what: str, given: Given) -> None:
        """`what`: the work for messages. `given`: the tensors of the call."""
        self._device, self.what, self._given = device, what, given
        self._gpu, self._card = device.gpu, device.card_of(given)
        self._place = "cpu" if self._card is None else self._card.place
        self._plain = PLAIN_COPY_ON_CPU if device.mapped else PLAIN_COPY
        self._regions: list[tuple[VulkanMemoryPool, Region]] = []
        self._lent: set[Any] = set()  # VkDeviceMemory of blocks whose tensors are read and written in place
        self._imported: list[tuple[Memory, Tensor]] = []  # with the tensors, which must live as long
        self._uploads: list[_Upload] = []
        self._streamed: list[tuple[Take, Operand, int]] = []
        self._results: list[_Result] = []
        self._targets: list[Tensor] = []
        self._downloads: list[tuple[Bound, Bound]] = []
        self._scratch: list[Buffer] = []
        self._copied: list[int] = []  # bytes of each copy
        self._dispatched = self._uploaded = False
        self.fixed, self.kept = True, False  # kept: by the recorder, to run again
        self._commands: Any = self._gpu.begin()
        self._gpu.stamp(self._commands, 2)

    @property
    def nbytes(self) -> int:
        """Bytes of its memory."""
        return sum(region.size for _, region in self._regions)

    def uses(self, block: Memory) -> bool:
        """Whether it reads or writes tensors in a block in place."""
        return block.memory in self._lent

    @property
    def most_groups(self) -> tuple[int, ...]:
        """At most, work groups of a dispatch along x, y and z."""
        return self._device.most_groups

    def spread(self, groups: int) -> tuple[int, int, int]:
        """So many work groups along x; along x and y, and possibly a few more, beyond the limit of x."""
        wide = self.most_groups[0]
        return min(groups, wide), -(-groups // wide), 1

    def scratch(self, shape: Sequence[int], dtype: str) -> Tensor:
        """An uninitialised host tensor, until these commands are released, or have run again."""
        self._scratch.append(self._device.memory.allocate_host(tuple(shape), dtype))
        return self._scratch[-1].tensor  # type: ignore[no-any-return]

    def free_scratch(self) -> None:
        while self._scratch:
            self._device.memory.free(self._scratch.pop())

    # Recording

    def space(self, nbytes: int) -> Operand:
        """Uninitialised device memory."""
        return self._cut(self._device.pool, nbytes)

    def filled(self, nbytes: int, value: float) -> Operand:
        """Device memory that is filled with the float32 `value` at the start of every run."""
        operand = self.space(nbytes)
        self._gpu.fill(self._commands, operand.bound, struct.unpack("I", struct.pack("f", value))[0])
        self._uploaded = True
        return operand

    def counters(self, count: int) -> Operand:
        """`count` 32-bit numbers that are zero at the start of every run; the shaders must leave zeros."""
        shared = self._device.counters
        assert 4 * count <= shared.size
        return Operand(shared, None)

    def _cut(self, pool: VulkanMemoryPool, nbytes: int) -> Operand:
        region = self._device.cut(pool, nbytes)
        self._regions.append((pool, region))
        return Operand(Bound(region.block, region.offset, region.size), pool.host(region, nbytes))

    def stage(
        self,
        tensor: Tensor,
        dim: int | None = None,
        *,
        rows: int | None = None,
        wide: bool = False,
        again: Take | None = None,
    ) -> Operand:
        """A tensor's values, contiguous: read in place if possible, else by one counted copy.

        Args:
            dim, rows: sizes of the last dimension and of the one before it, padded with zeros. wide: convert to
                float32.
            again: makes the tensor from another call's tensors, where it is not one of this call's; without it these
                commands cannot be kept.
        """
        dtype, shape = torch.float32 if wide else tensor.dtype, [*tensor.shape]
        if shape:
            shape[-1] = dim or shape[-1]
        if rows is not None:
            shape[-2] = rows
        whole = shape == [*tensor.shape]
        if whole and dtype == tensor.dtype and (lying := self._lying(tensor)) is not None:
            return lying
        take = self._taking(tensor, again)
        nbytes = math.prod(shape) * dtype.itemsize
        operand = self.space(nbytes)
        self._count(tensor)
        if rows is None and dtype == tensor.dtype and self._device.streams(nbytes, self._card):
            self._streamed.append((take, operand, shape[-1]))
            return operand
        near, staging = self._near(operand, nbytes)
        typed = near.view(dtype).view(shape)
        if not whole:
            typed.zero_()
            typed = typed[..., : tensor.shape[-2], : tensor.shape[-1]] if len(shape) > 1 else typed[: tensor.shape[-1]]
        own = whole and dtype == tensor.dtype and self._card is None and nbytes <= self._plain
        self._uploads.append(_Upload(take, typed, typed.data_ptr() if own else 0, nbytes))
        if staging is not None:
            self._gpu.copy(self._commands, staging, operand.bound)
            self._uploaded = True
        return operand

    def result(self, tensor: Tensor, dim: int | None = None) -> Operand:
        """Memory whose values `finish` copies to `tensor`. Its rows have `dim` elements; the first are read."""
        last = tensor.shape[-1]
        wide, near, in_place, address, nbytes = dim or last, None, None, 0, tensor.nbytes
        if wide == last and (lying := self._lying(tensor)) is not None:
            operand, in_place = lying, self._taking(tensor, None)
        else:
            padded = tensor.numel() // max(last, 1) * wide * tensor.element_size()
            operand = self.space(padded)
            self._count(tensor)
            if not self._device.streams(padded, self._card):
                bytes_near, staging = self._near(operand, padded)
                near = bytes_near.view(tensor.dtype).view(*tensor.shape[:-1], wide)[..., :last]
                address = near.data_ptr() if wide == last and self._card is None and nbytes <= self._plain else 0
                if staging is not None:
                    self._downloads.append((operand.bound, staging))
        self._results.append(_Result(tensor.shape, tensor.dtype, operand, wide, near, in_place, address, nbytes))
        self._targets.append(tensor)
        return operand

    def _taking(self, tensor: Tensor, again: Take | None) -> Take:
        place = next((n for n, known in enumerate(self._given) if known is tensor), None)
        if place is not None:
            return itemgetter(place)
        self.fixed = self.fixed and again is not None
        return again or (lambda given: tensor)

    def _lying(self, tensor: Tensor) -> Operand | None:
        """The tensor's own memory where shaders can use it (shared with CUDA, or the host's on a CPU), else None."""
        if self._card is not None:
            if (bound := self._card.bound_of(tensor)) is not None:
                self._lent.add(bound.block.memory)
        elif (bound := self._device.import_host(tensor)) is not None:
            self._imported.append((bound.block, tensor))
            self.fixed = False  # another call's tensors lie elsewhere
        return None if bound is None else Operand(bound, None)

    def _near(self, operand: Operand, nbytes: int) -> tuple[Tensor, Bound | None]:
        """(bytes that torch reads and writes, their place in staging memory where they are not the operand's own
        memory).
        """
        if self._card is not None:
            return self._card.view(operand.bound)[:nbytes], None
        if operand.host is not None:
            return operand.host, None
        staging = self._cut(self._device.staging, nbytes)
        assert staging.host is not None
        return staging.host, staging.bound

    def _count(self, tensor: Tensor) -> None:
        self._copied.append(tensor.numel() * tensor.element_size())

    def dispatch(
        self,
        shader: str,
        constants: Sequence[int],
        operands: Sequence[Operand],
        numbers: Sequence[float],
        layout: str,
        groups: Sequence[int],
        *,
        kinds: str = "",
        after: bool = True,
    ) -> None:
        """Record a shader.

        Args:
            numbers: push constants, in struct's `layout`. kinds: see `Gpu.pipeline`; "": storage buffers alone.
            after: whether it reads what earlier commands wrote, so that a barrier is needed.

        Raises:
            UnsupportedError: more work groups than the device's limit.
        """
        if any(wanted > most for wanted, most in zip(groups, self.most_groups, strict=True)):
            asked, offered = (" x ".join(f"{n:,}" for n in numbers) for numbers in (groups, self.most_groups))
            raise UnsupportedError(
                f"{self._device.device.id} cannot {self.what}: {shader} needs {asked} work groups and the driver takes "
                f"{offered}; split the batch, the heads or the queries"
            )
        pipeline = self._device.shaders.pipeline(shader, kinds or "s" * len(operands), constants)
        if (self._dispatched or self._uploaded) and after:
            self._gpu.barrier(self._commands)
        if not self._dispatched:
            self._gpu.stamp(self._commands, 0)
        bound = [operand.bound for operand in operands]
        self._gpu.dispatch(self._commands, pipeline, bound, struct.pack(layout, *numbers), groups)
        self._dispatched = True

    def finish(self) -> None:
        """End the recording, run it, and copy the results to their tensors."""
        gpu = self._gpu
        gpu.stamp(self._commands, 1)
        gpu.barrier(self._commands)
        for source, target in self._downloads:
            gpu.copy(self._commands, source, target)
        if self._downloads:
            gpu.barrier(self._commands)
        gpu.stamp(self._commands, 3)
        gpu.end(self._commands)
        self.run(self._given, self._targets)
        self._given, self._targets = (), []

    # Running

    def run(self, given: Given, into: Given = ()) -> list[Tensor]:
        """Copy a call's tensors to the device, run the commands, and return the results in the order of `result`.

        Args:
            into: tensors for the results; where it is shorter or has None, new ones are allocated.

        Raises:
            DeviceUnavailableError: the device was lost, or took longer than `waits.TIMEOUT`.
        """
        device, gpu, card = self._device, self._gpu, self._card
        if card is None:
            for take, near, address, nbytes in self._uploads:
                source = take(given)
                if address and source.is_contiguous():
                    memmove(address, source.data_ptr(), nbytes)
                else:
                    _copy(near, source.detach(), self._plain)
            for take, operand, wide in self._streamed:
                device.ring.upload(take(given).detach(), operand.bound, wide, self.what)
            self._wait(gpu.submit(self._commands))
        else:
            card.enter()
            if self._uploads:  # all by one launch
                sources = [upload.take(given).detach() for upload in self._uploads]
                torch._foreach_copy_([upload.near for upload in self._uploads], sources)
            card.run(self._commands, self.what, waits.TIMEOUT)
        if self.kept:
            self.free_scratch()
        for nbytes in self._copied:
            device.memory.count_copy(nbytes)
        return [self._fetched(result, given, into, n) for n, result in enumerate(self._results)]

    def _wait(self, number: int) -> None:
        try:
            self._gpu.wait(number, self.what, waits.TIMEOUT)
        except DeviceUnavailableError:
            if self.kept:  # releasing it would wait once more
                self._device.give_up(self.what)
            raise

    def _fetched(self, result: _Result, given: Given, into: Given, n: int) -> Tensor:
        """A result: in the tensor that it was written to in place, in `into`, or in a new tensor."""
        if result.in_place is not None:
            return result.in_place(given)  # type: ignore[no-any-return]
        target = into[n] if n < len(into) else None
        if target is None:
            target = torch.empty(result.shape, dtype=result.dtype, device=self._place)
        if result.address and target.is_contiguous() and target.dtype is result.dtype:
            memmove(target.data_ptr(), result.address, result.nbytes)
        elif result.near is not None:
            _copy(target, result.near, self._plain)
        else:
            self._device.ring.download(result.operand.bound, target, result.wide, self.what)
        return target

    def release(self) -> bool:
        """Release memory and commands once the device no longer uses them; False, and nothing is released, if it still
        does.
        """
        gpu, patience = self._gpu, waits.GRACE if self._card is None else waits.TIMEOUT  # after torch's own work there
        try:
            gpu.wait(gpu.submitted, f"finish ({self.what}) before its memory is given back", patience)
        except HalError:
            if not gpu.lost:  # still running: what it writes to must stay
                return False
        if self._card is not None and not self._card.settle(patience):
            return False
        gpu.drop(self._commands)
        for block, _ in self._imported:
            gpu.free(block)
        for pool, region in self._regions:
            pool.free(region)
        self._regions.clear()
        self._imported.clear()
        self.free_scratch()
        return True


def _copy(target: Tensor, source: Tensor, most: int) -> None:
    """target.copy_(source); up to `most` bytes by this thread, in pieces that torch does not share among threads."""
    if source.numel() < _SHARED or target.nbytes > most or target.is_cuda:
        target.copy_(source)
        return
    rows = (_SHARED - 1) * source.shape[0] // source.numel()
    pieces = zip(target.split(rows), source.split(rows), strict=True) if rows else zip(target, source, strict=True)
    for there, here in pieces:
        _copy(there, here, most)
