"""Commands of one shape of call, with their memory: recorded once, run many times."""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Sequence
from ctypes import memmove
from operator import itemgetter
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from hal_compute.pool import Region
from torch import Tensor

from hal_core.plugin_api import DeviceUnavailableError, HalError, UnsupportedError

from ._vk import Bound, Memory
from .memory import VulkanMemoryPool

if TYPE_CHECKING:
    from .recorder import Recorder

#: Seconds after which a wait gives up.
TIMEOUT = 300.0
#: Seconds that work which should be over already is given to end, before its memory is given back.
GRACE = 30.0

#: Bytes up to which this thread copies a tensor by itself, beside a card and where the device is the processor itself:
#: torch shares its copies among threads from _SHARED elements on, and waking them takes longer, far longer where they
#: are at work.
PLAIN_COPY, PLAIN_COPY_ON_CPU = 1 << 20, 32 << 20
_SHARED = 1 << 15

Given = Sequence[Tensor | None]
Take = Callable[[Given], Any]  # a tensor of the call, or one made from them


class Operand(NamedTuple):
    """Device memory of a recording. `host` shares it as bytes where the device's memory is mapped; None elsewhere."""

    bound: Bound
    host: Tensor | None

    def part(self, offset: int, size: int) -> Operand:
        """A piece of it, for a shader alone."""
        return Operand(Bound(self.bound.block, self.bound.offset + offset, size), None)


class _Upload(NamedTuple):
    """A tensor that is copied to `near`: to `nbytes` at `address` where both are contiguous (0 where `near` is not)."""

    take: Take
    near: Tensor
    address: int
    nbytes: int


class _Result(NamedTuple):
    """A result: `near` is where torch reads it; None where it passes through the staging ring, or was written in place.

    `address` and `nbytes` are of its bytes there where they are all its own; 0 elsewhere.
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
    """Commands in order, with a barrier before every dispatch that reads what the one before wrote.

    While it is recorded, `stage` and `result` say where tensors come in and go out; `finish` runs it. Where all that
    came in belongs to the call's tensors it is `fixed`, and `run` does the same again for others of the same shapes.
    """

    def __init__(self, recorder: Recorder, what: str, given: Given) -> None:
        """`what` names the work for messages; `given` are the tensors of the call."""
        self._recorder, self.what, self._given = recorder, what, given
        self._gpu, self._card = recorder.gpu, recorder.card_of(given)
        self._place = "cpu" if self._card is None else self._card.place
        self._plain = PLAIN_COPY_ON_CPU if recorder.mapped else PLAIN_COPY
        self._regions: list[tuple[VulkanMemoryPool, Region]] = []
        self._lent: set[Any] = set()  # VkDeviceMemory of blocks whose tensors are used where they lie
        self._imported: list[tuple[Memory, Tensor]] = []  # with the tensors, which must stay for as long
        self._uploads: list[_Upload] = []
        self._streamed: list[tuple[Take, Operand, int]] = []
        self._results: list[_Result] = []
        self._targets: list[Tensor] = []
        self._downloads: list[tuple[Bound, Bound]] = []
        self._copies = self._copied = 0
        self._dispatched = self._uploaded = False
        self.fixed, self.kept = True, False  # kept: by the recorder, to be run again
        self._commands: Any = self._gpu.begin()
        self._gpu.stamp(self._commands, 2)

    @property
    def nbytes(self) -> int:
        """Of all memory that is kept with it."""
        return sum(region.size for _, region in self._regions)

    def uses(self, block: Memory) -> bool:
        """Whether it reads or writes somebody's tensors in a block."""
        return block.memory in self._lent

    @property
    def most_groups(self) -> tuple[int, ...]:
        """Work groups of a dispatch, at most, along x, y and z."""
        return self._recorder.most_groups

    def spread(self, groups: int) -> tuple[int, int, int]:
        """So many work groups along x, or some more along x and y where they are beyond the limit of x."""
        wide = self.most_groups[0]
        return min(groups, wide), -(-groups // wide), 1

    # Recording

    def space(self, nbytes: int) -> Operand:
        """Uninitialised device memory."""
        return self._cut(self._recorder.pool, nbytes)

    def filled(self, nbytes: int, value: float) -> Operand:
        """Device memory that holds the float32 `value` everywhere whenever the commands start."""
        operand = self.space(nbytes)
        self._gpu.fill(self._commands, operand.bound, struct.unpack("I", struct.pack("f", value))[0])
        self._uploaded = True
        return operand

    def counters(self, count: int) -> Operand:
        """`count` numbers of 32 bits that are zero whenever the commands start; they must leave them so."""
        shared = self._recorder.counters
        assert 4 * count <= shared.size
        return Operand(shared, None)

    def _cut(self, pool: VulkanMemoryPool, nbytes: int) -> Operand:
        region = self._recorder.cut(pool, nbytes)
        self._regions.append((pool, region))
        host = None
        if region.block.mapped is not None:
            host = torch.frombuffer(region.block.mapped, dtype=torch.uint8, count=nbytes, offset=region.offset)
        return Operand(Bound(region.block, region.offset, region.size), host)

    def stage(
        self,
        tensor: Tensor,
        dim: int | None = None,
        *,
        rows: int | None = None,
        wide: bool = False,
        again: Take | None = None,
    ) -> Operand:
        """A tensor's values, contiguous: read where they lie if they can be, else by one counted copy.

        Args:
            dim: size of the last dimension, padded with zeros. rows: likewise of the one before it. wide: as float32.
            again: makes the tensor anew from another call's, where it is not one of the call's own; without it these
                commands are not kept.
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
        if rows is None and dtype == tensor.dtype and self._recorder.streams(nbytes, self._card):
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
        """Memory that becomes `tensor` when `finish` is called; rows of `dim` elements are cut on the way."""
        last = tensor.shape[-1]
        wide, near, in_place, address, nbytes = dim or last, None, None, 0, tensor.nbytes
        if wide == last and (lying := self._lying(tensor)) is not None:
            operand, in_place = lying, self._taking(tensor, None)
        else:
            padded = tensor.numel() // max(last, 1) * wide * tensor.element_size()
            operand = self.space(padded)
            self._count(tensor)
            if not self._recorder.streams(padded, self._card):
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
        """The tensor's own memory where shaders can use it: shared with CUDA, or the host's on a CPU; None
        elsewhere.
        """
        recorder = self._recorder
        if self._card is not None:
            if (bound := self._card.bound_of(tensor)) is not None:
                self._lent.add(bound.block.memory)
        elif (bound := recorder.import_host(tensor)) is not None:
            self._imported.append((bound.block, tensor))
            self.fixed = False  # another call's tensors lie elsewhere
        return None if bound is None else Operand(bound, None)

    def _near(self, operand: Operand, nbytes: int) -> tuple[Tensor, Bound | None]:
        """(bytes that torch reads and writes, their place in staging memory where they are not the operand's own)."""
        if self._card is not None:
            return self._card.view(operand.bound)[:nbytes], None
        if operand.host is not None:
            return operand.host, None
        staging = self._cut(self._recorder.staging, nbytes)
        assert staging.host is not None
        return staging.host, staging.bound

    def _count(self, tensor: Tensor) -> None:
        self._copies += 1
        self._copied += tensor.numel() * tensor.element_size()

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
            numbers: its push constants in struct's `layout`. kinds: see `Gpu.pipeline`; "" for storage buffers alone.
            after: whether it reads what was recorded before; without it no barrier is needed.

        Raises:
            UnsupportedError: more work groups than the device's limit.
        """
        if any(wanted > most for wanted, most in zip(groups, self.most_groups, strict=True)):
            asked, offered = (" x ".join(f"{n:,}" for n in numbers) for numbers in (groups, self.most_groups))
            raise UnsupportedError(
                f"{self._recorder.device.id} cannot {self.what}: {shader} needs {asked} work groups and the driver takes "
                f"{offered}; split the batch, the heads or the queries"
            )
        pipeline = self._recorder.shaders.pipeline(shader, kinds or "s" * len(operands), constants)
        if (self._dispatched or self._uploaded) and after:
            self._gpu.barrier(self._commands)
        if not self._dispatched:
            self._gpu.stamp(self._commands, 0)
        bound = [operand.bound for operand in operands]
        self._gpu.dispatch(self._commands, pipeline, bound, struct.pack(layout, *numbers), groups)
        self._dispatched = True

    def finish(self) -> None:
        """End the recording, run it, and bring the results home."""
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
        """Copy a call's tensors in, run the commands, and bring the results home, in the order of `result`.

        Args:
            into: tensors that become the results; new ones where it ends or has None.

        Raises:
            DeviceUnavailableError: the device was lost, or took longer than `TIMEOUT`.
        """
        recorder, gpu, card = self._recorder, self._gpu, self._card
        if card is None:
            for take, near, address, nbytes in self._uploads:
                source = take(given)
                if address and source.is_contiguous():
                    memmove(address, source.data_ptr(), nbytes)
                else:
                    _copy(near, source.detach(), self._plain)
            for take, operand, wide in self._streamed:
                recorder.ring.upload(take(given).detach(), operand.bound, wide, self.what)
            self._wait(gpu.submit(self._commands))
        else:
            card.enter()
            if self._uploads:  # all by one launch
                sources = [upload.take(given).detach() for upload in self._uploads]
                torch._foreach_copy_([upload.near for upload in self._uploads], sources)
            card.run(self._commands, self.what, TIMEOUT)
        recorder.copies += self._copies
        recorder.copied += self._copied
        return [self._fetched(result, given, into, n) for n, result in enumerate(self._results)]

    def _wait(self, number: int) -> None:
        try:
            self._gpu.wait(number, self.what, TIMEOUT)
        except DeviceUnavailableError:
            if self.kept:  # it is not released now, which would wait once more
                self._recorder.give_up(self.what)
            raise

    def _fetched(self, result: _Result, given: Given, into: Given, n: int) -> Tensor:
        """A result in the tensor that it was written into, that waits for it, or that is made for it."""
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
            self._recorder.ring.download(result.operand.bound, target, result.wide, self.what)
        return target

    def release(self) -> bool:
        """Give memory and commands back, once the device is done with them; False where it is not, and they stay."""
        gpu, patience = self._gpu, GRACE if self._card is None else TIMEOUT  # behind whatever torch has queued there
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
        return True


def _copy(target: Tensor, source: Tensor, most: int) -> None:
    """target.copy_(source); one of at most `most` bytes by this thread, in pieces that torch does not share."""
    if source.numel() < _SHARED or target.nbytes > most or target.is_cuda:
        target.copy_(source)
        return
    rows = (_SHARED - 1) * source.shape[0] // source.numel()
    pieces = zip(target.split(rows), source.split(rows), strict=True) if rows else zip(target, source, strict=True)
    for there, here in pieces:
        _copy(there, here, most)
